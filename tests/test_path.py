"""Paths and spaces: what a flow model walks on, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes_flow
from t2i_jax import errors, objective, pipeline, space
from t2i_jax.objectives import flow
from t2i_jax.sampling import ode, path
from tests import runs


@pytest.fixture(params=path.SCHEDULES)
def schedule(request):
    return path.make(request.param)


def test_shares_of_a_discrete_path_are_those_of_its_betas():
    """In float64 by products, as Ho et al. write them; of known schedules the ends by hand."""
    for name, last in (("linear", 0.00635288), ("scaled_linear", 0.06826472)):
        ours = path.make(name)
        kept = np.prod(1 - path.SCHEDULES[name]())
        np.testing.assert_allclose(ours.alpha(1.0), np.sqrt(kept), rtol=1e-6)
        np.testing.assert_allclose(ours.alpha(1.0), last, rtol=1e-4)
        assert float(ours.alpha(0.0)) == 1
        assert float(ours.sigma(0.0)) == 0


def test_image_and_noise_keep_the_power_of_unit_variance(schedule):
    t = jnp.linspace(0, 1, 1001)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, atol=1e-6)
    assert np.all(np.diff(schedule.clock(t)) > 0)


def test_training_times_are_uniform_over_the_steps(schedule):
    t = np.asarray(schedule.draw(jax.random.normal(jax.random.key(0), (100_000,))))
    steps = np.round(t * path.STEPS).astype(int)
    np.testing.assert_allclose(steps, t * path.STEPS, atol=1e-3)
    assert steps.min() == 1
    assert steps.max() == path.STEPS
    share = np.bincount((steps - 1) * 10 // path.STEPS, minlength=10) / len(t)
    np.testing.assert_allclose(share, 0.1, atol=0.005)


@pytest.mark.parametrize("kind", ["eps", "v", "x"])
@pytest.mark.parametrize("t", [0.001, 0.25, 0.999])
def test_a_perfect_network_has_no_error_and_its_noise_is_the_noise(schedule, kind, t):
    rng = np.random.default_rng(0)
    x, noise = rng.uniform(-1, 1, (2, 2, 4, 4, 3))
    at = jnp.full(2, t)
    z = schedule.mix(x, noise, at)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    out = {"eps": noise, "v": alpha * noise - sigma * x, "x": x}[kind]
    np.testing.assert_allclose(schedule.error(kind, out, z, x, noise, at), 0, atol=1e-10)
    np.testing.assert_allclose(schedule.velocity(kind, out, z, at), noise, atol=2e-6 / sigma)
    assert np.all(schedule.error(kind, out + 0.5, z, x, noise, at) > 0.2)


@pytest.mark.parametrize("sampler", ode.SOLVERS)
@pytest.mark.parametrize("name", path.NAMES)
def test_a_solver_brings_noise_to_the_variance_of_the_data(name, sampler):
    """Of normal data with a standard deviation s the best guess, and so the flow, are known:
    E[x | z] = α s² z/(α² s² + σ²), and z of unit noise ends as s times that noise.
    """
    ours, s = path.make(name), 0.5
    kind = "v" if name == "straight" else "eps"

    def velocity(state, t):
        z = ours.of_state(state, t)
        a, b = ours.alpha(t), ours.sigma(t)
        x = a * s**2 * z / (a**2 * s**2 + b**2)
        noise = b * z / (a**2 * s**2 + b**2)
        out = noise - x if kind == "v" else noise
        return ours.velocity(kind, out, z, jnp.full(1, t))

    noise = jnp.array([1.0, -2.0, 0.3]).reshape(1, 1, 1, 3)
    start = ours.mix(0 * noise, noise * jnp.hypot(ours.alpha(1.0) * s / ours.sigma(1.0), 1), 1.0)
    ts = ode.times(200)
    drawn = ode.SOLVERS[sampler](velocity, ours.state(start, ts[0]), ts, ours.clock)
    np.testing.assert_allclose(drawn, s * noise, rtol=0.05)


def test_ends_of_a_path_are_the_image_and_the_noise():
    x, noise = np.full((2, 4, 4, 3), 0.5, np.float32), np.full((2, 4, 4, 3), -2.0, np.float32)
    for name in path.NAMES:
        ours = path.make(name)
        assert np.array_equal(ours.mix(x, noise, jnp.zeros(2)), x)
        assert np.array_equal(ours.of_state(ours.state(x, 0.0), 0.0), x)
        np.testing.assert_allclose(ours.mix(x, noise, 1.0), noise, atol=0.2)


def haar(x_BHWC):
    """The four bands of each block of 2 × 2 pixels, an orthonormal map."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return (x.reshape(b, h // 2, w // 2, c, 4) @ BANDS).reshape(b, h // 2, w // 2, 4 * c)


def back(y_BHWC):
    b, h, w, c = y_BHWC.shape
    x = y_BHWC.reshape(b, h, w, c // 4, 4) @ BANDS.T
    x = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


BANDS = jnp.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2.0


@pytest.fixture
def config():
    config = shapes_flow.get_config("debug")
    config.batch_size = 2
    return config


@pytest.mark.slow
def test_a_flow_model_works_in_another_space_and_on_another_path(config):
    """Bands of a transform scaled by a frozen net, with a discrete schedule, and no edit of flow:
    what a network that knows the noise would draw is the image itself.
    """
    toy = space.Space(
        shape=(config.res // 2, config.res // 2, 12),
        encode=lambda nets, batch, keys_B: nets["vae"]["params"]["scale"] * haar(batch["image"]),
        decode=lambda nets, y: back(y / nets["vae"]["params"]["scale"]),
        init={"vae": lambda key, batch: {"params": {"scale": jnp.float32(0.5)}}},
    )
    config.loss = dict(path="cosine", prediction="eps")
    family = flow.make(config, toy)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), runs.abstract_batch(config))
    image = jax.random.uniform(jax.random.key(1), zeros["image"].shape, minval=-1)
    batch = zeros | {"image": image, "index": jnp.arange(2), "weight": jnp.ones(2)}
    nets = jax.jit(family.init)(jax.random.key(0), batch)
    assert set(nets) == {"model", "text", "vae"}
    assert family.trained == ("model",)
    value, _ = jax.jit(family.losses[0].fn)(nets, batch, jax.random.key(2), 0)
    assert 0.8 < float(value) < 1.2  # a fresh network says 0, and the noise has unit variance
    options = dict(strength=jnp.float32(0.0), guidance=1.0, steps=2)
    same = family.predict["img2img"](nets, batch, jax.random.key(3), **options)
    np.testing.assert_allclose(same, image, atol=1e-5)
    drawn = family.predict["sample"](nets, batch, jax.random.key(3), guidance=1.0, steps=2)
    assert drawn.shape == image.shape


def test_a_discrete_path_trains_and_draws_by_config_alone(config):
    config.loss = dict(path="scaled_linear", prediction="v")
    predictor = pipeline.Predictor(config)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), runs.abstract_batch(config))
    nets = jax.jit(predictor.objective.init)(jax.random.key(0), zeros)
    assert predictor.sample(nets, ["a red circle"], steps=2).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("loss", "fix"),
    [
        (dict(path="strait"), "straight"),
        (dict(path="cosine", prediction="edm"), "eps"),
        (dict(prediction="eps"), "v"),
    ],
)
def test_a_path_has_its_own_kinds(config, loss, fix):
    config.loss = loss
    with pytest.raises(errors.ConfigError, match=fix):
        objective.make(config)


@pytest.mark.parametrize("kind", ["v", "eps", "x"])
def test_few_steps_draw_the_variance_of_the_data(schedule, kind):
    """With the default sampler, and a network that is off by a hundredth."""
    rng, s = np.random.default_rng(0), 0.5
    noise = jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32)
    off = jnp.asarray(0.01 * rng.standard_normal(noise.shape), jnp.float32)

    def velocity(state, t):
        z, a, b = schedule.of_state(state, t), schedule.alpha(t), schedule.sigma(t)
        x, eps = (y * z / (a**2 * s**2 + b**2) for y in (a * s**2, b))
        out = {"x": x, "eps": eps, "v": a * eps - b * x}[kind] + off
        return schedule.velocity(kind, out, z, jnp.full(1, t))

    ts = jnp.minimum(ode.times(12), schedule.latest)
    drawn = ode.heun(velocity, schedule.state(noise, ts[0]), ts, schedule.clock)
    assert 0.4 < float(drawn.std()) < 0.6


def test_a_predicted_image_has_no_noise_at_step_0(schedule):
    z = jnp.ones((1, 2, 2, 3))
    assert np.all(schedule.velocity("x", 2 * z, z, jnp.zeros(1)) == 0)
