"""The flow objective: what its loss means, whatever the network puts out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes_flow
from t2i_jax import errors, losses, objective, pipeline, plugins, randomness
from t2i_jax.commands import plan
from t2i_jax.data import cache
from t2i_jax.models.types import Tokens
from t2i_jax.objectives import flow
from t2i_jax.sampling import prediction
from tests import runs


@pytest.fixture(scope="module")
def config():
    config = shapes_flow.get_config("debug")
    config.batch_size = 4
    return config


def batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = runs.abstract_batch(config)
    return {
        "image": rng.uniform(-1, 1, shapes["image"].shape).astype(np.float32),
        "text": Tokens(
            rng.integers(4, 200, shapes["text"].ids_BL.shape).astype(np.int32),
            np.arange(config.text_length)[None] < np.array([[3], [9], [1], [16]]),
        ),
        "index": np.arange(4, dtype=np.int32),
        "weight": np.ones(4, np.float32),
    }


@pytest.fixture(scope="module")
def made(config):
    """prediction -> (objective, nets, loss(nets, batch, key)); nets as after some training."""
    found = {}
    for kind in ("v", "x", "edm"):
        changed = config.copy_and_resolve_references()
        changed.loss.prediction = kind
        family = objective.make(changed)
        nets = jax.jit(family.init)(jax.random.key(0), batch(config))
        leaves, tree = jax.tree.flatten(nets["model"])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        nets = nets | {"model": jax.tree.unflatten(tree, moved)}
        loss = family.losses[0].fn
        found[kind] = family, nets, jax.jit(lambda n, b, k, f=loss: f(n, b, k, 0)[0])
    return found


def test_a_fresh_network_starts_at_a_loss_of_order_one(made, config):
    for kind in ("v", "edm"):
        family, _, loss = made[kind]
        nets = jax.jit(family.init)(jax.random.key(0), batch(config))
        assert 0.3 < loss(nets, batch(config), jax.random.key(2)) < 3


def test_cached_caption_states_give_the_encoders_loss(made, config):
    """To the rounding of float16."""
    family, nets, loss = made["v"]
    whole = batch(config)
    states = cache.arrays(family.predict["encode"](nets, whole))
    direct, cached = (float(loss(nets, b, jax.random.key(2))) for b in (whole, whole | states))
    assert direct == pytest.approx(cached, rel=1e-3)
    wrong = {name: 0 * x for name, x in states.items()}
    assert abs(direct / loss(nets, whole | wrong, jax.random.key(2)) - 1) > 3e-3  # they count


@pytest.mark.parametrize("prediction", ["v", "x", "edm"])
def test_an_example_of_weight_zero_counts_nothing(made, config, prediction):
    _, nets, loss = made[prediction]
    whole = batch(config)
    whole["weight"][2] = 0
    other = {**whole, "image": whole["image"].copy()}
    other["image"][2] = 0.3
    key = jax.random.key(3)
    assert loss(nets, whole, key) == loss(nets, other, key)


def test_the_preconditioned_velocity_is_that_of_the_denoised_picture():
    """(z − x̂)/t with x̂ = c_skip·z + c_out·F, as Karras et al. write it, at σ = t/(1 − t)."""
    for t in (0.01, 0.3, 0.7, 0.99):
        z, out, s = 0.4, -0.9, prediction.DATA_STD
        sigma = t / (1 - t)
        denoised = (
            s**2 / (sigma**2 + s**2) * (z / (1 - t)) + sigma * s / np.hypot(sigma, s) * out
        )  # Karras' x = z/(1 − t): table 1, column EDM
        ours = prediction._from_edm(jnp.float32(out), jnp.float32(z), jnp.float32(t))
        assert float(ours) == pytest.approx((z - denoised) / t, rel=2e-3)


def test_a_caption_dropped_for_certain_is_no_caption(config, made):
    """With text_dropout 1 the loss does not see the captions."""
    changed = config.copy_and_resolve_references()
    changed.loss.text_dropout = 1.0
    family = objective.make(changed)
    loss = jax.jit(lambda n, b: family.losses[0].fn(n, b, jax.random.key(0), 0)[0])
    nets, one, other = made["v"][1], batch(config), batch(config)
    other["text"] = other["text"]._replace(ids_BL=other["text"].ids_BL[::-1].copy())
    assert loss(nets, one) == loss(nets, other)
    assert made["v"][2](nets, one, jax.random.key(0)) != made["v"][2](
        nets, other, jax.random.key(0)
    )


def test_loss_at_fixed_times_sees_the_noise_level(made, config):
    family, nets, _ = made["edm"]
    values = jax.jit(family.predict["loss_at_times"])(nets, batch(config), jax.random.key(0))
    assert values.shape == (len(flow.HELD_OUT_TIMES),)
    assert np.isfinite(values).all()
    assert len(set(values.tolist())) == len(values)


def test_an_x_prediction_is_judged_by_the_picture_over_t_down_to_the_floor(made, config):
    family, nets, _ = made["x"]
    one, key = batch(config), jax.random.key(0)
    values = jax.jit(family.predict["loss_at_times"])(nets, one, key)
    noise = randomness.normal_each(randomness.per_example(key, one["index"]), (16, 16, 3))
    sizes = dict(config.model.model)
    model = plugins.load("models", sizes.pop("backbone")).Backbone(**sizes)
    cond = family.predict["encode"](nets, one)
    for t, value in zip(flow.HELD_OUT_TIMES[::4], values[::4], strict=True):
        z = (1 - t) * one["image"] + t * noise
        error = model.apply(nets["model"], z, jnp.full(4, t), cond) - one["image"]
        assert value == pytest.approx(np.square(error).mean() / max(t, 0.2) ** 2, rel=1e-3)


def test_guidance_of_one_ignores_the_null_and_a_negative_prompt_changes_the_rest(made, config):
    family, nets, _ = made["edm"]
    sample = jax.jit(family.predict["sample"], static_argnames=("steps", "sampler"))
    one = batch(config)
    negative = one | {"negative_text": one["text"]._replace(ids_BL=one["text"].ids_BL[::-1])}
    draw = lambda batch, guidance: sample(
        nets, batch, jax.random.key(0), guidance=guidance, steps=2, sampler="euler"
    )
    np.testing.assert_allclose(draw(one, 1.0), draw(negative, 1.0), atol=1e-5)
    assert np.abs(draw(one, 3.0) - draw(negative, 3.0)).max() > 1e-3


def test_without_guidance_the_null_condition_is_not_computed(config):
    """Scales share one program, but for 1; what is outside the interval takes another branch."""
    predictor = pipeline.Predictor(config)
    flops = lambda **options: plan.flops(predictor.trace("sample", **options).jaxpr)
    guided, plain = flops(guidance=3.0), flops(guidance=1.0)
    assert 0.45 * guided < plain < 0.55 * guided
    assert predictor.trace("sample", guidance=2.0).jaxpr.eqns
    assert predictor._compiled.cache_info().currsize == 2
    assert guided <= flops(interval=(0.2, 0.7)) < 1.1 * guided  # of branches the dearest counts
    flops(interval=(0.1, 0.3), guidance=4.0)
    assert predictor._compiled.cache_info().currsize == 3


def test_outside_the_interval_pictures_are_those_of_the_conditions_alone(made, config):
    """To the rounding of products of other sizes, whether the branch is taken in the program or
    the program has none.
    """
    family, nets, _ = made["v"]
    sample = jax.jit(family.predict["sample"], static_argnames=("steps", "sampler"))
    draw = functools.partial(sample, nets, batch(config), jax.random.key(0), steps=4)
    draw = functools.partial(draw, sampler="euler")
    plain = functools.partial(family.predict["sample"], guidance=1.0, steps=4, sampler="euler")
    plain = jax.jit(plain)
    alone = plain(nets, batch(config), jax.random.key(0))
    np.testing.assert_allclose(draw(guidance=4.0, interval=(0.3, 0.4)), alone, atol=2e-5)
    assert np.abs(draw(guidance=4.0, interval=(0.5, 0.5)) - alone).max() > 1e-3
    np.testing.assert_allclose(draw(guidance=1.0, interval=(0.0, 0.9)), alone, atol=2e-5)


def test_refining_by_nothing_keeps_pictures_and_wholly_draws_others(made, config):
    family, nets, _ = made["v"]
    one = batch(config)
    options = dict(guidance=2.0, steps=2, sampler="euler")
    predict = {
        name: jax.jit(functools.partial(family.predict[name], **options))
        for name in ("sample", "img2img")
    }
    img2img = lambda strength: predict["img2img"](nets, one, jax.random.key(0), strength=strength)
    np.testing.assert_allclose(img2img(0.0), one["image"], atol=1e-6)
    drawn = predict["sample"](nets, one, jax.random.key(0))
    np.testing.assert_allclose(img2img(1.0), drawn, atol=1e-5)
    far = lambda strength: np.abs(img2img(strength) - one["image"]).mean()
    assert 0 < far(0.1) < far(0.5)


def test_an_unknown_prediction_is_refused(config):
    changed = config.copy_and_resolve_references()
    changed.loss.prediction = "epsilon"
    with pytest.raises(errors.ConfigError, match="unknown prediction 'epsilon'"):
        objective.make(changed)


def test_an_interval_from_noise_to_image_is_refused(config):
    family = objective.make(config)
    predictor = pipeline.Predictor(config)
    with pytest.raises(errors.ConfigError, match="largest last"):
        predictor.check("sample", interval=(0.8, 0.2))
    assert family.predict


def test_keys_of_a_space_are_not_those_of_the_noise():
    keys = jax.random.split(jax.random.key(0), 3)
    apart = jax.random.key_data(randomness.fold_each(keys, 0))
    for part in (keys, *randomness.split_each(keys, 5)):
        assert not np.array_equal(apart, jax.random.key_data(part))


def test_the_zero_vector_stays_in_half_precision():
    assert np.array_equal(losses.unit(jnp.zeros((1, 4), jnp.float16)), np.zeros((1, 4)))
