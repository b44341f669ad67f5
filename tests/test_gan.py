"""The conditional GAN: games, penalties, partners, contrast, and what its losses move."""

import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from configs import digits_mlp_gan, shapes_gan, shapes_gan_from_flow
from t2i_jax import errors, images, loop, losses, objective, pipeline, randomness, step, weights
from t2i_jax.commands import prompts
from t2i_jax.data import shapes
from t2i_jax.evaluators import shapes as judge
from t2i_jax.models import augment, mlp, spectral
from t2i_jax.models import gan as nets
from t2i_jax.models.types import Cond, Tokens
from t2i_jax.objectives import gan
from t2i_jax.objectives.parts import distillation, games, guidance, terms
from t2i_jax.run import fingerprint
from tests import runs, test_vits


@pytest.fixture(scope="module")
def config():
    config = shapes_gan.get_config("debug")
    config.loss.penalty_stride = 2
    return config


@pytest.fixture(scope="module")
def family(config):
    return objective.make(config)


@pytest.fixture(scope="module")
def batch(config):
    """Eight pictures; captions 0 and 3 are the same."""
    shapes = runs.abstract_batch(config)
    rng = np.random.default_rng(0)
    text = rng.integers(1, 200, shapes["text"].ids_BL.shape).astype(np.int32)
    text[3] = text[0]
    arrays = {
        "image": rng.uniform(-1, 1, shapes["image"].shape).astype(np.float32),
        "text": Tokens(text, np.ones(text.shape, bool)),
        "index": np.arange(len(text), dtype=np.int32),
        "weight": np.ones(len(text), np.float32),
    }
    return jax.tree.map(jnp.asarray, arrays)


@pytest.fixture(scope="module")
def made(family, batch):
    return noisy(jax.jit(family.init)(jax.random.key(0), batch))


def noisy(nets):
    """Nets in which zero-initialised layers count, too."""
    leaves, tree = jax.tree.flatten(nets)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def started(family, made):
    """(rate of disc, rate of gen) -> the state before a step of plain gradient descent."""
    state = step.start(optimisers(family), {}, {name: made[name] for name in family.trained})
    rates = lambda *given: dict(zip(("disc", "gen"), map(jnp.float32, given), strict=True))
    return lambda *given: state._replace(opt=rates(*given))


@pytest.fixture(scope="module")
def update(family, made, batch, started):
    """The compiled step."""
    fn = jax.jit(step.make_update(family, optimisers(family), ema={}))
    return fn.lower(started(1, 1), {"text": made["text"]}, batch).compile()


def optimisers(family):
    """Gradient descent whose rate is the optimiser's state."""
    descend = lambda grads, rate, params, n: (jax.tree.map(lambda g: -rate * g, grads), rate)
    still = step.optim.Optimiser(lambda params: jnp.float32(0), descend, lambda n: jnp.float32(0))
    return dict.fromkeys(family.trained, still)


@pytest.fixture(scope="module")
def moved(made, batch, started, update):
    """(rate of disc, rate of gen) -> net -> how far each of its arrays went in one step."""

    def move(*rates):
        new, metrics = update(started(*rates), {"text": made["text"]}, batch)
        assert not metrics["skipped"]
        return {
            name: {
                fingerprint.path_of(path): float(jnp.abs(a - b).max())
                for (path, a), b in zip(
                    jax.tree_util.tree_leaves_with_path(new.nets[name]),
                    jax.tree.leaves(made[name]),
                    strict=True,
                )
            }
            for name in new.nets
        }

    return move


def test_a_step_moves_all_of_both_nets(moved):
    whole = moved(10, 1e2)
    # what every logit gets cancels in pairs
    assert whole["disc"].pop("params/verdict/real/bias") < 1e-3
    for name in ("disc", "gen"):
        assert min(whole[name].values()) > 0, min(whole[name], key=whole[name].get)


@pytest.mark.slow
def test_each_loss_moves_its_own_net_alone(family, made, batch, started):
    assert [loss.nets for loss in family.losses] == [("disc",), ("gen",)]
    for loss, still in zip(family.losses, ("gen", "disc"), strict=True):
        alone = family._replace(losses=(loss,))
        fn = jax.jit(step.make_update(alone, optimisers(family), ema={}))
        new, _ = fn(started(10, 1e2), {"text": made["text"]}, batch)
        assert jax.tree.all(jax.tree.map(np.array_equal, new.nets[still], made[still]))
        (name,) = loss.nets
        assert not jax.tree.all(jax.tree.map(np.array_equal, new.nets[name], made[name]))


def test_one_step_is_the_golden_one(made, batch, started, update, update_golden):
    """Losses and gradients; --update-golden after a change that was wanted."""
    path = pathlib.Path(__file__).parent / "goldens" / "shapes_gan.json"
    _, metrics = update(started(0, 0), {"text": made["text"]}, batch)
    found = {name: float(value) for name, value in metrics.items() if "learning" not in name}
    if update_golden:
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == pytest.approx(json.loads(path.read_text()), rel=1e-3, abs=1e-5)


def trapped(program: str) -> list[str]:
    """The convolutions of a compiled program that XLA:CPU runs through naive code: those within
    loops and conditionals, strided, dilated or grouped ones.
    """
    bodies, name = {}, None
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            bodies[name := head[1]] = []
        elif name:
            bodies[name].append(line)
    called = lambda line: re.findall(r"%([\w.-]+)", line.partition(", metadata=")[0])
    inner = [
        callee
        for lines in bodies.values()
        for line in lines
        if re.search(r" (while|conditional)\(", line)
        for callee in called(line)
        if callee in bodies
    ]
    seen = set()
    while inner:
        if (callee := inner.pop()) not in seen:
            seen.add(callee)
            inner += [c for line in bodies[callee] for c in called(line) if c in bodies]
    return [
        line.strip()
        for name, lines in bodies.items()
        for line in lines
        if " convolution(" in line
        and (name in seen or re.search(r"stride=|_dilate=|(feature|batch)_group_count=", line))
    ]


def test_no_convolution_of_the_compiled_step_is_in_a_trap(update):
    program = update.as_text()
    assert program.count(" convolution(") > 20
    assert not trapped(program)


def test_traps_are_seen():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    conv = lambda x, strides: jax.lax.conv_general_dilated(x, kernel, strides, "SAME", **options)
    again = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: conv(x, (1, 1)), x)
    choice = lambda x: jax.lax.cond(x.sum() > 0, lambda x: conv(x, (1, 1)), lambda x: x, x)
    for fn in (again, choice, lambda x: conv(x, (2, 2))):
        assert trapped(jax.jit(fn).lower(x).compile().as_text())
    assert not trapped(jax.jit(lambda x: conv(x, (1, 1))).lower(x).compile().as_text())


@pytest.mark.parametrize("game", games.GAMES)
def test_games_are_their_formulas(game):
    real, fake = np.array([2.0, -1.0, 0.5]), np.array([-0.3, 3.0, 0.5])
    plus = lambda x: np.log1p(np.exp(x))
    disc, gen = {
        "relativistic": (plus(fake - real), plus(real - fake)),
        "hinge": (np.maximum(1 - real, 0) + np.maximum(1 + fake, 0), -fake),
        "nonsaturating": (plus(-real) + plus(fake), plus(-fake)),
        "minimax": (plus(-real) + plus(fake), np.log(1 - 1 / (1 + np.exp(-fake)))),
    }[game]
    ours = games.GAMES[game]
    np.testing.assert_allclose(ours[0](real, fake), disc, rtol=1e-5)
    np.testing.assert_allclose(ours[1](real, fake), gen, rtol=1e-5)


def test_penalties_are_the_squared_slope(made, batch, config):
    """The exact one against finite differences; the estimate in the mean over many directions."""
    discriminator = nets.Discriminator(res=config.res, width=16, depth=1, heads=2)
    text = pipeline.Predictor(config).objective.predict["encode"]
    cond = text(made, batch)
    cond = jax.tree.map(lambda x: x[:1], cond)
    logit = jax.jit(lambda image: discriminator.apply(made["disc"], image, cond)[0].logit_B)
    image = batch["image"][:1]
    exact = games.slopes("exact", logit, None, 0.01)(image)
    ways = np.random.default_rng(0).normal(size=(400, *image.shape)).astype(np.float32)
    difference = lambda way: logit(image + 1e-2 * way) - logit(image - 1e-2 * way)
    slopes = (jax.vmap(difference)(ways) / 2e-2) ** 2  # their mean is the squared gradient's sum
    np.testing.assert_allclose(np.mean(slopes), exact, rtol=0.25)
    keys = jax.random.split(jax.random.key(0), 400)
    estimate = jax.vmap(lambda k: games.slopes("estimate", logit, k[None], 0.01)(image))(keys)
    np.testing.assert_allclose(np.mean(estimate), exact, rtol=0.25)
    along = jax.grad(lambda x: logit(x).sum())(image)
    along /= jnp.linalg.norm(along)
    slope = (logit(image + 2e-4 * along) - logit(image - 2e-4 * along)) / 4e-4
    np.testing.assert_allclose(slope**2, exact, rtol=0.05)  # kinks of ReLU within the step


@pytest.mark.slow
def test_the_loss_has_estimates_of_every_second_example(made, batch, config):
    config = config.copy_and_resolve_references()
    config.loss.update(mismatch=0.0, sentence=0.0, word=0.0)
    config.loss.update(penalty="estimate", sigma=0.1, gamma=(2.0, 2.0))
    family, key = objective.make(config), jax.random.key(1)
    value, aux = jax.jit(family.losses[0].fn)(made, batch, key, 0)
    key_noise, _, key_rest = jax.random.split(key, 3)
    per_example = lambda key: randomness.per_example(key, batch["index"])
    _, slope_B = randomness.split_each(per_example(key_rest), 2)
    noise_BHWC = randomness.normal_each(slope_B, batch["image"].shape[1:])
    cond = family.predict["encode"](made, batch)
    generator = nets.Generator(res=config.res, **config.model.gen)
    z_B = randomness.normal_each(per_example(key_noise), generator.z_shape)
    drawn_BHWC = generator.apply(made["gen"], z_B, cond)
    score = jax.jit(lambda x: family.predict["score"](made, batch | {"image": x}, None))
    for name, x in (("r1", batch["image"]), ("r2", drawn_BHWC)):
        slope = np.square(score(x) - score(x + 0.1 * noise_BHWC)) / 0.1**2
        assert aux.metrics[name] == pytest.approx(float(slope[::2].mean()), rel=1e-3)
    config.loss.gamma = (0.0, 0.0)
    without, _ = jax.jit(objective.make(config).losses[0].fn)(made, batch, key, 0)
    penalties = float(aux.metrics["r1"] + aux.metrics["r2"])
    assert value - without == pytest.approx(penalties, rel=1e-3)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 20])
def test_every_nth_example_is_the_same_one_in_parts_of_a_batch(stride):
    rng = np.random.default_rng(stride)
    for size, parts in ((12, 1), (12, 2), (12, 3), (12, 6), (12, 12), (10, 5), (16, 2)):
        value, weight = rng.normal(size=size), rng.integers(0, 2, size)
        batch = {"index": np.arange(size), "weight": weight, "value": value}
        whole = terms.every(stride, batch, size)[1](value[::stride])
        chosen = value[::stride] * weight[::stride]
        wanted = chosen.sum() / max(weight.sum() * len(chosen) / size, 1e-9)
        assert whole == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # with all: the chosen's mean
        total = 0.0
        for start in range(0, size, size // parts):
            part = {name: x[start : start + size // parts] for name, x in batch.items()}
            some, mean = terms.every(stride, part, size)
            total += mean(some(part)["value"]) * part["weight"].sum() / max(weight.sum(), 1)
        assert total == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_micro_batches_penalise_the_same_examples_as_the_whole():
    config = digits_mlp_gan.get_config("debug")
    config.loss.update(mismatch=0.0, sentence=0.0, word=0.0, penalty="exact", penalty_stride=4)
    family, rng = objective.make(config), np.random.default_rng(0)
    batch = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype),
        runs.abstract_batch(config),
    )
    batch["image"] = rng.uniform(-1, 1, batch["image"].shape).astype(np.float32)
    batch |= {"index": np.arange(8, dtype=np.int32), "weight": np.float32([1, 1, 1, 0, 1, 1, 1, 1])}
    made = runs.filled(family.init, jax.random.key(0), batch)
    state = step.start(optimisers(family), {}, {name: made[name] for name in family.trained})
    family, found = family._replace(losses=family.losses[:1]), []
    for accumulate in (1, 4):
        fn = step.make_update(family, optimisers(family), ema={}, accumulate=accumulate)
        _, metrics = jax.jit(fn)(state, {"text": made["text"]}, batch)
        found.append({name: float(metrics[f"disc/{name}"]) for name in ("r1", "r2", "loss")})
    assert found[0]["r1"] > 1e-3
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_only_losses_of_pairs_compare_examples(config):
    compared = lambda **changes: [loss.compares for loss in objective.make(with_(changes)).losses]

    def with_(changes):
        changed = config.copy_and_resolve_references()
        changed.loss.update(mismatch=0.0, sentence=0.0, word=0.0)
        changed.loss.update(changes)
        return changed

    assert compared() == [False, False]
    assert compared(mismatch=0.1) == [True, False]
    assert compared(word=0.1) == compared(sentence=0.1) == [True, True]


def test_a_partner_has_another_caption_and_none_may_be_found():
    text = np.array([[1], [1], [2], [1], [3]])
    batch = {"text": Tokens(text, np.ones((5, 1), bool)), "index": np.arange(5)}
    batch["weight"] = np.ones(5)
    assert games.partner(batch).tolist() == [2, 2, 3, 4, 0]
    assert games.is_other(batch).tolist() == [1] * 5
    same = {**batch, "text": Tokens(text * 0, np.ones((5, 1), bool))}
    assert games.partner(same).tolist() == list(range(5))
    assert games.is_other(same).tolist() == [0] * 5
    # the same numbers, other captions
    masked = {**same, "text": Tokens(text * 0, np.arange(5)[:, None] < 2)}
    assert games.partner(masked).tolist() == [2, 2, 0, 0, 0]
    broken = {**batch, "weight": np.array([1, 1, 0, 1, 1])}
    assert games.partner(broken).tolist() == [4, 4, 3, 4, 0]


def test_an_example_of_weight_zero_counts_nothing(made, batch, started, update):
    broken = {**batch, "weight": batch["weight"].at[2].set(0)}
    other = {
        **broken,
        "text": Tokens(
            batch["text"].ids_BL.at[2].set(7), batch["text"].mask_BL.at[2, 3:].set(False)
        ),
        "image": batch["image"].at[2].set(0.3),
    }
    seen = [update(started(0, 0), {"text": made["text"]}, b)[1] for b in (batch, broken, other)]
    for name in ("disc/loss", "gen/loss"):
        whole, one, another = (float(metrics[name]) for metrics in seen)
        assert one == pytest.approx(another, rel=1e-6)
        assert one != pytest.approx(whole, rel=1e-6)


def test_word_scores_are_of_regions_that_answer():
    axes = np.eye(4, dtype=np.float32)
    regions, words = axes[None, :3], axes[None, [0, 3]]
    mask = np.array([[True, False]])
    assert nets.word_scores(regions, words, mask, 0.01)[0] == pytest.approx(1, abs=1e-3)
    assert nets.word_scores(regions, words, ~mask, 0.01)[0] == pytest.approx(0, abs=1e-3)
    assert nets.word_scores(regions, words, mask & False)[0] == 0


@pytest.mark.parametrize("size", [3, 35])
def test_word_scores_of_pairs_are_those_of_each_pair(size):
    """In blocks, with what the last one leaves; so are their gradients."""
    rng = np.random.default_rng(size)
    unit = lambda *shape: losses.unit(jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32))
    regions, words, mask = unit(5, 4), unit(3, 4), jnp.asarray(rng.random((size, 3)) < 0.7)

    way = jnp.asarray(rng.normal(size=(size, size)), jnp.float32)

    def graded(scores):
        def value(regions, words):
            found = scores(regions, words)
            return (way * found).sum(), found

        grads, found = jax.jit(jax.grad(value, (0, 1), has_aux=True))(regions, words)
        return found, *grads

    ours = graded(lambda regions, words: nets.pairs_word_scores(regions, words, mask))
    pair = lambda regions, words: nets.word_scores(regions[:, None], words[None], mask[None])
    for a, b in zip(ours, graded(pair), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_word_scores_of_pairs_take_memory_for_a_block_of_them():
    n, regions, words, width = 128, 16, 8, 4
    inputs = (
        jnp.zeros((n, regions, width)),
        jnp.zeros((n, words, width)),
        jnp.ones((n, words), bool),
    )
    slope = jax.jit(jax.grad(lambda *inputs: nets.pairs_word_scores(*inputs).sum()))
    needed = slope.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    assert needed < n * n * regions * words * 4  # one number for each region, word and pair


def test_sampling_is_one_pass_whose_truncation_goes_to_the_captions_mean(config, made):
    pipe, found = pipeline.Predictor(config), made
    texts = ["a red circle", "a large blue square on a white background", "a red circle"]
    way = pipe.between(found, texts, 3, seed=4).astype(int)
    ends = pipe.sample(found, texts, seed=4).astype(int)
    assert len(way) == 7
    assert np.abs(way[::3] - ends).max() <= 1
    steps = np.abs(np.diff(way, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0
    assert steps.max() < np.abs(ends[0] - ends[1]).mean() + np.abs(ends[1] - ends[2]).mean()
    draw = lambda **options: pipe.sample(found, texts, **options).astype(int)
    whole = draw()
    alone = pipe.sample(found, texts[2:], index=[2]).astype(int)
    assert np.abs(whole[2] - alone[0]).max() <= 1
    assert np.abs(whole[0] - whole[2]).max() > 1  # another noise
    mean = draw(truncation=0.0)
    assert np.abs(mean[0] - mean[2]).max() <= 1
    assert np.abs(mean - draw(truncation=0.0, seed=5)).max() <= 1
    assert np.abs(mean[0] - whole[0]).max() > 1


def test_the_way_between_pictures_is_a_strip_and_an_animation(config, tmp_path):
    shapes = runs.abstract_batch(config)
    predictor = pipeline.Predictor(config)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    found = runs.filled(predictor.objective.init, jax.random.key(0), zeros)
    pipe = pipeline.Pipeline(predictor, found, "here", None)
    one = prompts.Request("a red circle", seed=3)
    asked = [one, one._replace(prompt="a star", count=2)]
    drawn, settings = prompts.draw_between(pipe, asked, 4)
    strip, animation = prompts.save_between(drawn, settings, tmp_path, metadata=True)
    (bare := tmp_path / "bare").mkdir()
    plain, _ = prompts.save_between(drawn, settings, bare, metadata=False)
    assert images.read_metadata(plain) is None
    np.testing.assert_array_equal(*(np.asarray(Image.open(path)) for path in (plain, strip)))
    for path in (strip, animation):
        recorded = prompts.from_picture(path)
        assert [(r.prompt, r.seed, r.count) for r in recorded.requests] == [
            ("a red circle", 3, 1),
            ("a star", 3, 2),
        ]
        assert (recorded.frames, recorded.grid, recorded.model) == (4, False, "here")
        again, _ = prompts.draw_between(pipe, recorded.requests, recorded.frames)
        np.testing.assert_array_equal(again, drawn)
    with Image.open(strip) as picture:
        assert picture.size == (5 * 16 + 4 * 2, 2 * 16 + 2)
        last = np.asarray(picture)[-16:, -16:]
    np.testing.assert_array_equal(last, drawn[-1])
    with Image.open(animation) as film:
        assert film.n_frames == len(drawn) == 9
    for wrong in ([one], [one, one._replace(seed=4)], [one._replace(negative_prompt="x")] * 2):
        with pytest.raises(errors.ConfigError, match=r"one picture|other seeds"):
            prompts.draw_between(pipe, wrong, 4)
    with pytest.raises(errors.ConfigError, match="share goes from 0 to 1"):
        prompts.draw_between(pipe, [one._replace(options=(("share", 0.3),), count=2)], 4)
    with pytest.raises(errors.ConfigError, match="takes no negative prompt"):
        prompts.draw(pipe, [one._replace(negative_prompt="blue")], batch_size=4)


WEIGHTS = ("mismatch", "sentence", "word", "adversarial", "clip", "distil")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"game": "hnge"}}, "did you mean 'hinge'"),
        ({"loss": {"penalty": "exakt"}}, "did you mean 'exact'"),
        ({"loss": {"penalty_stride": 0}}, "penalty_stride is 0"),
        ({"loss": {"gamma": 1.0}}, "gamma is 1.0"),
        ({"loss": {"distil_times": (0.9, 0.5)}}, "from 0 to 1 and with the largest last"),
        ({"loss": {"temperature": 0.0}}, "number above 0"),
        *(({"loss": {name: -1}}, f"{name} is -1") for name in WEIGHTS),
        ({"loss": {"gamma": (0.5, np.nan)}}, "gamma is"),
        ({"loss": {"adversarial": "high"}}, "adversarial is .high. .at config.loss"),
        ({"loss": {"distil": 1.0}}, "other noise"),
        ({"model": {"dsic": {"width": 16}}}, "did you mean 'disc'"),
        ({"model": {"gen": {"width": 10, "heads": 4}}}, "no multiple of heads"),
        ({"model": {"gen": {"heads": 0}}}, "heads is 0"),
        ({"model": {"disc": {"width": "16"}}}, "width is '16'"),
        ({"model": {"disc": {"res": 64}}}, "config.model.disc.res"),
        ({"load": {"eye": "builtin:shapes-clip#image"}}, "describe it in config.model.eye"),
        ({"loss": {"augment": ("cutuot",)}}, "did you mean 'cutout'"),
        ({"loss": {"augment_share": (0.0, 1.5)}}, "from 0 to 1"),
        ({"loss": {"sigma": 0.0}}, "number above 0"),
        ({"loss": {"distance": "angle"}}, "unknown distance 'angle'"),
        ({"loss": {"teacher": 3}}, "give a dictionary"),
        ({"model": {"width": 16}}, "set config.model.gen.width or config.model.disc.width"),
        ({"model": {"gen": {"network": "mpl"}}}, "did you mean 'mlp'"),
        ({"res": 24}, "res is 24"),
        ({"model": {"gen": {"widht": 3}}}, "did you mean 'width'"),
    ],
)
def test_what_no_gan_can_be_is_said(changes, message):
    config = shapes_gan.get_config("debug")
    for key, value in changes.items():
        config[key] = value
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "huen"}, r"'huen' .at config.loss.teacher.*'heun'"),
        ({"guidance": -1}, r"guidance is -1.* .at config.loss.teacher.guidance"),
        ({"steps": 0}, "steps is 0"),
        ({"stpes": 3}, "did you mean 'steps'"),
        ({"strength": 0.5}, "set config.loss.distil_times"),
    ],
)
def test_a_teachers_options_are_those_of_its_prediction(changes, message):
    config = shapes_gan_from_flow.get_config("debug")
    with config.ignore_type():
        config.loss.teacher.update(changes)
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(config)


# --- what the discriminator sees, and its kernels -------------------------------------------------


def test_augmentation_changes_a_share_and_is_differentiable():
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (64, 16, 16, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), len(pictures))
    run = jax.jit(augment.augmented, static_argnums=0)
    for name in augment.KINDS:
        none, some, every = (run((name,), pictures, keys, share) for share in (0.0, 0.5, 1.0))
        moved = lambda found: (np.abs(found - pictures).max((1, 2, 3)) > 1e-6).mean()
        assert moved(none) == 0
        assert 0.2 < moved(some) < 0.8
        assert moved(every) > 0.9
        alone = run((name,), pictures[5:6], keys[5:6], 1.0)
        np.testing.assert_allclose(alone[0], every[5], atol=1e-6)  # by its own key
    everything = lambda x: run(tuple(augment.KINDS), x, keys, 1.0)
    towards = rng.normal(size=pictures.shape).astype(np.float32)
    _, slope = jax.jvp(everything, (pictures,), (towards,))
    wanted = (everything(pictures + 1e-2 * towards) - everything(pictures - 1e-2 * towards)) / 2e-2
    np.testing.assert_allclose(slope, wanted, atol=1e-3)  # all of it is linear


def test_a_translation_moves_whole_pixels_alike_in_all_channels():
    picture = np.arange(16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
    for seed in range(8):
        found = np.asarray(augment.translation(picture, jax.random.key(seed)))
        moves = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if np.array_equal(
                found, np.pad(picture, ((2, 2), (2, 2), (0, 0)), "edge")[2 - y :, 2 - x :][:16, :16]
            )
        ]
        assert len(moves) == 1


def test_spectral_norm_bounds_every_kernel_by_one():
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 8)).astype(np.float32), "bias": np.ones(8)},
        "dense": {"kernel": 0.1 * np.eye(6, 5, dtype=np.float32)},
        "zero": {"kernel": np.zeros((4, 4), np.float32)},
    }
    vectors, advanced = spectral.start(params, jax.random.key(0)), jax.jit(spectral.advanced)
    for _ in range(100):
        vectors = advanced(params, vectors)
    found = spectral.bounded(params, vectors)
    largest = np.linalg.svd(np.asarray(found["conv"]["kernel"]).reshape(-1, 8), compute_uv=False)[0]
    assert largest == pytest.approx(1, abs=1e-3)
    np.testing.assert_array_equal(found["dense"]["kernel"], params["dense"]["kernel"])
    np.testing.assert_array_equal(found["conv"]["bias"], params["conv"]["bias"])
    ratio = found["conv"]["kernel"] / params["conv"]["kernel"]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    slope = jax.grad(lambda p: jnp.square(spectral.bounded(p, vectors)["zero"]["kernel"]).sum())
    assert np.isfinite(slope(params)["zero"]["kernel"]).all()
    params["zero"]["kernel"] = 3 * rng.normal(size=(4, 4)).astype(np.float32)  # it has learnt
    for _ in range(100):
        vectors = advanced(params, vectors)
    found = spectral.bounded(params, vectors)["zero"]["kernel"]
    assert np.linalg.svd(found, compute_uv=False)[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_spectral_norm_and_augmentation_train(config, batch):
    """The vectors go on with every step, the generator's loss leaves them alone."""
    config = config.copy_and_resolve_references()
    config.loss.update(mismatch=0.0, sentence=0.0, word=0.0)
    config.loss.update(spectral_norm=True, augment=tuple(augment.KINDS), augment_share=(0.0, 1.0))
    config.loss.gamma = (0.5, 0.5)
    family = objective.make(config)
    nets = jax.jit(family.init)(jax.random.key(0), batch)
    disc_loss, gen_loss = (
        jax.jit(lambda nets, step, fn=loss.fn: fn(nets, batch, jax.random.key(1), step))
        for loss in family.losses
    )
    disc, gen = disc_loss(nets, 0), gen_loss(nets, 0)
    for fn, (value, _) in ((disc_loss, disc), (gen_loss, gen)):  # all are augmented at the end
        assert float(fn(nets, config.steps)[0]) != pytest.approx(float(value), rel=1e-3)

    def longer(path, x):
        return x * 100 if str(path[-1].key) == "kernel" else x

    disc_params = nets["disc"]["params"]
    values = []
    for _ in range(2):  # kernels beyond the bound count as at the bound
        disc_params = jax.tree_util.tree_map_with_path(longer, disc_params)
        grown = {**nets, "disc": {**nets["disc"], "params": disc_params}}
        values.append(float(disc_loss(grown, 0)[0]))
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert np.isfinite(disc[0])
    assert np.isfinite(gen[0])
    assert not gen[1].mutated
    before = nets["disc"][spectral.COLLECTION]
    after = disc[1].mutated["disc"][spectral.COLLECTION]
    lengths = jax.tree.map(lambda u: float(jnp.linalg.norm(u)), after)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(length == pytest.approx(1, rel=1e-5) for length in jax.tree.leaves(lengths))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 0.1


# --- other networks -------------------------------------------------------------------------------


def from_flow():
    config = shapes_gan_from_flow.get_config("debug")
    net = dict(runs.config().model.model)
    config.model = dict(gen=dict(net, prediction="v"), disc=dict(width=16))
    config.loss.update(clip=0.0, distil=0.0)
    return config


@pytest.fixture(scope="module")
def taught():
    """A config with a teacher and a dual encoder to guide, and its nets."""
    config = from_flow()
    config.model.update(teacher=config.model.gen.to_dict(), clip=towers())
    config.loss.update(distil=1.0, clip=1.0)
    family = objective.make(config)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), runs.abstract_batch(config, 1))
    return config, jax.jit(family.init)(jax.random.key(0), zeros)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [{}, {"teacher": {"rank": 2}}])
def test_no_prediction_reads_a_net_that_is_for_training_only(taught, adapted):
    config = taught[0].copy_and_resolve_references()
    config.lora = adapted
    family, batch = (
        objective.make(config),
        runs.abstract_batch(config),
    )
    shapes, key = weights.abstract_nets(family, config), jax.eval_shape(lambda: jax.random.key(0))
    unread = family.training_only
    assert set(unread) == {"clip_image", "clip_caption", "teacher"} - set(adapted)
    assert set(unread) < set(shapes)
    read = {name: net for name, net in shapes.items() if name not in unread}
    for name, fn in family.predict.items():
        assert jax.eval_shape(fn, read, batch, key) is not None, name


@pytest.mark.slow
def test_a_model_is_opened_without_the_nets_that_only_its_training_needed(taught, tmp_path):
    """Unless only a digest of all nets is known, as older versions wrote it."""
    config, nets = taught
    config = config.copy_and_resolve_references()
    config.load.teacher = f"{tmp_path / 'gone'}#model"
    held = {name: nets[name] for name in objective.make(config).trained}
    frozen = weights.digests({"teacher": nets["teacher"]})
    weights.export(tmp_path, held, config, card="", dtype="float32", frozen=frozen)
    assert weights.frozen_digests(tmp_path, None) == frozen
    pipe = pipeline.Pipeline.load(str(tmp_path))
    assert set(pipe.nets) == {*held, "text"}
    pipe.predictor.trace("sample", pipe.nets)
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(tmp_path / weights.EXPORTED),
        tmp_path / weights.EXPORTED,
        {"frozen": fingerprint.digest({"teacher": nets["teacher"]})},
    )
    with pytest.raises(errors.ConfigError, match="no such folder"):
        pipeline.Pipeline.load(str(tmp_path))


def test_a_frozen_net_that_changed_is_named():
    nets = {name: {"params": {"w": np.full(3, i)}} for i, name in enumerate(("text", "eye"))}
    changed = nets | {"eye": {"params": {"w": np.zeros(3, int)}}}
    known, old = weights.digests(nets), fingerprint.digest(nets)
    for digests in (known, old, fingerprint.digest(nets, format=2), {}, None):
        weights.check_frozen(nets, digests)
    weights.check_frozen({"text": nets["text"]}, known)  # of those that are opened
    for digests, names in ((known, r"\['eye'\]"), (old, r"\['eye', 'text'\]")):
        for found in (None, weights.digests(changed)):
            with pytest.raises(errors.ConfigError, match=f"frozen nets {names} are not those"):
                weights.check_frozen(changed, digests, found)


@pytest.mark.slow
def test_a_generator_begins_as_the_flow_network_in_noise():
    config = shapes_gan_from_flow.get_config()
    config.loss.update(clip=0.0, distil=0.0)
    config.load = {name: config.load[name] for name in ("gen", "text")}
    family = objective.make(config)
    nets = weights.pretrained(family, config) | weights.frozen(family, config)
    theirs = pipeline.Pipeline.load(shapes_gan_from_flow.FLOW)
    jax.tree.map(np.testing.assert_array_equal, nets["gen"], theirs.nets["model"])
    batch = pipeline.Predictor(config).batch([np.zeros((32, 32, 3), np.uint8)] * 2, ["a ring"] * 2)
    found = jax.jit(family.predict["sample"])(nets, batch, jax.random.key(0))
    # one Euler step from noise to the picture is what the network sees in noise
    options = dict(guidance=1.0, steps=1, sampler="euler")
    wanted = jax.jit(functools.partial(theirs.predictor.objective.predict["sample"], **options))(
        nets | {"model": nets["gen"]}, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_net_of_another_name_must_be_there():
    config = from_flow()
    config.load.gen = "builtin:shapes#modle"
    with pytest.raises(errors.ConfigError, match=r"no net 'modle'.* did you mean 'model'"):
        weights.pretrained(objective.make(config), config)


def test_only_a_run_that_begins_asks_for_the_run_it_begins_with(tmp_path):
    config, workdir = from_flow(), tmp_path / "run"
    config.load.gen = f"{tmp_path / 'gone'}#model"
    with pytest.raises(errors.ConfigError, match="gone"):
        loop.Run(config, workdir)
    assert not workdir.exists()
    (workdir / "checkpoints").mkdir(parents=True)
    loop.Run(config, workdir)
    with pytest.raises(errors.ConfigError, match="gone"):
        loop.Run(config, workdir, restart=True)


def test_discriminators_read_a_condition_as_if_it_were_alone():
    keys = jax.random.split(jax.random.key(0), 5)
    cond = lambda a, b: Cond(
        jax.random.normal(a, (2, 3, 8)), jnp.ones((2, 3), bool), jax.random.normal(b, (2, 8))
    )
    conds = cond(*keys[:2]), cond(*keys[2:4])
    image = jax.random.normal(keys[4], (2, 16, 16, 3))
    for net, x in (
        (nets.Discriminator(res=16, width=16), image),
        (nets.Projected(width=16), (image, image[:, ::2, ::2])),
        (mlp.Discriminator(res=16, width=16), image),
    ):
        variables = runs.filled(net.init, keys[4], x, conds[0])
        apply = jax.jit(net.apply)
        together = apply(variables, x, *conds)
        for seen, cond in zip(together, conds, strict=True):
            (alone,) = apply(variables, x, cond)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), seen, alone)
        assert jnp.abs(together[0].logit_B - together[1].logit_B).min() > 1e-3


def towers():
    small = dict(tower="convolutional", width=16, depth=1, projected=8)
    return dict(image=small, caption=dict(width=16, depth=1, heads=2))


@pytest.mark.slow
@pytest.mark.parametrize("through", ["eye", "guide"])
def test_a_flow_model_goes_on_from_every_second_picture(batch, through):
    config = from_flow()
    config.model.gen.prediction = "x"
    config.model.teacher = config.model.gen.to_dict()
    config.loss.update(distil=2.0, distil_stride=2, distil_times=(0.6, 0.6))
    if through == "guide":
        config.model.clip, config.loss.clip = towers(), 0.5
    else:
        config.model.eye = towers()["image"]
    config.loss.teacher = dict(sampler="euler", guidance=1.5, steps=2)
    family, key = objective.make(config), jax.random.key(1)
    nets = runs.filled(family.init, jax.random.key(0), batch)
    nets["teacher"] = nets["gen"]
    parts = gan.build(config)
    cond = family.predict["encode"](nets, batch)
    teacher = distillation.teacher(config)
    key_noise, _, _ = jax.random.split(key, 3)
    some = lambda tree: jax.tree.map(lambda x: x[::2], tree)

    @jax.jit
    def wanted(params, target=None):
        """By hand; `target` in place of what the teacher makes."""
        noise = randomness.normal_each(
            randomness.per_example(key_noise, batch["index"]), (16, 16, 3)
        )
        drawn = some(parts.generator.apply(params, noise, cond))
        if target is None:
            known = {"model": nets["teacher"], "text": nets["text"]}
            target = teacher.predict["img2img"](
                known,
                some(batch) | {"image": drawn},
                key_noise,
                strength=0.6,
                **config.loss.teacher,
            )
        if through == "eye":
            maps = [parts.critic.maps(nets, x) for x in (drawn, target)]
        else:
            maps = [guidance.make(config).maps(nets, x) for x in (drawn, target)]
        unit = lambda x: x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        far = [jnp.square(unit(a) - unit(b)).mean() for a, b in zip(*maps, strict=True)]
        return jnp.square(drawn - target).mean() + sum(far) / len(far), target

    error, target = wanted(nets["gen"])
    assert error > 1e-3

    def graded(family):
        fn = lambda gen: family.losses[1].fn(nets | {"gen": gen}, batch, key, jnp.int32(0))
        return jax.jit(jax.value_and_grad(fn, has_aux=True))(nets["gen"])

    if through == "guide":  # the gradient does not depend on who looks
        _, aux = jax.jit(family.losses[1].fn)(nets, batch, key, jnp.int32(0))
        assert aux.metrics["distil"] == pytest.approx(float(error), rel=1e-4)
        return
    (_, aux), with_it = graded(family)
    assert aux.metrics["distil"] == pytest.approx(float(error), rel=1e-4)
    config.loss.distil = 0.0
    _, without = graded(objective.make(config))
    ours = jax.tree.map(lambda a, b: (a - b) / 2, with_it, without)  # of the distance alone
    theirs = jax.jit(jax.grad(lambda params: wanted(params, target)[0]))(nets["gen"])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()) + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("eye", ["tower", "pretrained"])
def test_heads_on_a_frozen_network_learn_and_it_does_not(batch, eye, tmp_path):
    config = from_flow()
    config.model.eye, config.model.gen = towers()["image"], dict(width=16)
    if eye == "pretrained":
        test_vits.by_golden("dino", tmp_path)
        config.model.eye, config.load.eye = {}, str(tmp_path)
    family = objective.make(config)
    assert family.trained == ("disc", "gen")
    nets = runs.filled(family.init, jax.random.key(0), batch)

    def moves(loss, name):
        fn = lambda net: loss.fn(nets | {name: net}, batch, jax.random.key(0), jnp.int32(0))
        gradient, aux = jax.jit(jax.grad(fn, has_aux=True))(nets[name])
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 0
        return aux

    disc, gen = family.losses
    aux = moves(disc, "disc")
    moves(gen, "gen")
    score = jax.jit(lambda batch: family.predict["score"](nets, batch, jax.random.key(0)))
    own_B = score(batch)
    assert np.abs(own_B - score(batch | {"image": batch["image"] * 0.5})).max() > 0
    # the loss sees pictures beside their own and others' captions as scoring does one by one
    partner = games.partner(batch)
    other_B = score(batch | {"text": jax.tree.map(lambda x: x[partner], batch["text"])})
    gap = float((own_B - other_B).mean())
    assert abs(gap) > 1e-6
    assert aux.metrics["mismatch_gap"] == pytest.approx(gap, rel=1e-3)


def test_the_gap_is_how_far_pictures_score_above_drawn_ones(config, family, made, batch):
    predict = {name: jax.jit(family.predict[name]) for name in ("score", "encode", "gap")}
    generator, key = gan.build(config).generator, jax.random.key(3)
    noise = randomness.normal_each(randomness.per_example(key, batch["index"]), generator.z_shape)
    cond = predict["encode"](made, batch)
    drawn = batch | {"image": jax.jit(generator.apply)(made["gen"], noise, cond)}
    ahead_B = predict["score"](made, batch, key) - predict["score"](made, drawn, key)
    weighted = batch | {"weight": np.arange(len(ahead_B), dtype=np.float32)}
    wanted = (ahead_B * weighted["weight"]).sum() / (len(ahead_B) - 1)  # the first counts nothing
    np.testing.assert_allclose(predict["gap"](made, weighted, key), [wanted], rtol=1e-4)


def test_guidance_adds_the_angle_between_picture_and_caption(family, batch, update):
    config = shapes_gan.get_config("debug")
    config.model.clip = towers()
    config.loss.update(clip=3.0, adversarial=0.5)
    guided = objective.make(config)
    nets = runs.filled(guided.init, jax.random.key(0), batch)
    assert set(nets) - set(family.trained) == {"clip_image", "clip_caption", "text"}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)  # of a step's second loss
    value, aux = jax.jit(guided.losses[1].fn)(nets, batch, key, jnp.int32(0))
    assert aux.metrics["clip"] > 0.1
    still = step.start(optimisers(family), {}, {name: nets[name] for name in family.trained})
    _, plain = update(still, {"text": nets["text"]}, batch)
    wanted = 0.5 * plain["gen/loss"] + 3 * aux.metrics["clip"]
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_the_angle_is_finite_where_arccos_is_not():
    axes = jnp.eye(3)
    a, b = axes[jnp.array([0, 0, 0])], jnp.stack([axes[0], -axes[0], axes[1]])
    np.testing.assert_allclose(losses.spherical(a, b), [0, np.pi**2, np.pi**2 / 4], atol=0.1)
    gradient = jax.grad(lambda b: losses.spherical(a, b).sum())(b)
    assert np.isfinite(gradient).all()
    assert (gradient[:2] == 0).all()
    assert gradient[2, 0] == pytest.approx(-np.pi)


def test_the_plain_distance_is_one_less_the_cosine_of_the_angle():
    a, b = losses.unit(jax.random.normal(jax.random.key(0), (2, 8, 5)))
    angle_B = jnp.sqrt(guidance.DISTANCES["spherical"](a, b))
    np.testing.assert_allclose(guidance.DISTANCES["cosine"](a, b), 1 - jnp.cos(angle_B), atol=1e-5)


def test_a_run_trains_resumes_and_draws(tmp_path):
    """Two nets, vectors of the spectral norm, an average of one net, a judge."""
    config = digits_mlp_gan.get_config("debug")
    config.loss.update(spectral_norm=True, augment=("translation",))
    config.evaluators, config.eval_every = dict(digits=dict(num_images=20)), 4
    config.steps, config.save_every = 4, 2
    loop.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/4")  # as if killed before it
    loop.train(config, tmp_path)
    assert [row["step"] for row in runs.rows(tmp_path)] == [1, 2, 3, 4]
    pipe = pipeline.Pipeline.load(str(tmp_path))
    assert set(pipe.predictor.objective.trained) == {"disc", "gen"}
    pictures = pipe(["a handwritten three"] * 3, truncation=0.5)
    assert pictures.shape == (3, 16, 16, 3)
    assert (np.ptp(pictures, axis=-1) == 0).all()  # grey
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert 0 <= events[-1]["digits/accuracy"] <= 1


# --- the model that ships -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return pipeline.Pipeline.load("builtin:shapes-gan")


def test_the_shipped_discriminator_knows_which_caption_is_a_pictures_own(shipped):
    examples = [shapes.make(split="test", size=64)[i] for i in range(64)]
    pictures, captions = ([e[key] for e in examples] for key in ("image", "caption"))
    score = lambda captions: shipped.predictor.run(
        "score", shipped.nets, shipped.predictor.batch(pictures, captions)
    )
    own, others = score(captions), score(captions[1:] + captions[:1])
    assert (own > others).mean() > 0.9
    assert own.mean() - others.mean() > 1


def test_the_shipped_generator_draws_what_captions_say(shipped):
    captions = shapes.make(split="test", size=64, seed=3).captions()
    pictures = shipped(captions, seed=3)
    found = [judge.judge(*pair) for pair in zip(pictures, captions, strict=True)]
    assert np.mean([f["full_match"] for f in found]) > 0.65
    other = shipped(captions, seed=4)
    assert np.abs(pictures.astype(int) - other).mean() > 2  # another noise, another picture


def test_the_way_to_the_next_picture_needs_all_of_them(config, made):
    predictor = pipeline.Predictor(config)
    with pytest.raises(errors.ConfigError, match="reads a batch as a whole"):
        predictor.draw("between", made, {"caption": ["a", "b", "c"]}, share=0.5)


def test_weights_are_not_read_under_another_meaning_of_their_output(tmp_path):
    """A flow model's picture taken for a velocity would be another teacher, without an error."""
    config = shapes_gan_from_flow.get_config("debug")
    config.model.teacher = dict(config.model.gen.to_dict(), prediction="v")
    trained = weights.config_at("builtin:shapes")
    assert trained.loss.prediction == "x"
    with pytest.raises(errors.ConfigError, match="read as 'v', and it was trained as 'x'"):
        weights._check_output("teacher", config, "model", trained)
    config.model.teacher.prediction = "x"
    weights._check_output("teacher", config, "model", trained)
    del config.model.teacher.prediction
    with pytest.raises(errors.ConfigError, match="nothing says what the teacher's output means"):
        distillation.teacher(config)
