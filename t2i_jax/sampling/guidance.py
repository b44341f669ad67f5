"""Classifier-free guidance as a function of functions (Ho & Salimans 2022, eq. 6)."""

import jax.numpy as jnp


def cfg(velocity, scale, interval):
    """Guides a velocity that sees conditions and null conditions in one batch of 2B.

    Args:
      velocity: (x_2BHWC, t_2B) -> v_2BHWC; the first half is conditioned, the second half is not.
      scale: scalar; 1 is no guidance.
      interval: (low, high); outside these times the scale is 1 (Kynkäänniemi et al. 2024).
    Returns:
      (x_BHWC, t) -> v_BHWC = null + scale · (conditioned − null).
    """
    low, high = interval

    def guided(x_BHWC, t):
        both_2BHWC = jnp.concatenate([x_BHWC, x_BHWC])
        t_2B = jnp.full((both_2BHWC.shape[0],), t, jnp.float32)
        conditioned_BHWC, null_BHWC = jnp.split(velocity(both_2BHWC, t_2B), 2)
        w = jnp.where((low <= t) & (t <= high), scale, 1.0)
        return null_BHWC + w * (conditioned_BHWC - null_BHWC)

    return guided
