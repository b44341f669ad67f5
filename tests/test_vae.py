"""The variational autoencoder: its bits, its ladder of latents, and that the caption leads it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

from configs import shapes_vae
from t2i_jax import errors, loop, losses, objective, pipeline
from t2i_jax.models import vae
from t2i_jax.models.types import Tokens
from tests import runs

COUNT = 4  # examples of a batch
SIDE, GROUPS = 16, 2
VALUES = 3 * SIDE**2


def make_config(**changes):
    config = shapes_vae.get_config("debug")
    config.batch_size, config.res, config.model.model.depth = COUNT, SIDE, GROUPS
    for name, value in changes.items():
        config[name] = value
    return config


def batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = runs.abstract_batch(config)
    return {
        "image": np.float32(rng.integers(0, 256, shapes["image"].shape) / 127.5 - 1),
        "text": Tokens(
            rng.integers(4, 200, shapes["text"].ids_BL.shape).astype(np.int32),
            np.arange(config.text_length)[None] < np.array([[3], [9], [1], [16]]),
        ),
        "index": np.arange(COUNT, dtype=np.int32),
        "weight": np.ones(COUNT, np.float32),
    }


def take(batch, rows):
    return jax.tree.map(lambda x: x[np.array(rows)], batch)


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def family(config):
    return objective.make(config)


@pytest.fixture(scope="module")
def nets(config, family):
    """As after some training."""
    return runs.filled(family.init, jax.random.key(0), batch(config))


@pytest.fixture(scope="module")
def loss(family):
    return jax.jit(functools.partial(family.losses[0].fn, step=0))


@pytest.fixture(scope="module")
def sample(family):
    return jax.jit(family.predict["sample"])


# --- the likelihood -------------------------------------------------------------------------------


@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.5])
def test_the_chances_of_all_values_sum_to_one(log_scale):
    values = np.arange(256, dtype=np.float32) / 127.5 - 1
    for mean in (-1.3, -0.2, 0.999):
        chance = np.exp(losses.log_logistic(values, jnp.float32(mean), jnp.float32(log_scale)))
        assert chance.sum() == pytest.approx(1, abs=1e-4)
        wide = expit((values[1:-1, None] + np.array([1, -1]) / 255 - mean) / np.exp(log_scale))
        np.testing.assert_allclose(chance[1:-1], wide[:, 0] - wide[:, 1], atol=2e-5)


def test_a_far_value_and_a_narrow_scale_have_finite_gradients():
    far = jax.grad(lambda mean, scale: losses.log_logistic(1.0, mean, scale), (0, 1))
    assert np.isfinite(far(-1.0, -120.0)).all()  # float32 knows no such number
    assert far(-1.0, -2.0)[0] > 0  # towards the value


def test_psnr_is_that_of_the_peak_of_two():
    one = jnp.zeros((1, 2, 2, 3))
    assert losses.psnr(one, one + 0.2)[0] == pytest.approx(20, abs=1e-4)
    assert np.isfinite(losses.psnr(one, one)).all()


# --- the rate -------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_two_normals():
    rng = np.random.default_rng(0)
    mean, log_std, a, log_b = rng.normal(size=(4, 2, 3, 3, 5)).astype(np.float32)
    q_mean, q_std, p_std = mean + np.exp(log_std) * a, np.exp(log_std + log_b), np.exp(log_std)
    ratio = np.square(q_std / p_std)
    wanted = 0.5 * (ratio + np.square((q_mean - mean) / p_std) - 1 - np.log(ratio))
    np.testing.assert_allclose(vae.divergence(a, log_b), wanted.sum((1, 2, 3)), rtol=1e-5)
    assert not vae.divergence(0 * a, 0 * log_b).any()


def test_of_a_posterior_equal_to_its_prior_each_group_costs_its_free_bits(config, nets, loss):
    still = lambda path, x: 0 * x if "posterior" in jax.tree_util.keystr(path) else x
    equal = nets | {"model": jax.tree_util.tree_map_with_path(still, nets["model"])}
    value, aux = loss(equal, batch(config), jax.random.key(1))
    assert aux.metrics["rate"] == 0
    free = GROUPS * config.loss.free_bits
    assert free > 0
    assert float(value) == pytest.approx(float(aux.metrics["distortion"] + free) / VALUES, rel=1e-6)


def test_bits_beyond_the_free_ones_are_paid(config, nets, loss):
    value, aux = loss(nets, batch(config), jax.random.key(1))
    rate = float(aux.metrics["rate"])
    assert rate > 2 * GROUPS * config.loss.free_bits
    assert float(value) == pytest.approx((rate + float(aux.metrics["distortion"])) / VALUES)


def test_the_posterior_reads_the_picture_and_the_prior_does_not(config, family, nets, sample):
    one = batch(config)
    other = one | {"image": one["image"][::-1].copy()}
    bits = jax.jit(family.predict["reconstruct"])
    key = jax.random.key(0)
    assert np.abs(bits(nets, one, key) - bits(nets, other, key)).max() > 1e-3
    np.testing.assert_array_equal(sample(nets, one, key), sample(nets, other, key))


# --- examples -------------------------------------------------------------------------------------


def test_an_example_of_weight_zero_counts_nothing(config, nets, loss):
    whole = batch(config)
    whole["weight"][2] = 0
    other = {**whole, "image": whole["image"].copy()}
    other["image"][2] = 1.0
    key = jax.random.key(3)
    (value, aux), (same, same_aux) = loss(nets, whole, key), loss(nets, other, key)
    assert value == same
    assert aux.metrics == same_aux.metrics
    whole["weight"][2] = 1
    assert loss(nets, whole, key)[0] != value


def test_a_picture_and_its_loss_depend_on_their_own_example_alone(config, nets, loss, sample):
    whole, key = batch(config), jax.random.key(4)
    drawn = sample(nets, whole, key)
    rows = [2, 0, 3, 1]
    np.testing.assert_allclose(
        sample(nets, take(whole, rows), key), drawn[np.array(rows)], atol=1e-5
    )
    assert np.abs(drawn[0] - sample(nets, take(whole, [0] * 4), key)).max() < 1e-5
    alone = [loss(nets, take(whole, [i] * 4), key)[0] for i in range(4)]
    assert loss(nets, whole, key)[0] == pytest.approx(np.mean(alone), rel=1e-5)


# --- captions -------------------------------------------------------------------------------------


def test_another_caption_has_another_prior(config, nets, sample):
    """Without noise pictures are what the means of the prior make of captions."""
    one = batch(config)
    other = one | {"text": Tokens(one["text"].ids_BL[:, ::-1].copy(), one["text"].mask_BL)}
    still = functools.partial(sample, nets, temperature=0.0)
    mean = still(one, jax.random.key(0))
    np.testing.assert_array_equal(mean, still(one, jax.random.key(1)))
    assert (np.abs(mean - still(other, jax.random.key(0))).max((1, 2, 3)) > 1e-3).all()


def test_words_and_the_pooled_caption_move_the_prior_of_every_group(config, family, nets):
    """By gradients: of the picture that is drawn of the first latents' means."""
    cond = family.predict["encode"](nets, batch(config))
    ladder = vae.Ladder(res=SIDE, **config.model.model)
    noise = [jnp.ones((COUNT, *shape)) for shape in ladder.noise_shapes]
    image = jnp.asarray(batch(config)["image"])

    @jax.jit
    @jax.grad
    def slope(states, group):
        drawn = ladder.apply(nets["model"], noise, cond._replace(**states), image)
        return drawn.rate_BG[:, group].sum()

    states = {"seq_BLD": cond.seq_BLD, "pooled_BD": cond.pooled_BD}
    for group in range(len(noise)):
        found = jax.tree.map(np.abs, slope(states, group))
        assert all((x.reshape(COUNT, -1).max(1) > 0).all() for x in found.values())
        assert not found["seq_BLD"][~np.asarray(cond.mask_BL)].any()


def test_guidance_of_one_is_none_and_of_zero_forgets_the_caption(config, family, nets, sample):
    one, key = batch(config), jax.random.key(0)
    plain = sample(nets, one, key)  # 1.0 is a number there, and has no pairs
    guided = jax.jit(lambda scale: family.predict["sample"](nets, one, key, guidance=scale))
    drawn = jax.jit(functools.partial(family.predict["sample"], guidance=1.0))(nets, one, key)
    np.testing.assert_array_equal(plain, drawn)
    np.testing.assert_allclose(guided(1.0), plain, atol=1e-4)
    assert np.abs(guided(4.0) - plain).max() > 1e-3
    mean, std = jax.random.normal(key, (2, 4, 1, 1, 2))
    found, stds = vae.guided(mean, std, 0.0)
    np.testing.assert_allclose(found, mean[np.array([1, 1, 3, 3])])
    np.testing.assert_allclose(stds, std[np.array([0, 0, 2, 2])])


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_on_one_batch_learn_it(config, family, nets):
    assert learned(family, nets, batch(config), steps=10) > 0.1


def learned(family, nets, one, steps):
    """How many bits the loss of a batch falls by, in steps of Adam."""
    adam = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        of = lambda p: family.losses[0].fn(nets | {"model": p}, one, jax.random.key(0), 0)[0]
        value, slope = jax.value_and_grad(of)(params)
        updates, state = adam.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    params, values = nets["model"], []
    state = adam.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return values[0] - values[-1]


@pytest.mark.slow
def test_a_run_resumes_draws_and_is_judged_by_its_bits(tmp_path):
    config = make_config(steps=3, save_every=3, log_every=1)
    config.optim = dict(model=dict(name="adamw", learning_rate=1e-3))  # compiles faster than Muon
    loop.train(config, tmp_path)
    config.steps = 6
    loop.train(config, tmp_path)
    rows = runs.rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["model/rate"] == 0  # a new posterior is the prior
    pipe = pipeline.Pipeline.load(str(tmp_path))
    assert pipe("a red circle").shape == (1, SIDE, SIDE, 3)
    held_out = dict(prediction="bits", num_images=4, batch_size=4)
    assert 1 < pipe.evaluate("held_out_loss", **held_out)["mean"] < 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(res=8), "res is 8"),
        (dict(model=dict(model=dict(width=10, heads=4))), "no multiple of heads"),
        (dict(model=dict(ladder={})), "did you mean 'model'|unknown net"),
        (dict(loss=dict(free_bits=-1.0)), "0 or more"),
        (dict(loss=dict(freebits=1.0)), "did you mean 'free_bits'"),
    ],
)
def test_what_no_ladder_can_be_is_said(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(make_config(**changes))
