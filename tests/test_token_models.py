"""Token models: what a code sees, how it is drawn, and which codes stay as they were given."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from configs import shapes_ar, shapes_masked
from t2i_jax import errors, loop, losses, objective, pipeline, randomness, weights
from t2i_jax.data import cache
from t2i_jax.models.types import Tokens
from t2i_jax.objectives import ar, masked
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import tokens
from tests import runs, test_conditioning
from tests import test_text_families as families

CONFIGS = {
    "across": functools.partial(shapes_ar.get_config, "debug"),
    "joint": functools.partial(shapes_ar.get_config, "debug,joint"),
    "masked": functools.partial(shapes_masked.get_config, "debug"),
}
WRITERS = ("across", "joint")
JOINT = pytest.param("joint", marks=pytest.mark.slow)
GREEDY = dict(guidance=1.0, temperature=0.0, top_k=0, top_p=1.0)
KEY = jax.random.key(0)


class Made(NamedTuple):
    """A family whose predictions of pictures give their codes, nets as after some training, and a
    batch with what frozen nets make of it.
    """

    family: object
    nets: dict
    batch: dict

    @property
    def code_BN(self):
        return self.batch["codes"].reshape(3, -1)

    @property
    def row_BN(self):
        """The batch's codes behind the start."""
        return np.asarray(self.family._row(self.batch["codes"]))

    def logits(self, row_BN, **changed):
        """Of all codes at once, each after those before it."""
        return np.asarray(_logits(self.family)(self.nets, self.batch | changed, row_BN))

    def draw(self, batch, scale, seed=0):
        """Codes by one program for all guidance scales but the number 1."""
        static = None if isinstance(scale, jax.Array) else scale
        program = _drawing(self.family, static)
        return np.asarray(program(self.nets, batch, jax.random.key(seed), scale))


@functools.cache
def _logits(family):
    return jax.jit(lambda nets, batch, row: family.form.logits(nets, batch, row[:, :-1])[0])


@functools.cache
def _drawing(family, static):
    own = dict(steps=4) if isinstance(family, masked.Masked) else dict(top_k=50, top_p=0.9)
    draw = functools.partial(family.sample, **own)
    return jax.jit(lambda *given: draw(*given[:3], guidance=static or given[3]))


def config(name, **changes):
    config = CONFIGS[name]()
    config.batch_size = 3
    if name != "masked":
        (config.model.text if name == "joint" else config.model.model).depth = 2
    for key, value in changes.items():
        config[key] = value
    return config


def batch(config):
    rng = np.random.default_rng(0)
    shapes = runs.abstract_batch(config)
    return {
        "image": rng.uniform(-1, 1, shapes["image"].shape).astype(np.float32),
        "text": Tokens(
            rng.integers(4, 200, shapes["text"].ids_BL.shape).astype(np.int32),
            np.arange(config.text_length)[None] < np.array([[3], [9], [16]]),
        ),
        "index": np.arange(3, dtype=np.int32),
        "weight": np.ones(3, np.float32),
    }


@functools.cache
def made(name):
    """The `Made` of one of CONFIGS."""
    ours = config(name)
    family = (masked.Masked if name == "masked" else ar.Autoregressive)(ours)
    given = batch(ours)
    nets = runs.filled(family.init, KEY, given)
    # Embeddings that are filled at random differ too little.
    larger = lambda path, x: x * 8 if "embedding" in str(path[-1]) else x
    nets = jax.tree_util.tree_map_with_path(larger, nets)

    encode = family.text.encode if name == "masked" else family.form.predict.get("encode")

    @jax.jit
    def frozen(nets, batch):
        states = cache.arrays(encode(nets, batch)) if encode else {}
        return states | family.codes(nets, batch, KEY)

    given |= frozen(nets, given)
    family.space = family.space._replace(decode=lambda nets, code_Bhw: code_Bhw)
    return Made(family, nets, given)


# --- what a code sees -----------------------------------------------------------------------------


def slopes(one, number_of_N):
    """How each of N numbers depends on the embedding of each place.   -> NN"""

    def numbers(place_ND):
        codes = one.nets["model"]["params"]
        where = codes.get("codes", codes)
        params = {**where, "place": {"value": place_ND}}
        params = {**codes, "codes": params} if "codes" in codes else params
        return number_of_N({**one.nets, "model": {"params": params}})

    codes = one.nets["model"]["params"]
    place_ND = codes.get("codes", codes)["place"]["value"]
    return np.abs(jax.jit(jax.jacrev(numbers))(place_ND)).max(-1)


@pytest.mark.parametrize("name", ["across", JOINT])
def test_a_code_depends_on_no_later_place(name):
    one = made(name)
    read_BN = one.row_BN[:, :-1]

    def numbers(nets):
        logits_BNK, _ = one.family.form.logits(nets, one.batch, read_BN)
        return jnp.square(logits_BNK).mean((0, 2))

    found_NN = slopes(one, numbers)
    np.testing.assert_array_equal(found_NN > 0, np.tri(len(found_NN), dtype=bool))


def test_a_masked_code_depends_on_every_place():
    one = made("masked")
    cond = one.family.text.encode(one.nets, one.batch)

    def numbers(nets):
        logits_BNK = one.family.model.apply(nets["model"], one.code_BN, cond)
        return jnp.square(logits_BNK).mean((0, 2))

    assert (slopes(one, numbers) > 0).all()


def test_a_caption_does_not_depend_on_the_picture_and_the_picture_on_it():
    one = made("joint")
    read_BN = one.row_BN[:, :-1]

    def of(part, nets):
        logits_BNK, parts = one.family.form.logits(nets, one.batch, read_BN)
        return parts["text"].sum() if part == "text" else jnp.square(logits_BNK).mean()

    for part, moved in (("text", False), ("image", True)):
        slope = jax.jit(jax.grad(functools.partial(of, part)))(one.nets)
        flat = lambda net: np.concatenate([np.ravel(x) for x in jax.tree.leaves(net)])
        assert np.abs(flat(slope["text"]["params"]["word"])).max() > 0  # both read the caption
        assert (np.abs(flat(slope["model"])).max() > 0) == moved


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_cached_writing_equals_the_whole_row_at_once(name, monkeypatch):
    """With guidance, so that the rows of the null condition are compared as well."""
    one = made(name)
    row_BN, count = one.row_BN, one.code_BN.shape[1]

    @jax.jit
    def step_by_step(nets, batch):
        cache, extend = one.family.form.begin(nets, batch, True)
        rows_RN = guide.interleave(row_BN, row_BN)

        def step(cache, i):
            code_R1 = jax.lax.dynamic_slice_in_dim(rows_RN, i, 1, axis=1)
            logits_R1K, cache = extend(code_R1, i, cache)
            return cache, logits_R1K[:, 0]

        _, logits_NRK = jax.lax.scan(step, tokens.longer(cache, count), jnp.arange(count))
        return logits_NRK.swapaxes(0, 1)

    found_RNK = np.asarray(step_by_step(one.nets, one.batch))
    ids_BL, mask_BL = one.batch["text"]
    null = Tokens(ids_BL, np.zeros_like(mask_BL))
    for i, text in enumerate((one.batch["text"], null)):
        wanted_BNK = one.logits(row_BN, text=text)
        np.testing.assert_allclose(found_RNK[i::2], wanted_BNK, atol=1e-5, rtol=0)
    assert np.abs(found_RNK[::2] - found_RNK[1::2]).max() > 0.01  # the caption counts

    monkeypatch.setattr(tokens, "PART", 5)  # the cache grows on the way
    write = jax.jit(functools.partial(one.family.written, **GREEDY))
    written_BN = write(one.nets, one.batch, KEY, row_BN[:, :1]).reshape(3, -1)
    whole_BN = np.concatenate([row_BN[:, :1], written_BN], 1)
    np.testing.assert_array_equal(written_BN, one.logits(whole_BN).argmax(-1))
    assert len(np.unique(written_BN)) > 3  # not one code for ever


@pytest.mark.parametrize("name", ["across", JOINT, "masked"])
def test_a_pictures_codes_depend_on_its_own_number_alone(name):
    one, scale = made(name), jnp.float32(2)
    ours = away(one, one.batch["text"])
    together = one.draw(ours, scale)
    own = {key: ours[key] for key in ours if key not in ("index", "image")}
    other = jax.tree.map(lambda x: x[np.array([2, 2])], own) | {"index": np.array([2, 5])}
    twice = one.draw(other, scale)
    np.testing.assert_array_equal(twice[0], together[2])
    assert (twice[1] != twice[0]).any()
    assert (one.draw(ours, scale, seed=1) != together).any()


@pytest.mark.parametrize("name", ["across", JOINT, "masked"])
def test_guidance_of_one_is_none_and_more_leads_away_from_the_negative(name):
    one = made(name)
    ids_BL, mask_BL = one.batch["text"]
    other = away(one, Tokens(ids_BL[::-1].copy(), mask_BL))
    alone = one.draw(other, 1.0)
    np.testing.assert_array_equal(one.draw(other, jnp.float32(1)), alone)
    assert (one.draw(other, jnp.float32(5)) != alone).any()


def away(one, negative):
    """A batch to be guided away from other captions."""
    return one.batch | {"negative_text": negative}


@pytest.mark.parametrize("name", ["across", JOINT])
def test_a_completion_keeps_the_top_rows_and_goes_on_from_them(name):
    one = made(name)
    given_Bhw = np.asarray(one.batch["codes"])
    complete = functools.partial(one.family.complete, **GREEDY)
    found_Bhw = np.asarray(jax.jit(functools.partial(complete, rows=2))(one.nets, one.batch, KEY))
    np.testing.assert_array_equal(found_Bhw[:, :2], given_Bhw[:, :2])
    likeliest_BN = one.logits(one.family._row(found_Bhw)).argmax(-1)
    np.testing.assert_array_equal(found_Bhw[:, 2:].reshape(3, -1), likeliest_BN[:, 8:])
    assert (found_Bhw[:, 2:] != given_Bhw[:, 2:]).any()
    whole = jax.jit(functools.partial(complete, rows=4))(one.nets, one.batch, KEY)
    np.testing.assert_array_equal(whole, given_Bhw)
    with pytest.raises(errors.ConfigError, match="rows is 5, and a picture has 4"):
        complete(one.nets, one.batch, KEY, rows=5)


def test_only_likely_tokens_are_drawn_as_often_as_they_are_likely():
    share = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    logits = np.log(share)[None]
    kept = lambda k, p: np.isfinite(tokens.likely(jnp.asarray(logits), k, p))[0].tolist()
    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(9, 1.0) == [True] * 4
    assert kept(0, 0.65) == [True, True, False, False]  # .4 falls short of it, .4 + .3 does not
    assert kept(0, 0.75) == [True, True, True, False]
    assert kept(0, 0.0) == [True, False, False, False]
    # Of the two likeliest alone the first has .4 / .7 = .57.
    assert kept(2, 0.5) == [True, False, False, False]
    assert kept(2, jnp.float32(0.6)) == [True, True, False, False]
    keys = jax.random.split(KEY, 4000)
    rows = jnp.repeat(jnp.asarray(logits), len(keys), 0)
    often = lambda **how: np.bincount(tokens.draw(rows, keys, **how), minlength=4) / len(keys)
    np.testing.assert_allclose(often(), share, atol=0.03)
    np.testing.assert_allclose(often(temperature=0.5), softmax(2 * logits[0]), atol=0.03)
    np.testing.assert_allclose(often(top_k=2), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    near = jnp.tile(jnp.array([0.0, 1e-6]), (len(keys), 1))
    assert (tokens.draw(near, keys, temperature=0.0) == 1).all()  # whatever the noise


# --- the losses -----------------------------------------------------------------------------------


def cross_entropy(logits, wanted):
    return -np.take_along_axis(log_softmax(logits, -1), wanted[..., None], -1)[..., 0]


def test_cross_entropy_is_its_formula_with_a_smooth_target():
    rng = np.random.default_rng(0)
    logits, wanted = rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    np.testing.assert_allclose(
        losses.cross_entropy(logits, wanted), cross_entropy(logits, wanted), rtol=1e-5
    )
    target = 0.8 * np.eye(5)[wanted] + 0.2 / 5
    np.testing.assert_allclose(
        losses.cross_entropy(logits, wanted, 0.2),
        -(target * log_softmax(logits, -1)).sum(-1),
        rtol=1e-5,
    )


def test_the_joint_loss_is_the_weighted_sum_of_its_parts():
    one = made("joint")
    family = ar.Autoregressive(config("joint", loss=dict(text_dropout=0.0, joint=(0.3, 2.0))))
    loss = jax.jit(lambda batch: family.loss(one.nets, batch, KEY, 0))
    value, aux = loss(one.batch)
    image = cross_entropy(one.logits(one.row_BN), one.code_BN).mean(1)
    ids_BL, mask_BL = one.batch["text"]
    # The language model alone, which knows of no picture.
    speaker, variables = family.form.speaker, one.nets["text"]
    states_BLD = speaker.apply(variables, ids_BL, mask_BL, method="states")[-1]
    logits_BLV = speaker.apply(variables, states_BLD, method="speak")
    each_BL = cross_entropy(np.asarray(logits_BLV)[:, :-1], ids_BL[:, 1:])
    text = (each_BL * mask_BL[:, 1:]).sum(1) / mask_BL[:, 1:].sum(1)
    assert aux.metrics["text"] == pytest.approx(text.mean(), rel=1e-5)
    assert aux.metrics["image"] == pytest.approx(image.mean(), rel=1e-5)
    assert value == pytest.approx(0.3 * text.mean() + 2.0 * image.mean(), rel=1e-5)
    lighter = loss(one.batch | {"weight": np.array([1, 0, 1], np.float32)})[1].metrics
    assert lighter["text"] == pytest.approx(text[[0, 2]].mean(), rel=1e-5)
    assert lighter["image"] == pytest.approx(image[[0, 2]].mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["across", JOINT, "masked"])
def test_a_caption_dropped_for_certain_is_no_caption(name):
    one = made(name)
    ours = config(name)
    ours.loss.text_dropout = 1.0
    (loss,) = objective.make(ours).losses
    value = jax.jit(lambda batch: loss.fn(one.nets, batch, KEY, 0)[0])
    ids_BL, mask_BL = one.batch["text"]
    other = one.batch | {"text": Tokens(ids_BL[::-1].copy(), mask_BL[::-1].copy())}
    assert value(one.batch) == value(other)
    sees = jax.jit(lambda batch: one.family.loss(one.nets, batch, KEY, 0)[0])
    assert sees(one.batch) != sees(other)


@pytest.mark.parametrize("name", WRITERS)
def test_the_held_out_loss_is_of_each_row_of_codes(name):
    one = made(name)
    value_BN = cross_entropy(one.logits(one.row_BN), one.code_BN)
    found = jax.jit(one.family.loss_by_row)(one.nets, one.batch, KEY)
    np.testing.assert_allclose(found, value_BN.reshape(3, 4, 4).mean((0, 2)), rtol=1e-5)


def test_the_masked_loss_is_that_of_hidden_codes_as_many_as_the_cosine_says():
    one = made("masked")
    family, row_BN = one.family, np.asarray(one.code_BN)
    cond = family.text.encode(one.nets, one.batch)
    score_BN = np.random.default_rng(0).uniform(size=row_BN.shape)
    t_B = np.array([0.0, 0.4, 1.0], np.float32)
    at = jax.jit(lambda score_BN: family.loss_at(one.nets, row_BN, cond, score_BN, t_B))
    many = [1, 10, 16]  # of 16: one at least, ⌈16·cos(.6·π/2)⌉, all
    hidden_BN = np.argsort(np.argsort(score_BN)) < np.array(many)[:, None]
    seen_BN = np.where(hidden_BN, family.hidden, row_BN)
    logits_BNK = np.asarray(family.model.apply(one.nets["model"], seen_BN, cond))
    smooth = 0.9 * cross_entropy(logits_BNK, row_BN) - 0.1 * log_softmax(logits_BNK, -1).mean(-1)
    wanted = [row[hidden].mean() for row, hidden in zip(smooth, hidden_BN, strict=True)]
    np.testing.assert_allclose(at(score_BN), wanted, rtol=1e-5)
    times = jax.jit(family.loss_at_times)(one.nets, one.batch, KEY)
    assert times.shape == (8,)
    score_BN = family._scores(randomness.per_example(KEY, one.batch["index"]))
    t_B = np.full(3, masked.HELD_OUT_TIMES[2], np.float32)
    at = family.loss_at(one.nets, row_BN, cond, score_BN, t_B)
    assert times[2] == pytest.approx(float(at.mean()), rel=1e-5)


# --- guessing -------------------------------------------------------------------------------------


def test_guessing_never_changes_given_codes_and_leaves_none_hidden():
    one = made("masked")
    family, row_BN = one.family, np.asarray(one.code_BN)
    open_BN = np.random.default_rng(1).uniform(size=row_BN.shape) < np.array([[0.5], [0], [1]])
    assert [*open_BN.sum(1)][1:] == [0, 16]
    guess = jax.jit(functools.partial(family.guessed, guidance=2.0, steps=3, temperature=4.5))
    found_BN = np.asarray(guess(one.nets, one.batch, KEY, row_BN, open_BN))
    np.testing.assert_array_equal(found_BN[~open_BN], row_BN[~open_BN])
    assert (found_BN[open_BN] < family.hidden).all()
    assert (found_BN[open_BN] != row_BN[open_BN]).mean() > 0.9
    # What lies below the hole decides about nothing.
    other_BN = np.where(open_BN, (row_BN + 7) % family.hidden, row_BN)
    np.testing.assert_array_equal(guess(one.nets, one.batch, KEY, other_BN, open_BN), found_BN)


def test_each_pass_keeps_as_many_codes_as_the_cosine_says_the_surest_first():
    """A network that is sure of codes in their order, and no noise on that."""
    one = made("masked")
    family, count, seen = one.family, 16, []

    class Sure:
        def apply(self, variables, *args, method=None):
            if method:
                return None
            seen_BN, _cond, _prepared = args
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), seen_BN)
            sure_N = 14 + 0.4 * jnp.arange(count, dtype=jnp.float32)[::-1]
            return jnp.zeros((*seen_BN.shape, family.hidden)).at[:, :, 5].set(sure_N)

    theirs, family.model = family.model, Sure()
    try:
        blank_BN = np.zeros((3, count), np.int32)
        how = dict(guidance=1.0, steps=4, temperature=0.0)
        every_BN = np.ones(blank_BN.shape, bool)
        found_BN = family.guessed(one.nets, one.batch, KEY, blank_BN, every_BN, **how)
        jax.effects_barrier()
    finally:
        family.model = theirs
    assert (np.asarray(found_BN) == 5).all()
    hidden = [(x == family.hidden)[0] for x in seen]
    # ⌊16·cos(π/2·n/4)⌋ codes are hidden after n passes, the last ones.
    assert [int(x.sum()) for x in hidden] == [16, 14, 11, 6]
    assert all(np.array_equal(x, np.arange(count) >= count - x.sum()) for x in hidden)


def test_a_hole_is_drawn_and_pixels_beyond_it_stay(monkeypatch):
    """Codes are drawn where any of their pixels lies in it."""
    one, opened = made("masked"), []
    family, image_BHWC = one.family, one.batch["image"]

    def guessed(nets, batch, key, code_BN, open_BN, **how):
        opened.append(np.asarray(open_BN).reshape(-1, 4, 4))
        return jnp.where(open_BN, 0, code_BN)

    shown = lambda nets, code_BN: jnp.full(image_BHWC.shape, 9.0)
    monkeypatch.setattr(family, "guessed", guessed)
    monkeypatch.setattr(family, "_shown", shown)
    fill = functools.partial(family.inpaint, one.nets, box=(0.3, 0.5, 1.0, 1.0))
    around = functools.partial(family.outpaint, one.nets, box=(0.3, 0.5, 1.0, 1.0))
    inside_HW, codes_hw = np.zeros((16, 16), bool), np.zeros((4, 4), bool)
    inside_HW[5:, 8:] = codes_hw[1:, 2:] = True
    hole_BHW1 = np.broadcast_to(inside_HW[..., None], (3, 16, 16, 1))
    for found in (fill(one.batch, KEY), fill(one.batch | {"hole": hole_BHW1}, KEY)):
        np.testing.assert_array_equal(found, np.where(hole_BHW1, 9, image_BHWC))
        np.testing.assert_array_equal(opened.pop()[0], codes_hw)
    np.testing.assert_array_equal(around(one.batch, KEY), np.where(hole_BHW1, image_BHWC, 9))
    codes_hw[1] = False  # its upper pixels are not given
    np.testing.assert_array_equal(opened.pop()[0], ~codes_hw)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", *WRITERS])
def test_a_config_trains_resumes_and_draws(name, tmp_path):
    """With codes and captions from a cache, and its loss judged by row or time."""
    ours = CONFIGS[name]()
    for net in ours.optim:
        ours.optim[net] = dict(name="adamw", learning_rate=1e-3)  # compiles in a third of the time
    ours.cache = "codes" if name == "joint" else "encode,codes"
    prediction = "loss_at_times" if name == "masked" else "loss_by_row"
    ours.steps, ours.log_every, ours.data.size = 2, 1, 16
    loop.train(ours, tmp_path)
    ours.steps = 3
    loop.train(ours, tmp_path)
    assert [row["step"] for row in runs.rows(tmp_path)] == [1, 2, 3]
    pipe = pipeline.Pipeline.load(str(tmp_path))
    assert pipe("a red circle", seed=1).shape == (1, 16, 16, 3)
    judged = pipe.evaluate("held_out_loss", prediction=prediction, num_images=8, batch_size=8)
    assert 0 < judged["mean"] < 20


def test_codes_from_a_cache_are_those_of_the_pictures():
    one = made("masked")
    seen = {key: x for key, x in one.batch.items() if key != "codes"}
    np.testing.assert_array_equal(one.family.space.encode(one.nets, seen), one.batch["codes"])
    kept = one.batch | {"codes": one.batch["codes"] + 1}
    np.testing.assert_array_equal(one.family.space.encode(one.nets, kept), kept["codes"])


@pytest.mark.slow
def test_a_row_begins_with_the_layers_of_gpt2(tmp_path):
    torch = pytest.importorskip("torch")
    model = families.torch_model("gpt-2 with a head").eval()
    model.save_pretrained(tmp_path)
    test_conditioning.small_tokenizer(tmp_path)
    ours = config("joint", text_length=families.LENGTH)
    ours.load.text, ours.model.text = str(tmp_path), {}
    family = ar.Autoregressive(ours)
    nets = weights.pretrained(objective.make(ours), ours)
    given = batch(config("joint", text_length=families.LENGTH))
    given["text"] = Tokens(*families.batch())
    nets |= runs.filled(lambda: {"model": family.form.net.init(KEY, jnp.zeros((3, 16), int))})
    parts = jax.jit(lambda nets: family.form.logits(nets, given, jnp.zeros((3, 16), int))[1])(nets)
    ids_BL, mask_BL = given["text"]
    with torch.inference_mode():
        said = model(torch.tensor(ids_BL).long()).logits.numpy()
    each_BL = cross_entropy(said[:, :-1], ids_BL[:, 1:])
    many_B = mask_BL[:, 1:].sum(1)  # the third caption is a single word
    wanted = (each_BL * mask_BL[:, 1:]).sum(1) / np.maximum(many_B, 1)
    np.testing.assert_allclose(parts["text"], wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("across", dict(res=18), "no multiple of 4"),
        ("across", dict(model=dict(model=dict(width=18, heads=3))), "no multiple of 12"),
        ("across", dict(model=dict(model=dict(num_codes=5))), "num_codes"),
        ("across", dict(model=dict(text=dict(width=16))), "text"),
        ("across", dict(loss=dict(joint=(0.5,))), "none or two"),
        ("joint", dict(model=dict(model=dict(width=16))), "width of the language model"),
        ("masked", dict(loss=dict(smoothing=2.0)), "smoothing is 2"),
    ],
)
def test_what_no_token_model_can_be_is_said(name, changes, message):
    ours = config(name)
    for key, value in changes.items():
        if key == "model":
            value = dict(value, autoencoder=ours.model.autoencoder)
        ours[key] = value
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(ours)


def test_an_autoencoder_without_codes_is_refused():
    ours = config("masked")
    ours.model.autoencoder = dict(kind="kl", widths=(8, 8, 8), groups=4)
    with pytest.raises(errors.ConfigError, match="its latents are no codes"):
        objective.make(ours)


def test_an_encoder_that_writes_no_words_is_no_row(tmp_path):
    families.by_golden("distilbert", tmp_path)
    ours = config("joint")
    ours.load.text, ours.model.text = str(tmp_path), {}
    with pytest.raises(errors.ConfigError, match="needs one language model"):
        objective.make(ours)


def test_draws_of_codes_do_not_share_keys_with_other_noise():
    keys_B = randomness.per_example(KEY, np.arange(3))
    folds = [jax.random.key_data(randomness.fold_each(keys_B, i)) for i in range(4)]
    assert len({np.asarray(x).tobytes() for x in [*folds, jax.random.key_data(keys_B)]}) == 5
