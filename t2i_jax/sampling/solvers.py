"""Solvers of pretrained pipelines: from noise to latents by the numbers of a `scheduler.Grid`.

A solver is a function (output, z, grid, normal) -> z. `output(z, time)` is what the network says,
guided, of the kind grid.kind; `normal(n)` is standard normal noise of step n in z's shape. All of a
solver's numbers are arrays of the grid, with an entry for each call of the network. The state is
z = α·x + σ·ε everywhere, also where published solvers scale it otherwise.

BHWC latents · S calls
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax.sampling import prediction


class Solver(NamedTuple):
    """A solver, and its single steps for whoever looks in between.

    start: (z, grid) -> the state, a tuple that begins with z.
    step: (output, state, n, g, grid, normal) -> the state after step n, whose numbers are g, and x̂
      of the step: what the network takes the result to be.
    """

    start: Callable
    step: Callable

    def __call__(self, output, z_BHWC, grid, normal):
        def step(state, numbers):
            return self.step(output, state, *numbers, grid, normal)[0], None

        calls = jnp.arange(len(grid.time_S))
        return jax.lax.scan(step, self.start(z_BHWC, grid), (calls, grid.arrays()))[0][0]


def _linear(output, state, n, g, grid, normal):
    """Steps z' = kept·z + x_share·x̂ + noise_share·ε̂ + fresh·(new noise).

    x̂ and ε̂ are of a mix of the last four outputs. DDIM (Song et al. 2021, arXiv:2010.02502, eq.
    12), Euler's method in σ/α (Karras et al. 2022, arXiv:2206.00364, alg. 1 without churn), its
    ancestral form, PLMS (arXiv:2202.09778, eq. 12), LCM (arXiv:2310.04378) and DDPM (eq. 7 of
    arXiv:2006.11239) are such steps.
    """
    z, before, past = state
    out = output(z, g.time_S)
    # PLMS does its first step again, from where it began.
    # `repeats`, `draws` and the number of past outputs are static, so other solvers pay for none.
    base = jnp.where(g.again_S, before, z) if grid.repeats else z
    mixed = g.mix_S[0] * out + sum(g.mix_S[i + 1] * past[i] for i in range(len(past)))
    x, noise = prediction.parts(grid.kind, mixed, base, g.alpha_S, g.sigma_S)
    new = g.kept_S * base + g.x_share_S * x + g.noise_share_S * noise
    if grid.draws:
        new += g.fresh_S * normal(n)
    if past:
        # The output of a repeated call is mixed once and not remembered, as in diffusers.
        kept = (out, *past[:-1])
        past = tuple(jnp.where(g.again_S, old, one) for one, old in zip(kept, past, strict=True))
    return (new, base, past), x


def _multistep(output, state, n, g, grid, normal):
    """DPM-Solver++ of order 2, multistep (Lu et al. 2022, arXiv:2211.01095, alg. 2): linear in the
    state and in the last two x̂.
    """
    z, last = state
    x, _ = prediction.parts(grid.kind, output(z, g.time_S), z, g.alpha_S, g.sigma_S)
    return (g.kept_S * z + g.mix_S[0] * x + g.mix_S[1] * last, x), x


def _heun(output, state, n, g, grid, normal):
    """Heun's method in σ/α (Karras et al. 2022, alg. 1): two calls a step, but one in the last.

    The grid has an entry for each step, and the next one's time beside it.
    """

    def parts(z, time, alpha, sigma):
        x, noise = prediction.parts(grid.kind, output(z, time), z, alpha, sigma)
        # On the straight line z moves by its velocity, else z/α by the noise.
        return x, noise, noise - x if grid.kind == "flow" else noise

    x, noise, slope = parts(state[0], g.time_S, g.alpha_S, g.sigma_S)
    ahead = g.x_share_S * x + g.noise_share_S * noise  # z at the next α and σ

    def corrected(ahead):
        _, _, later = parts(ahead, g.mix_S[0], g.x_share_S, g.noise_share_S)
        return ahead + 0.5 * g.kept_S * (later - slope)  # half of the way along each

    # The last step stays Euler's: at σ = 0 there is no slope to average with.
    return (jax.lax.cond(g.again_S, corrected, lambda ahead: ahead, ahead),), x


def _none_before(z_BHWC, grid):
    # Nothing is remembered yet. What a first step mixes in of it has the weight 0.
    return z_BHWC, z_BHWC, (jnp.zeros_like(z_BHWC),) * (grid.mix_S.shape[1] - 1)


linear = Solver(_none_before, _linear)
multistep = Solver(lambda z_BHWC, grid: (z_BHWC, jnp.zeros_like(z_BHWC)), _multistep)
heun = Solver(lambda z_BHWC, grid: (z_BHWC,), _heun)
SOLVERS = {
    **dict.fromkeys(("ddim", "pndm", "euler", "euler_ancestral", "lcm", "ddpm"), linear),
    **{"dpmpp_2m": multistep, "heun": heun},
}
