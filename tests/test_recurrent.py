"""The recurrent generator: what a strip depends on, its mixture, and editing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from configs import shapes_recurrent
from t2i_jax import errors, loop, losses, objective, pipeline
from t2i_jax.models import recurrent as nets_of
from t2i_jax.objectives import recurrent
from tests import runs, test_vae

SIDE, STRIP, CHOICES = 8, 2, 3
STEPS = SIDE // STRIP


def make_config(**changes):
    config = shapes_recurrent.get_config("debug")
    config.batch_size, config.res = test_vae.COUNT, SIDE
    config.model.model.update(choices=CHOICES, channels=4, strip=STRIP)
    for name, value in changes.items():
        config[name] = value
    return config


def batch(config, seed=0):
    hole = np.zeros((test_vae.COUNT, SIDE, SIDE, 1), bool)
    hole[:, 2:5, 1:6] = True
    return test_vae.batch(config, seed) | {"hole": hole}


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def family(config):
    return objective.make(config)


@pytest.fixture(scope="module")
def nets(config, family):
    return runs.filled(family.init, jax.random.key(0), batch(config))


@pytest.fixture(scope="module")
def loss(family):
    return jax.jit(functools.partial(family.losses[0].fn, step=0))


@pytest.fixture(scope="module")
def sample(family):
    return jax.jit(family.predict["sample"])


@pytest.fixture(scope="module")
def edit(family):
    return jax.jit(family.predict["edit"])


@pytest.fixture(scope="module")
def choices(config, family, nets):
    """(strips before, picture, what is open, caption states) -> logits and means in one array."""
    painter = nets_of.Painter(res=SIDE, **config.model.model)

    @jax.jit
    def run(before_BTP, given_BHWC, open_BHW1, cond):
        found = painter.apply(nets["model"], before_BTP, given_BHWC, open_BHW1, cond)
        out = (found.logits_BTK[..., None], found.log_scale_BTK[..., None], found.mean_BTKP)
        return jnp.concatenate(out, -1)

    return run


@pytest.fixture(scope="module")
def slopes(choices):
    """Step -> gradients of all that is said of that strip, to all that the painter is given."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(1, 2, 4), allow_int=True)
    def run(step, before_BTP, given_BHWC, open_BHW1, cond):
        out_BTKV = choices(before_BTP, given_BHWC, open_BHW1, cond)
        return (out_BTKV * jnp.cos(jnp.arange(out_BTKV.size)).reshape(out_BTKV.shape))[
            :, step
        ].sum()

    return run


def strips(image_BHWC):
    return np.asarray(image_BHWC).reshape(len(image_BHWC), STEPS, -1)


def before(image_BHWC):
    return np.concatenate([0 * strips(image_BHWC)[:, :1], strips(image_BHWC)[:, :-1]], 1)


# --- what a strip depends on ----------------------------------------------------------------------


def test_a_strip_sees_those_before_it_and_no_later_one(config, family, nets, slopes):
    one, everything = batch(config), np.ones((test_vae.COUNT, SIDE, SIDE, 1), bool)
    cond = family.predict["encode"](nets, one)
    for step in range(STEPS):
        to_before, to_given, to_cond = slopes(
            step, before(one["image"]), one["image"], everything, cond
        )
        reached = np.abs(to_before).max((0, 2)) > 0
        np.testing.assert_array_equal(reached, np.arange(STEPS) <= step)
        assert not np.abs(to_given).any()  # nothing is given
        words = np.abs(to_cond.seq_BLD).max(-1) > 0
        np.testing.assert_array_equal(words, np.asarray(cond.mask_BL))


def test_of_a_given_picture_all_is_read_but_what_is_open(config, family, nets, slopes):
    one = batch(config)
    cond = family.predict["encode"](nets, one)
    args = before(one["image"]), one["image"], one["hole"], cond
    reached = (
        sum(np.abs(slopes(step, *args)[1]).max(-1, keepdims=True) for step in range(STEPS)) > 0
    )
    np.testing.assert_array_equal(reached, ~one["hole"])


def test_another_caption_has_other_choices(config, family, nets, choices):
    one, everything = batch(config), np.ones((test_vae.COUNT, SIDE, SIDE, 1), bool)
    cond = family.predict["encode"](nets, one)
    other = family.predict["encode"](nets, batch(config, seed=1))
    found = [choices(before(one["image"]), one["image"], everything, c) for c in (cond, other)]
    assert (np.abs(found[0] - found[1]).max((1, 2, 3)) > 1e-3).all()


def test_a_drawn_strip_is_the_likeliest_choice_given_its_own_strips(
    config, family, nets, sample, choices
):
    """The painter's own picture, put through teacher forcing, has the choices it was made of."""
    one, everything = batch(config), np.ones((test_vae.COUNT, SIDE, SIDE, 1), bool)
    drawn = sample(nets, one, jax.random.key(0), temperature=0.0)
    cond = family.predict["encode"](nets, one)
    found = np.asarray(choices(before(drawn), one["image"], everything, cond))
    best = found[..., 0].argmax(-1)
    means = np.take_along_axis(found[..., 2:], best[..., None, None], 2)[:, :, 0]
    np.testing.assert_allclose(strips(drawn), np.clip(means, -1, 1), atol=1e-5)


@pytest.mark.parametrize("edited", [0.0, 1.0])
def test_what_is_open_costs_what_its_strips_do_given_those_before(config, nets, choices, edited):
    """Of a picture of which all is open, and of one that is given but for its hole."""
    family = objective.make(make_config(loss=dict(edited=edited, noise=0.0)))
    one = batch(config)
    open_ = one["hole"] if edited else np.ones_like(one["hole"])
    cond = family.predict["encode"](nets, one)
    out = choices(before(one["image"]), one["image"], open_, cond)
    found = nets_of.Choices(out[..., 0], out[..., 2:], out[..., 1])
    open_BTP = strips(np.broadcast_to(open_, one["image"].shape))
    log_p_BT = recurrent.mixture(found, strips(one["image"]), open_BTP)
    wanted = -log_p_BT.sum() / np.log(2) / open_BTP.sum()
    value = jax.jit(family.losses[0].fn)(nets, one, jax.random.key(0), 0)[0]
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    if not edited:
        bits = jax.jit(family.predict["bits"])(nets, one, jax.random.key(0))
        np.testing.assert_allclose(bits, [wanted], rtol=1e-5)


def test_noise_takes_each_choice_as_often_as_the_mixture_says(
    config, family, nets, sample, choices
):
    """Of the first strip, which has the same choices in every drawing."""
    one, draws = jax.tree.map(lambda x: x[[0] * 1024], batch(config)), 1024
    one["index"] = np.arange(draws, dtype=np.int32)
    drawn = strips(sample(nets, one, jax.random.key(0)))[:, 0]
    few = test_vae.take(batch(config), [0] * 4)
    everything = np.ones((4, SIDE, SIDE, 1), bool)
    args = 0 * before(few["image"]), few["image"], everything, family.predict["encode"](nets, few)
    found = np.asarray(choices(*args))[0, 0]
    apart = np.abs(drawn[:, None] - np.clip(found[:, 2:], -1, 1)).max(-1)
    assert (apart.min(1) < 1e-4).all()
    often = np.bincount(apart.argmin(1), minlength=CHOICES) / draws
    np.testing.assert_allclose(often, np.exp(log_softmax(found[:, 0])), atol=0.06)


# --- the mixture ----------------------------------------------------------------------------------


def test_the_mixture_is_one_of_whole_strips_and_counts_what_is_open():
    rng = np.random.default_rng(0)
    logits, mean = rng.normal(size=(2, 1, 3)), rng.uniform(-1, 1, (2, 1, 3, 5))
    log_scale = rng.normal(size=(2, 1, 3)) - 1
    values = np.float32(rng.integers(0, 256, (2, 1, 5)) / 127.5 - 1)
    open_ = np.array([[[1, 1, 0, 1, 0]], [[0, 0, 0, 0, 0]]], bool)
    each = np.asarray(losses.log_logistic(values[:, :, None], mean, log_scale[..., None]))
    wanted = logsumexp(log_softmax(logits, -1) + each[..., [0, 1, 3]].sum(-1), -1)
    choices = nets_of.Choices(*map(jnp.float32, (logits, mean, log_scale)))
    found = recurrent.mixture(choices, values, open_)
    assert found[0, 0] == pytest.approx(wanted[0, 0], rel=1e-5)
    assert found[1, 0] == pytest.approx(0, abs=1e-6)


# --- examples -------------------------------------------------------------------------------------


def test_an_example_of_weight_zero_counts_nothing(config, nets, loss):
    whole = batch(config)
    whole["weight"][2] = 0
    other = {**whole, "image": whole["image"].copy()}
    other["image"][2] = 1.0
    key = jax.random.key(3)
    value = loss(nets, whole, key)[0]
    assert value == loss(nets, other, key)[0]
    whole["weight"][2] = 1
    assert loss(nets, whole, key)[0] != value


def test_a_picture_and_its_loss_depend_on_their_own_example_alone(config, nets, loss, sample):
    whole, key = batch(config), jax.random.key(4)
    drawn, rows = sample(nets, whole, key), [2, 0, 3, 1]
    shuffled = sample(nets, test_vae.take(whole, rows), key)
    np.testing.assert_allclose(shuffled, drawn[np.array(rows)], atol=1e-5)
    alone = [loss(nets, test_vae.take(whole, [i] * 4), key)[0] for i in range(4)]
    assert loss(nets, whole, key)[0] == pytest.approx(np.mean(alone), rel=1e-5)


# --- editing --------------------------------------------------------------------------------------


def test_an_edit_keeps_what_it_is_given_and_paints_the_rest(config, nets, edit, sample):
    one, key = batch(config), jax.random.key(0)
    done = np.asarray(edit(nets, one, key, hole=(0.25, 0.5, 0.75, 1.0)))
    painted = np.zeros((SIDE, SIDE), bool)
    painted[2:6, 4:] = True
    np.testing.assert_array_equal((done != one["image"]).any((0, 3)), painted)
    np.testing.assert_array_equal(edit(nets, one, key, hole=(0.5, 0.5, 0.5, 1.0)), one["image"])
    whole = edit(nets, one, key, hole=(0.0, 0.0, 1.0, 1.0))
    np.testing.assert_allclose(whole, sample(nets, one, key), atol=1e-6)


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_on_one_batch_learn_it(config, family, nets):
    assert test_vae.learned(family, nets, batch(config), steps=10) > 0.1


@pytest.mark.slow
def test_a_run_resumes_and_edits(tmp_path):
    config = make_config(steps=3, save_every=3, log_every=1)
    loop.train(config, tmp_path)
    config.steps = 6
    loop.train(config, tmp_path)
    rows = runs.rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    pipe = pipeline.Pipeline.load(str(tmp_path))
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    examples = {"image": [picture], "caption": ["a red circle"]}
    done = pipe.draw("edit", examples, hole=(0.0, 0.0, 0.5, 1.0))
    assert done.shape == (1, SIDE, SIDE, 3)
    assert not done[:, SIDE // 2 :].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(strip=3), "strips of 3 rows"),
        (dict(choices=0), "choices is 0"),
        (dict(chioces=2), "did you mean 'choices'"),
    ],
)
def test_what_no_painter_can_be_is_said(changes, message):
    config = make_config()
    config.model.model.update(changes)
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(config)
