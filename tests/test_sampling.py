"""Solvers and guidance, on fields whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.sampling import guidance, ode


def test_both_solvers_are_exact_where_the_velocity_is_constant():
    start = jnp.ones((2, 2, 2, 3))
    for solve in ode.SOLVERS.values():
        end = solve(lambda x, t: jnp.full_like(x, 0.5), start, ode.times(3))
        np.testing.assert_allclose(end, start - 0.5, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_step_shrinks_the_error_as_the_order_says(solver, order):
    """dx/dt = x·cos(3t) from t = 1 to 0 has a closed form."""
    exact = np.exp(-np.sin(3.0) / 3)

    def error(steps):
        end = ode.SOLVERS[solver](lambda x, t: x * jnp.cos(3 * t), jnp.ones(()), ode.times(steps))
        return abs(float(end) - exact)

    assert error(20) / error(40) == pytest.approx(2**order, rel=0.25)


def test_a_solver_calls_the_network_as_often_as_it_says():
    counts = {}
    for name, solve in ode.SOLVERS.items():
        calls = []
        with jax.disable_jit():
            solve(lambda x, t, calls=calls: calls.append(float(t)) or x, jnp.ones(()), ode.times(5))
        counts[name] = len(calls)
    assert counts == {"euler": 5, "heun": 9}


def test_times_run_from_noise_to_data_and_shift_towards_noise():
    even, shifted = ode.times(10), ode.times(10, 3.0)
    np.testing.assert_allclose(even, np.linspace(1, 0, 11), atol=1e-6)
    for ts in (even, shifted):
        assert ts[0] == 1
        assert ts[-1] == 0
        assert (np.diff(ts) < 0).all()
    assert (shifted[1:-1] > even[1:-1]).all()


def test_guidance_is_the_published_combination_inside_the_interval_and_none_outside():
    def velocity(x_2BHWC, t_2B):
        conditioned = jnp.arange(x_2BHWC.shape[0]) < x_2BHWC.shape[0] // 2
        return jnp.where(conditioned, 2.0, 1.0)[:, None, None, None] * jnp.ones_like(x_2BHWC)

    x = jnp.zeros((2, 1, 1, 1))
    field = guidance.cfg(velocity, 3.0, (0.2, 0.7))
    assert field(x, 0.5).ravel().tolist() == [4.0, 4.0]  # 1 + 3·(2 − 1)
    assert field(x, 0.1).ravel().tolist() == [2.0, 2.0]
    assert field(x, 0.9).ravel().tolist() == [2.0, 2.0]
