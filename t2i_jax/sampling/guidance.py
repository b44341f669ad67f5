"""Classifier-free guidance as a function of functions (Ho & Salimans 2022, eq. 6).

B batch · H W pixels · C channels
"""

import jax
import jax.numpy as jnp

NONE = 1.0  # the scale that guides nowhere
ALWAYS = (0.0, 1.0)  # the interval of all times
TOLERANCE = 1e-6  # relative: times and interval ends are rounded in different ways


def cfg(pair, alone, scale, interval):
    """Guides a velocity; where nothing is guided, the null condition is not computed.

    A scale or interval that is a number, not a traced array, is looked at while tracing: NONE and
    ALWAYS then need no branch in the program.

    Args:
      pair: (x_2BHWC, t_2B) -> v_2BHWC under conditions and null conditions as `interleave` orders
        them.
      alone: (x_BHWC, t_B) -> v_BHWC under the conditions.
      scale: scalar; 1 is no guidance.
      interval: (low, high); outside these times the scale is 1 (Kynkäänniemi et al. 2024). Its ends
        belong to it, also where rounding puts a time of the grid beside them.
    Returns:
      (x_BHWC, t) -> v_BHWC = null + scale · (conditioned − null).
    """
    low, high = interval

    def guided(x_BHWC, t):
        both_2BHWC = interleave(x_BHWC, x_BHWC)
        return mixed(pair(both_2BHWC, jnp.full(both_2BHWC.shape[:1], t)), scale)

    def unguided(x_BHWC, t):
        return alone(x_BHWC, jnp.full(x_BHWC.shape[:1], t))

    def either(x_BHWC, t):
        inside = (low * (1 - TOLERANCE) <= t) & (t <= high * (1 + TOLERANCE))
        return jax.lax.cond(inside & (scale != NONE), guided, unguided, x_BHWC, t)

    if is_none(scale):
        return unguided
    # A traced scale of 1 costs the null condition there, but gives the same velocity.
    return guided if _known(interval) and tuple(interval) == ALWAYS else either


def mixed(both_2BX, scale):
    """null + scale · (conditioned − null), of rows as `interleave` orders them.   -> BX"""
    both_B2X = both_2BX.reshape(-1, 2, *both_2BX.shape[1:])
    conditioned_BX, null_BX = both_B2X[:, 0], both_B2X[:, 1]
    return null_BX + scale * (conditioned_BX - null_BX)


def interleave(a_BX, b_BX):
    """a₀, b₀, a₁, b₁, …: rows of one example stay on one device where the batch is split."""
    return jnp.stack([a_BX, b_BX], 1).reshape(-1, *a_BX.shape[1:])


def is_none(scale) -> bool:
    """Whether it guides nowhere and is a number: then a program needs no null condition."""
    return _known(scale) and scale == NONE


def _known(value) -> bool:
    """Whether it holds no traced array."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value))
