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


def apart(text_BL, mask_BL):
    """Which captions are not the same, as numbers.   -> bool BB"""
    same_BB = (text_BL[:, None] == text_BL[None]).all(-1)
    return ~(same_BB & (mask_BL[:, None] == mask_BL[None]).all(-1))


def info_nce(logits_BB, apart_BB, weight_B):
    """Symmetric cross-entropy of each picture's own caption among those that differ from it, and
    the reverse (arXiv:1807.03748, eq. 4; arXiv:2103.00020); examples of weight 0 are none.
    """
    own = jnp.eye(len(logits_BB), dtype=bool)
    logits_BB = jnp.where(_counted(apart_BB, weight_B) | own, logits_BB, -1e9)
    value_B = sum(jax.nn.logsumexp(logits_BB, axis) for axis in (0, 1)) / 2
    return weighted_mean(value_B - jnp.diagonal(logits_BB), weight_B)


def pairwise(logits_BB, apart_BB, weight_B):
    """Whether a picture and a caption belong together, decided for each pair (SigLIP,
    arXiv:2303.15343, eq. 1); pairs of equal captions and examples of weight 0 are none.
    """
    own = jnp.eye(len(logits_BB), dtype=bool)
    value_BB = jax.nn.softplus(jnp.where(own, -logits_BB, logits_BB))
    value_B = jnp.where(_counted(apart_BB, weight_B) | own, value_BB, 0).sum(1)
    return weighted_mean(value_B, weight_B)


def _counted(apart_BB, weight_B):
    return apart_BB & (weight_B > 0)[None] & (weight_B > 0)[:, None]
