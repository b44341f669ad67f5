"""Quantisers as pure functions: the nearest entry of a codebook, and scalars rounded to levels.

N places · C channels of a latent · K codes · L levels of a channel
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def straight_through(x, quantised):
    """The quantised value, whose gradient goes to `x` as if nothing had been changed."""
    return x + jax.lax.stop_gradient(quantised - x)


# --- a codebook (arXiv:1711.00937, eq. 1) ---------------------------------------------------------


def distances(latent_NC, entry_KC):
    """|latent − entry|² without the latent's square, which is the same for all entries.   -> NK"""
    # Accelerators round factors to bfloat16 or TF32 by default. Another entry might then win.
    product_NK = jnp.matmul(latent_NC, entry_KC.T, precision="highest")
    return jnp.square(entry_KC).sum(-1) - 2 * product_NK


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
