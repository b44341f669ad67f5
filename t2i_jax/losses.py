"""Losses as pure functions, one value per example.   B batch · H W pixels · C channels · P width"""

import jax
import jax.numpy as jnp

ANGLE_MARGIN = 1e-4  # of a cosine from ±1


def squared_error(a_BHWC, b_BHWC):
    """Mean squared difference of each example, in float32.   -> B"""
    difference = a_BHWC.astype(jnp.float32) - b_BHWC.astype(jnp.float32)
    return jnp.square(difference).mean(axis=range(1, difference.ndim))


def weighted_mean(value_B, weight_B):
    """Mean over the examples that count; 0 where none does."""
    return (value_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1e-9)


def unit(x_BP):
    """Vectors of length 1, the zero vector of length 0."""
    return x_BP * jax.lax.rsqrt(jnp.square(x_BP).sum(-1, keepdims=True) + 1e-8)


def spherical(a_BP, b_BP):
    """The squared angle between unit vectors, (arccos a·b)².   -> B

    The cosine is clipped, for the slope of arccos is infinite at ±1: there the gradient is 0.
    """
    cosine_B = jnp.clip((a_BP * b_BP).sum(-1), -1 + ANGLE_MARGIN, 1 - ANGLE_MARGIN)
    return jnp.square(jnp.arccos(cosine_B))


# --- pairs of pictures and captions, of the global batch ------------------------------------------


def different_captions(tokens):
    """Which captions are not the same, as numbers.   -> bool BB

    By hashes of 64 bits, for the tokens of all pairs would be B²·L numbers. Two captions that
    differ pass for the same with a chance of 2⁻⁶⁴, any two of 2,048 with one of 10⁻¹³; in that step
    they are no negatives of each other.
    """
    leaves = jax.tree.leaves(tokens)  # numbers and mask of each tokenizer
    ids_BL, mask_BL = (jnp.concatenate(x, axis=1) for x in (leaves[::2], leaves[1::2]))
    word_BL = 2 * ids_BL.astype(jnp.uint32) + mask_BL
    place_L = jnp.arange(word_BL.shape[1], dtype=jnp.uint32)
    same_BB = True
    for seed in (0x9E3779B9, 0x7F4A7C15):  # two numbers of 32 bits: JAX has no longer ones
        # a token's number is drawn anew at each place (Zobrist 1970), so that order counts
        drawn_BL = _mixed(word_BL ^ _mixed(place_L + jnp.uint32(seed)))
        hash_B = drawn_BL.sum(1, dtype=jnp.uint32)
        same_BB &= hash_B[:, None] == hash_B
    return ~same_BB


def _mixed(x):
    """A one-to-one map of uint32, each bit of which depends on all of x (MurmurHash3's last)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def info_nce(logits_BB, different_BB, weight_B):
    """Symmetric cross-entropy of each picture's own caption among those that differ from it, and
    the reverse (arXiv:1807.03748, eq. 4; arXiv:2103.00020); examples of weight 0 are none.
    """
    own = jnp.eye(len(logits_BB), dtype=bool)
    logits_BB = jnp.where(_counted(different_BB, weight_B) | own, logits_BB, -1e9)
    value_B = sum(jax.nn.logsumexp(logits_BB, axis) for axis in (0, 1)) / 2
    return weighted_mean(value_B - jnp.diagonal(logits_BB), weight_B)


def pairwise(logits_BB, different_BB, weight_B):
    """Whether a picture and a caption belong together, decided for each pair (SigLIP,
    arXiv:2303.15343, eq. 1); pairs of equal captions and examples of weight 0 are none.
    """
    own = jnp.eye(len(logits_BB), dtype=bool)
    value_BB = jax.nn.softplus(jnp.where(own, -logits_BB, logits_BB))
    value_B = jnp.where(_counted(different_BB, weight_B) | own, value_BB, 0).sum(1)
    return weighted_mean(value_B, weight_B)


def _counted(different_BB, weight_B):
    return different_BB & (weight_B > 0)[None] & (weight_B > 0)[:, None]
