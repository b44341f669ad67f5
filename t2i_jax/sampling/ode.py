"""Solvers of dx/dc = velocity(x, t) along times t with a clock c(t): functions of functions.

x_BHWC state · ts_S times from noise (1) to data (0), S − 1 steps
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import fields

Shift = Annotated[float, fields.above(0)]


def euler(velocity, x_BHWC, ts_S, clock=lambda t: t):
    """First order: one call of `velocity(x_BHWC, t)` a step; exact where velocity is constant."""

    def step(x_BHWC, t_pair):
        t, t_next = t_pair
        return x_BHWC + (clock(t_next) - clock(t)) * velocity(x_BHWC, t), None

    return jax.lax.scan(step, x_BHWC, (ts_S[:-1], ts_S[1:]))[0]


def heun(velocity, x_BHWC, ts_S, clock=lambda t: t):
    """Second order: two calls a step, the last step is Euler's (Karras et al. 2022, alg. 1)."""

    def step(x_BHWC, t_pair):
        t, t_next = t_pair
        length = clock(t_next) - clock(t)
        v_BHWC = velocity(x_BHWC, t)
        ahead_BHWC = x_BHWC + length * v_BHWC
        mean_BHWC = 0.5 * (v_BHWC + velocity(ahead_BHWC, t_next))
        return x_BHWC + length * mean_BHWC, None

    x_BHWC, _ = jax.lax.scan(step, x_BHWC, (ts_S[:-2], ts_S[1:-1]))
    return euler(velocity, x_BHWC, ts_S[-2:], clock)


def times(steps: int, shift=1.0):
    """steps + 1 times 1 … 0: s·t / (1 + (s − 1)·t) of an even grid (arXiv:2403.03206, eq. 23).

    The ends are 1 and 0 exactly; the times between them are right to a few roundings.

    Raises:
      ConfigError: a shift that is not above 0, as there is no such grid. A traced one, which nobody
        can look at, gives no numbers then.
    """
    if not isinstance(shift, jax.core.Tracer):
        shift = fields.checked(Shift, "shift", shift, where="sampling.ode.times")
    # s·t + (1 − t) is the denominator without its cancellation: 1 + (0.2 − 1) is below 0.2.
    part_S = np.arange(steps - 1, 0, -1) / steps
    t_S, rest_S = part_S.astype(np.float32), (1 - part_S).astype(np.float32)
    shift = jnp.where(shift > 0, shift, jnp.nan)
    between_S = shift * t_S / (shift * t_S + rest_S)
    return jnp.concatenate([jnp.ones(1), between_S, jnp.zeros(1)])


SOLVERS = {"euler": euler, "heun": heun}
Sampler = Annotated[str, fields.one_of(SOLVERS)]
