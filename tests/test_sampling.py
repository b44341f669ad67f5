"""Solvers, guidance and what outputs mean, on fields whose answers are known."""

import fractions
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_jax.sampling import guidance, ode, prediction

SHIFTS = ("1/5", "2/5", "1/2", "3/4", "1", "1.1", "3/2", "3", "3.7", "6", "1/1000", "1000")
STEPS = (1, 2, 3, 5, 8, 12, 25, 50)


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


def exact_times(steps, shift):
    """The grid as fractions."""
    even = [fractions.Fraction(steps - i, steps) for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 300), shift=st.fractions("1/10000", 10000, max_denominator=10000))
def test_the_grid_is_the_published_one_and_its_ends_are_exact(steps, shift):
    exact, ours = exact_times(steps, shift), np.asarray(ode.times(steps, np.float32(shift)))
    assert ours[0] == 1
    assert ours[-1] == 0
    assert (np.diff(ours) <= 0).all()
    np.testing.assert_allclose(ours, np.array(exact, float), rtol=1e-6)


def pair(x_2BHWC, t_2B):
    """Velocities 2x − t under conditions, x/2 + t under null conditions, one behind the other."""
    conditioned = (jnp.arange(len(x_2BHWC)) % 2 == 0)[:, None, None, None]
    t = t_2B[:, None, None, None]
    return jnp.where(conditioned, 2 * x_2BHWC - t, x_2BHWC / 2 + t)


def alone(x_BHWC, t_B):
    return 2 * x_BHWC - t_B[:, None, None, None]


@functools.partial(jax.jit, static_argnames=("sampler", "steps"))
def drawn(x_BHWC, scale, interval, shift, *, sampler, steps):
    field = guidance.cfg(pair, alone, scale, interval)
    return ode.SOLVERS[sampler](field, x_BHWC, ode.times(steps, shift))


def reference(x, scale, interval, times, sampler):
    """The same in float64; the times are fractions, and compared as such with the interval."""

    def velocity(x, t):
        conditioned, null = 2 * x - float(t), x / 2 + float(t)
        guided = interval[0] <= t <= interval[1]
        return null + scale * (conditioned - null) if guided else conditioned

    for i, (t, after) in enumerate(itertools.pairwise(times)):
        v, dt = velocity(x, t), float(after - t)
        if sampler == "heun" and i < len(times) - 2:
            v = (v + velocity(x + dt * v, after)) / 2
        x = x + dt * v
    return x


@settings(max_examples=150, deadline=None)
@given(
    steps=st.sampled_from(STEPS[:-2]),
    shift=st.sampled_from(SHIFTS).map(fractions.Fraction),
    ends=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    sampler=st.sampled_from(sorted(ode.SOLVERS)),
    scale=st.sampled_from((0.0, 1.0, 1.5, 4.0)),
)
def test_guidance_acts_at_the_times_of_its_interval_with_its_ends(
    steps, shift, ends, sampler, scale
):
    """Every end is a time of the grid, so one step that counts wrongly moves the picture."""
    times = exact_times(steps, shift)
    interval = sorted(times[min(end, steps)] for end in ends)
    x = np.array([0.3, -0.8])
    ours = drawn(
        np.float32(x)[:, None, None, None],
        scale,
        tuple(map(float, interval)),
        float(shift),
        sampler=sampler,
        steps=steps,
    )
    expected = reference(x, scale, interval, times, sampler)
    np.testing.assert_allclose(np.ravel(ours), expected, rtol=2e-4, atol=1e-5)


@jax.jit
def acts(t, low, high):
    """Whether guidance acts: 3 where the conditioned velocity is 1 and the other 0."""
    pair = lambda x, t: (jnp.arange(2.0) == 0)[:, None, None, None] * jnp.ones_like(x)
    field = guidance.cfg(pair, lambda x, t: jnp.ones_like(x), 3.0, (low, high))
    return field(jnp.zeros((1, 1, 1, 1)), t).ravel()[0] == 3


@pytest.mark.parametrize("shift", SHIFTS)
def test_no_time_of_a_grid_falls_out_of_an_interval_that_ends_there(shift):
    both = jax.vmap(lambda t, end: (acts(t, end, 1.0), acts(t, 0.0, end), acts(t, 0.0, 1.0)))
    for steps in STEPS:
        ends = np.array([float(t) for t in exact_times(steps, fractions.Fraction(shift))])
        padded = lambda x: np.resize(np.float32(x), STEPS[-1] + 1)  # one program for all
        inside = both(padded(ode.times(steps, float(fractions.Fraction(shift)))), padded(ends))
        assert np.all(inside)
    assert not acts(0.5, 0.5001, 1.0)
    assert not acts(0.5, 0.0, 0.4999)


def test_guidance_is_the_published_combination_inside_the_interval_and_none_outside():
    def pair(x_2BHWC, t_2B):
        conditioned = jnp.arange(x_2BHWC.shape[0]) % 2 == 0
        return jnp.where(conditioned, 2.0, 1.0)[:, None, None, None] * jnp.ones_like(x_2BHWC)

    x = jnp.zeros((2, 1, 1, 1))
    field = guidance.cfg(pair, lambda x, t: jnp.full_like(x, 2.0), 3.0, (0.2, 0.7))
    assert field(x, 0.5).ravel().tolist() == [4.0, 4.0]  # 1 + 3·(2 − 1)
    assert field(x, 0.1).ravel().tolist() == [2.0, 2.0]
    assert field(x, 0.9).ravel().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("scale", "interval", "pairs", "singles"),
    [(3.0, guidance.ALWAYS, 1, 0), (1.0, guidance.ALWAYS, 0, 1), (3.0, (0.2, 0.7), 1, 1)],
)
def test_only_what_can_be_needed_is_in_the_program(scale, interval, pairs, singles):
    calls = {"pair": 0, "alone": 0}

    def count(name, x):
        calls[name] += 1
        return x

    field = guidance.cfg(
        lambda x, t: count("pair", x), lambda x, t: count("alone", x), scale, interval
    )
    jax.make_jaxpr(field)(jnp.zeros((2, 1, 1, 1)), 0.5)
    assert calls == {"pair": pairs, "alone": singles}


def test_a_traced_scale_of_one_is_no_guidance():
    """Even where the null condition's velocity is not finite."""
    field = lambda scale, interval: guidance.cfg(
        lambda x, t: x * jnp.nan, lambda x, t: x, scale, interval
    )(jnp.ones((1, 1, 1, 1)), 0.5)
    assert jax.jit(field)(1.0, (0.0, 1.0)) == 1
    assert np.isnan(jax.jit(field)(2.0, (0.0, 1.0)))


TIMES = (1.0, 1 - 2.0**-24, 0.5, 1e-2, 1e-3, 0.9e-3, 1e-4, 1e-6, 1e-9, 1e-12, 1e-20, 0.0)


@pytest.mark.parametrize("kind", prediction.KINDS)
@pytest.mark.parametrize("t", TIMES)
def test_a_step_to_the_data_ends_in_the_picture_that_a_perfect_network_sees(kind, t):
    """From any time at which a grid may have its last step; the output by float64."""
    rng = np.random.default_rng(0)
    x, noise = rng.uniform(-1, 1, (1, 4, 4, 3)), rng.normal(size=(1, 4, 4, 3))
    z, s = (1 - t) * x + t * noise, prediction.DATA_STD
    power = (1 - t) ** 2 * s**2 + t**2
    out = {
        "v": noise - x,
        "x": x,
        "edm": ((t - (1 - t) * s**2) / power * z - (noise - x)) * np.sqrt(power) / s,
    }[kind]
    at = np.array([t], np.float32)
    v = prediction.velocity(kind, np.float32(out), np.float32(z), at)
    assert np.isfinite(v).all()
    np.testing.assert_allclose(np.float32(z) - at * v, x, atol=2e-6)
    if t > 1e-3:
        np.testing.assert_allclose(v, noise - x, atol=2e-6 / t)


@pytest.mark.parametrize("kind", prediction.KINDS)
def test_velocities_and_their_gradients_are_finite_at_any_time(kind):
    """Also of a network that is wrong."""
    rng = np.random.default_rng(1)
    out, z = rng.normal(size=(2, len(TIMES), 2, 2, 3)).astype(np.float32)
    t = np.float32(TIMES)
    weight = np.square(np.minimum(t / 0.2, 1))[:, None, None, None]

    def loss(out):
        return (weight * jnp.square(prediction.velocity(kind, out, z, t))).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(out)).all()
