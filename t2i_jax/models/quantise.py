"""Quantisers as pure functions: the nearest entry of a codebook, and scalars rounded to levels.

N places · C channels of a latent · K codes · L levels of a channel
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

LEAST = 1e-9  # keeps logarithms and quotients of 0 finite


def straight_through(x, quantised):
    """The quantised value, whose gradient goes to `x` as if nothing had been changed."""
    return x + jax.lax.stop_gradient(quantised - x)


# --- a codebook (arXiv:1711.00937, eq. 1) ---------------------------------------------------------


def distances(latent_NC, entry_KC):
    """|latent − entry|² without the latent's square, which is the same for all entries.   -> NK"""
    # Accelerators round factors to bfloat16 or TF32 by default. Another entry might then win.
    product_NK = jnp.matmul(latent_NC, entry_KC.T, precision="highest")
    return jnp.square(entry_KC).sum(-1) - 2 * product_NK


def entropy_gap(logit_NK, weight_N):
    """How unsure each place is of its code, less how evenly all places use the codes (LFQ,
    arXiv:2310.05737, eq. 6).   -> scalar in nats, from −log K, which is best, to 0

    logit_NK: of each place's codes.
    """
    share_N = weight_N / jnp.maximum(weight_N.sum(), LEAST)
    chance_NK = jax.nn.softmax(logit_NK)
    return share_N @ entropy(chance_NK) - entropy(share_N @ chance_NK)


def unused_error(latent_NC, entry_KC, weight_N):
    """The mean squared distance of the entries that no place uses from their nearest places.

    Its gradient revives dead entries: they move to where latents are, as in CVQ-VAE
    (arXiv:2307.15139), but without statistics of earlier batches. Latents are not moved.

    -> scalar, the sum over these entries divided by K
    """
    latent_NC = jax.lax.stop_gradient(latent_NC)
    distance_NK = distances(latent_NC, jax.lax.stop_gradient(entry_KC))
    used_K = jnp.zeros(len(entry_KC), bool).at[distance_NK.argmin(1)].max(weight_N > 0)
    # Of one entry, the places' own squares count, too.
    from_entry_NK = distance_NK + jnp.square(latent_NC).sum(-1, keepdims=True)
    near_K = jnp.where(weight_N[:, None] > 0, from_entry_NK, jnp.inf).argmin(0)
    error_K = jnp.square(entry_KC - latent_NC[near_K]).mean(-1)
    return jnp.where(~used_K & (weight_N > 0).any(), error_K, 0).mean()


# --- how evenly codes are used --------------------------------------------------------------------


def shares(code, weight, num_codes: int):
    """The share of each code among places of the same shape as `weight`.   -> K"""
    total_K = jnp.zeros(num_codes).at[code].add(weight)
    return total_K / jnp.maximum(total_K.sum(), LEAST)


def entropy(chance_K):
    """−Σ p·log p over the last axis, in nats."""
    # The slope of p·log p at 0 is infinite, and softmax gives zeros.
    return -(chance_K * jnp.log(chance_K + LEAST)).sum(-1)


# --- scalars (finite scalar quantisation, arXiv:2309.15505, section 3.1) -------------------------
# A channel of L levels has the values −1, −1 + 2/(L − 1), …, 1. The paper shifts an even number of
# levels so that 0 is one of them; evenly spaced ones need no such case.


def digits(x, levels):
    """The numbers of the nearest levels, 0 … L − 1.   -> int32, as x

    Beyond −1 and 1 it is the outermost one.

    levels: L of each channel of the last axis.
    """
    steps_C = np.array(levels) - 1
    return jnp.round((jnp.clip(x, -1, 1) + 1) / 2 * steps_C).astype(jnp.int32)


def value_of(digit, levels):
    """The values in [-1, 1] of levels' numbers.   -> float32"""
    return 2 * digit / jnp.float32(np.array(levels) - 1) - 1


def number_of(digit, levels):
    """One number of all channels' levels, the first channel counting least.   -> int32"""
    places_C = np.cumprod([1, *levels[:-1]])
    return (digit * places_C).sum(-1).astype(jnp.int32)


def digits_of(number, levels):
    """The inverse of `number_of`.   -> int32, with an axis C"""
    places_C = np.cumprod([1, *levels[:-1]])
    return number[..., None] // places_C % np.array(levels)


def count(levels) -> int:
    """How many codes there are."""
    return math.prod(levels)
