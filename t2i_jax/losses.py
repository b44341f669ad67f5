"""Losses as pure functions, one value per example.   B batch · H W pixels · C channels"""

import jax.numpy as jnp


def squared_error(a_BHWC, b_BHWC):
    """Mean squared difference of each example, in float32.   -> B"""
    difference = a_BHWC.astype(jnp.float32) - b_BHWC.astype(jnp.float32)
    return jnp.square(difference).mean(axis=range(1, difference.ndim))


def weighted_mean(value_B, weight_B):
    """Mean over the examples that count; 0 where none does."""
    return (value_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1e-9)
