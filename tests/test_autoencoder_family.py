"""The family of autoencoders: quantisers, losses, its critic, its evaluator, and what it writes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import shapes_tokenizer
from t2i_jax import errors, loop, losses, objective, pipeline
from t2i_jax.data import shapes
from t2i_jax.evaluators import reconstruction
from t2i_jax.models import quantise
from t2i_jax.models.types import Moments
from t2i_jax.objectives import autoencoder as family_of
from t2i_jax.objectives.parts import autoencoders
from t2i_jax.pretrained import autoencoder, opener, writer
from t2i_jax.quality import statistics
from tests import runs

LEVELS = (8, 5, 5, 5)
SIZES = dict(widths=(4, 6), groups=2, depth=1, attends=False)
KINDS = {
    "kl": dict(channels=3),
    "vq": dict(channels=4, entries=11, entry_channels=3),
    "fsq": dict(channels=4, levels=(4, 3)),
}
SLOW_VQ = pytest.param("vq", marks=pytest.mark.slow)
FLAT = dict(widths=(4,))  # which compiles faster
HELD_OUT = dict(source="shapes", split="test", size=10, res=16)


def config(kind="fsq", loss=None, critic=False, eye=False, **sizes):
    config = shapes_tokenizer.get_config("debug")
    config.res, config.batch_size = 8, 3
    config.model = dict(autoencoder=dict(kind=kind, **SIZES | KINDS[kind] | sizes))
    if critic:
        config.model.critic = dict(widths=(4, 6))
    if eye:
        config.model.eye = dict(tower="convolutional", width=8, depth=1, projected=4)
    config.loss = loss or {}
    return config


def pictures(n=3, seed=0):
    image = np.random.default_rng(seed).uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32)
    return {
        "image": image,
        "index": np.arange(n, dtype=np.int32),
        "weight": np.ones(n, np.float32),
    }


KEY = jax.random.key(0)


def value_and_slope(family, i=0):
    """Loss number i, compiled: (nets, batch, step) -> (value, metrics), its nets' gradients."""
    loss = family.losses[i]

    def value(params, nets, batch, step):
        own = {name: {"params": params[name]} for name in loss.nets}
        value, aux = loss.fn({**nets, **own}, batch, KEY, step)
        return value, dict(aux.metrics)

    slope = jax.jit(jax.value_and_grad(value, has_aux=True))
    own = lambda nets: {name: nets[name]["params"] for name in loss.nets}
    return lambda nets, batch, step=0: jax.device_get(slope(own(nets), nets, batch, step))


@pytest.fixture(scope="module")
def made():
    """Kind -> family, nets as after some training, and its compiled loss."""
    found = {}
    for kind in KINDS:
        # Weights so large that each term shows in the loss.
        family = objective.make(config(kind, dict(kl=1.0, entropy=0.5, revival=0.7)))
        nets = runs.filled(family.init, KEY, pictures())
        found[kind] = family, nets, value_and_slope(family)
    return found


# --- quantisers as functions ----------------------------------------------------------------------


def test_every_code_has_levels_of_its_own_and_comes_back():
    code = np.arange(quantise.count(LEVELS))
    value = quantise.value_of(quantise.digits_of(code, LEVELS), LEVELS)
    assert len(np.unique(value, axis=0)) == len(code) == 1000
    assert (np.abs(value).max(0) == 1).all()
    again = quantise.digits(value, LEVELS)
    np.testing.assert_array_equal(quantise.number_of(again, LEVELS), code)
    np.testing.assert_array_equal(quantise.value_of(again, LEVELS), value)  # idempotent


def test_numbers_go_to_the_nearest_level_and_beyond_the_bounds_to_the_last():
    x = np.random.default_rng(0).uniform(-1.4, 1.4, (200, 4)).astype(np.float32)
    found = quantise.value_of(quantise.digits(x, LEVELS), LEVELS)
    for c, count in enumerate(LEVELS):
        level = np.linspace(-1, 1, count)
        nearest = level[np.abs(x[:, c, None] - level).argmin(1)]
        np.testing.assert_allclose(found[:, c], nearest, atol=1e-6)


def test_the_gradient_goes_straight_through():
    x = jnp.array([0.3, -0.8, 0.1])
    steps = lambda x: quantise.straight_through(x, jnp.round(2 * x) / 2)
    np.testing.assert_allclose(steps(x), [0.5, -1, 0], atol=1e-7)
    weight = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda x: (weight * steps(x)).sum())(x), weight)


def test_shares_and_perplexity_are_those_of_cases_by_hand():
    code = np.array([[0, 0], [1, 2], [7, 7]])
    share = quantise.shares(code, np.array([[1, 1], [1, 1], [0, 0]], np.float32), 8)
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25, 0, 0, 0, 0, 0])
    assert np.exp(quantise.entropy(share)) == pytest.approx(2**1.5, rel=1e-5)
    assert np.exp(quantise.entropy(np.full(8, 1 / 8))) == pytest.approx(8, rel=1e-5)
    assert not np.any(quantise.shares(code, np.zeros((3, 2)), 8))


def test_the_entropy_is_best_where_places_are_sure_and_codes_used_alike():
    ones = np.ones(4, np.float32)
    sure = 100 * np.eye(4, dtype=np.float32)
    assert quantise.entropy_gap(sure, ones) == pytest.approx(-np.log(4), abs=1e-4)
    assert quantise.entropy_gap(sure[[0, 0, 0, 0]], ones) == pytest.approx(0, abs=1e-4)
    assert quantise.entropy_gap(0 * sure, ones) == pytest.approx(0, abs=1e-4)
    two = np.array([1, 1, 0, 0], np.float32)
    assert quantise.entropy_gap(sure, two) == pytest.approx(-np.log(2), abs=1e-4)
    slope = jax.grad(lambda x: quantise.entropy_gap(x, ones))(sure)  # chances of 0
    assert np.isfinite(slope).all()


def test_an_unused_entry_alone_moves_to_its_nearest_latent():
    entry = jnp.array([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    latent, ones = jnp.array([[0.1, 0.0], [0.0, 1.0], [1.0, 0.9], [8.0, 8.0]]), np.ones(4)
    some = np.array([1, 1, 1, 0], np.float32)  # the last one does not count
    slopes = lambda weight: jax.grad(quantise.unused_error, (0, 1))(latent, entry, weight)
    of_latents, of_entries = slopes(some)
    assert not np.any(of_latents)
    np.testing.assert_allclose(of_entries, [[0, 0], [4 / 3, 4.1 / 3], [8 / 3, 8.1 / 3]], rtol=1e-5)
    assert not np.any(slopes(ones)[1][2])  # now it is used
    assert not np.any(slopes(0 * ones)[1])


# --- quantised autoencoders -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SLOW_VQ, "fsq"])
def test_pictures_of_codes_are_the_reconstructions(made, kind):
    family, nets, _ = made[kind]
    net = autoencoders.build(dict(kind=kind, **SIZES, **KINDS[kind]))
    assert (net.factor, net.num_codes) == (2, {"vq": 11, "fsq": 12}[kind])

    @jax.jit
    def all_of(nets, batch):
        own = nets["autoencoder"]
        code = family.predict["codes"](nets, batch, KEY)
        latent = net.apply(own, batch["image"]).mean_BHWC
        nearest = net.apply(own, latent, method="quantise")
        twice = net.apply(own, nearest, method="quantise")
        again = net.apply(own, code, method="of_codes")
        slope = jax.grad(lambda z: (net.apply(own, z, method="decode") ** 2).sum())(latent)
        inner = autoencoder.Autoencoder.decode
        direct = jax.grad(lambda z: (net.apply(own, z, method=inner) ** 2).sum())(nearest)
        share = family.predict["code_shares"](nets, batch, KEY)
        picture = family.predict["reconstruct"](nets, batch, KEY)
        return code, again, picture, nearest, twice, slope, direct, share

    batch = pictures()
    batch["weight"][2] = 0
    code, again, picture, nearest, twice, slope, direct, share = all_of(nets, batch)
    assert code.dtype == jnp.int32
    assert code.shape == (3, 4, 4)
    assert len(np.unique(code)) > 2
    np.testing.assert_allclose(np.clip(again, -1, 1), picture, atol=1e-5)
    np.testing.assert_array_equal(twice, nearest)
    # The gradient is that at the code's values, as if there were no choice of codes.
    assert np.abs(slope).max() > 0
    np.testing.assert_allclose(slope, direct, rtol=1e-3, atol=1e-4 * np.abs(direct).max())
    wanted = np.bincount(np.ravel(code[:2]), minlength=net.num_codes) / code[:2].size
    np.testing.assert_allclose(share, wanted, atol=1e-6)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", SLOW_VQ, "fsq"])
def test_an_example_of_weight_zero_counts_nothing(made, kind):
    _, nets, loss = made[kind]
    batch = pictures()
    batch["weight"][1] = 0
    other = batch | {"image": batch["image"].copy()}
    other["image"][1] = 0.3
    one, two = loss(nets, batch), loss(nets, other)
    assert one[0][0] == two[0][0]
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])
    assert loss(nets, pictures())[0][0] != one[0][0]
    nothing = batch | {"weight": np.zeros(3, np.float32)}
    assert loss(nets, nothing)[0][0] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(nets, nothing)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_weighted_terms(made, kind):
    (value, metrics), slopes = made[kind][2](made[kind][1], pictures())
    weights = dict(squared=1, absolute=1, kl=1, codebook=1, commitment=0.25)
    weights |= dict(entropy=0.5, unused=0.7)
    terms = {name: x for name, x in metrics.items() if name not in ("psnr", "latent_rms")}
    assert (
        set(terms)
        == {"squared", "absolute"}
        | {
            "kl": {"kl"},
            "vq": {"codebook", "commitment", "entropy", "unused"},
            "fsq": set(),
        }[kind]
    )
    assert value == pytest.approx(sum(weights[name] * x for name, x in terms.items()), rel=1e-5)
    assert metrics["psnr"] == pytest.approx(10 * np.log10(4 / metrics["squared"]), rel=1e-4)
    still = [p for p, g in jax.tree_util.tree_leaves_with_path(slopes) if not np.any(g)]
    assert not still


def test_the_divergence_is_that_of_normals():
    zero, two = np.zeros((2, 1, 1, 3)), np.full((2, 1, 1, 3), 2.0)
    assert not np.any(family_of.divergence(Moments(zero, zero)))
    np.testing.assert_allclose(family_of.divergence(Moments(two, zero)), 3 * 2.0)  # mean²/2 each
    wide = 0.5 * (np.exp(2) - 1 - 2)
    np.testing.assert_allclose(family_of.divergence(Moments(zero, two)), 3 * wide, rtol=1e-6)


def test_an_examples_noise_is_its_own(made):
    _, nets, loss = made["kl"]
    batch = pictures()
    alone = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(3)]
    parts = [loss(nets, one)[0][0] for one in alone]
    assert loss(nets, batch)[0][0] == pytest.approx(np.mean(parts), rel=1e-5)
    renamed = loss(nets, alone[0] | {"index": np.array([7])})[0][0]
    assert abs(renamed - parts[0]) > 1e-5  # other noise


def test_only_codebooks_that_are_kept_in_use_compare_examples():
    compares = lambda *args: objective.make(config(*args)).losses[0].compares
    assert compares("vq", dict(entropy=0.1, revival=0.0))
    assert compares("vq", dict(entropy=0.0, revival=1.0))
    assert not compares("vq", dict(entropy=0.0, revival=0.0))
    assert not compares("fsq", dict(entropy=1.0))
    assert not compares("kl", {})


def test_the_critic_is_silent_before_its_delay():
    judged = objective.make(config("fsq", dict(delay=5), critic=True, **FLAT))
    assert judged.trained == ("autoencoder", "critic")
    nets, batch = runs.filled(judged.init, KEY, pictures()), pictures()
    loss, critic = value_and_slope(judged), value_and_slope(judged, 1)
    (early, found), slope = loss(nets, batch, 4)
    assert found["adversarial"] > 0
    assert early == pytest.approx(found["squared"] + found["absolute"], rel=1e-6)
    (late, _), other = loss(nets, batch, 5)
    assert late == pytest.approx(early + 0.1 * found["adversarial"], rel=1e-5)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), slope, other)))
    (value, _), slope = critic(nets, batch, 4)
    assert value == 0
    assert not any(map(np.any, jax.tree.leaves(slope)))
    (value, metrics), slope = critic(nets, batch, 5)
    assert value > 0.5 * metrics["r1"] > 0
    assert all(map(np.any, jax.tree.leaves(slope)))
    batch["weight"][1] = 0
    changed = batch | {
        "image": np.where(np.arange(3)[:, None, None, None] == 1, 0.2, batch["image"])
    }
    assert critic(nets, batch, 5)[0][0] == critic(nets, changed, 5)[0][0]


def test_a_frozen_network_compares_pictures():
    seen = objective.make(config("fsq", eye=True, **FLAT))
    assert seen.trained == ("autoencoder",)
    assert seen.training_only == ("eye",)
    nets = runs.filled(seen.init, KEY, pictures())
    (value, found), _ = value_and_slope(seen)(nets, pictures())
    assert found["perceptual"] > 0
    parts = found["squared"] + found["absolute"] + found["perceptual"]
    assert value == pytest.approx(parts, rel=1e-5)


def test_maps_are_compared_without_their_scale():
    a, b = (np.random.default_rng(i).normal(size=(2, 4, 4, 8)).astype(np.float32) for i in (0, 1))
    np.testing.assert_allclose(losses.map_error([a], [3 * a]), 0, atol=1e-6)
    far = losses.map_error([a], [b])
    assert far.shape == (2,)
    np.testing.assert_allclose(losses.map_error([a, a], [a, b]), far / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="vqq"), "did you mean 'vq'"),
        (dict(width=3), "did you mean 'widths'"),
        (dict(widths=(4, 7)), "in 2 groups"),
        (dict(widths=()), "in 2 groups"),
        (dict(groups=0), "groups is 0"),
        (dict(levels=(4, 1)), "levels is"),
        (dict(levels=()), "make 1 codes"),
        (dict(levels=(1000, 1000, 1000)), "make 1,000,000,000 codes"),
        (dict(widths=(4, 4, 4, 4, 4)), "no multiple of 16"),
    ],
)
def test_what_no_autoencoder_can_be_is_said(changes, message):
    wrong = config()
    wrong.model.autoencoder = {**wrong.model.autoencoder, **changes}
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(wrong)


def test_what_no_critic_or_loss_can_be_is_said():
    wrong = config(critic=True)
    wrong.model.critic.widths = (4, 4, 4, 4, 4)
    with pytest.raises(errors.ConfigError, match="do not fit pictures of 8 × 8"):
        objective.make(wrong)
    with pytest.raises(errors.ConfigError, match="did you mean 'entropy'"):
        objective.make(config("vq", dict(entropi=1)))
    with pytest.raises(errors.ConfigError, match="delay"):
        objective.make(config("vq", dict(delay=-1)))
    wrong = config()
    wrong.model.crtic = dict(widths=(4,))
    with pytest.raises(errors.ConfigError, match="did you mean 'critic'"):
        objective.make(wrong)


# --- the evaluator --------------------------------------------------------------------------------


def test_objects_are_what_is_not_of_the_ground():
    whole = np.full((3, 16, 16, 3), 150, np.uint8)
    whole[0, 2:4, 2:4], whole[1, 5, 5] = (220, 30, 30), (150, 150, 151)
    again = whole.copy()
    again[0, 2, 2, 0] -= 60  # one of 12 numbers of the object
    again[0, 10:] += 20  # the ground
    again[1, 5, 5] += 3
    found = reconstruction.psnr_of_objects(whole, again)
    wanted = [10 * np.log10(255**2 / (60**2 / 12)), 10 * np.log10(255**2 / 9)]
    np.testing.assert_allclose(found, wanted)  # the third picture has none
    metrics = reconstruction.measured(whole, again)
    assert metrics["psnr_objects"] == pytest.approx(np.mean(wanted))
    assert metrics["psnr"] < reconstruction.BEST
    assert "usage" not in metrics
    same = reconstruction.measured(whole[2:], whole[2:])
    assert same["psnr"] == reconstruction.BEST
    assert np.isnan(same["psnr_objects"])


def test_an_evaluation_counts_every_picture_once():
    """Ten pictures in batches of four: the last two are filled up, and copies do not count."""
    source = shapes.make(split="test", size=10, res=16)
    weights = []

    def code_shares(nets, batch):
        weights.append(batch["weight"])
        return np.full(4, 1 / 4) if len(weights) < 3 else np.array([0, 0, 1, 0])

    predict = {
        "batch": lambda images, captions: {"image": np.stack(images) / 127.5 - 1},
        "reconstruct": lambda nets, batch: batch["image"],
        "code_shares": code_shares,
    }
    run = reconstruction.make(predict, data=HELD_OUT, num_images=64, batch_size=4)
    found = run({}, 0)()
    assert set(found) == {*run.names, "grid"}
    assert found["num_images"] == 10
    assert [w.tolist() for w in weights] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert found["usage"] == 1
    share = np.array([0.2, 0.2, 0.4, 0.2])
    assert found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert found["grid"].shape == (10, 32, 16, 3)
    np.testing.assert_array_equal(found["grid"][9, :16], source[9]["image"])
    with pytest.raises(errors.ConfigError, match="no prediction 'reconstruct'"):
        reconstruction.make({}, data=HELD_OUT)


def test_networks_compare_images_with_their_reconstructions(monkeypatch):
    """The distances are those of the networks' columns, here of the images' mean colours."""

    class Extractor:
        def __init__(self, source):
            assert source == "some network"

        def __call__(self, pictures, wanted):
            return {name: pictures.mean((1, 2)).astype(np.float32) for name in wanted}

    class Perceptual(Extractor):
        def distance(self, x_NHWC, y_NHWC):
            return np.abs(x_NHWC.astype(float) - y_NHWC).mean((1, 2, 3))

    monkeypatch.setattr(reconstruction.networks, "Extractor", Extractor)
    monkeypatch.setattr(reconstruction.networks, "Perceptual", Perceptual)
    predict = {
        "batch": lambda images, captions: {"image": np.stack(images) / 127.5 - 1},
        "reconstruct": lambda nets, batch: np.minimum(batch["image"] + nets, 1),
    }
    ask = dict(data=HELD_OUT, batch_size=4, extractor="some network", perceptual="some network")
    run = reconstruction.make(predict, **ask)
    equal, brighter = run(0.0, 0)(), run(20 / 127.5, 0)()
    assert set(equal) == {*run.names, "grid"}
    assert equal["fd"] == pytest.approx(0, abs=1e-6)
    assert equal["lpips"] == 0
    whole = np.stack([shapes.make(split="test", size=10, res=16)[i]["image"] for i in range(10)])
    again = np.minimum(whole + 20.0, 255)
    sets = [statistics.of(x.mean((1, 2))) for x in (whole, again)]
    assert brighter["fd"] == pytest.approx(statistics.frechet(*sets), rel=1e-3)
    assert brighter["lpips"] == pytest.approx((again - whole).mean(), rel=1e-6)
    with pytest.raises(errors.ConfigError, match="one picture has no Fréchet distance"):
        reconstruction.make(predict, **ask, num_images=1)


# --- runs and files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A :debug run of a codebook, resumed once."""
    workdir = tmp_path_factory.mktemp("autoencoder")
    config = shapes_tokenizer.get_config("debug,vq")
    config.model.autoencoder.update(SIZES | FLAT)
    config.optim.autoencoder.decay = "constant"  # one program, however many the steps
    config.steps, config.log_every, config.batch_size = 1, 1, 4
    loop.train(config, workdir)
    config.evaluators = dict(reconstruction=dict(data=HELD_OUT, batch_size=4))
    config.steps = config.eval_every = 2
    config.best = "reconstruction/psnr_objects"
    loop.train(config, workdir)
    return workdir


@pytest.mark.slow
def test_a_run_trains_resumes_and_shows_reconstructions(trained):
    assert [row["step"] for row in runs.rows(trained)] == [1, 2]
    (event,) = map(json.loads, (trained / "events.jsonl").read_text().splitlines())
    assert event["reconstruction/psnr"] > 0
    assert 0 < event["reconstruction/usage"] <= 1
    with Image.open(trained / "samples" / "step_00000002_reconstruction_grid.png") as grid:
        assert grid.size == (4 * 16 + 3 * 2, 3 * 32 + 2 * 2)  # ten pairs
    pipe = pipeline.Pipeline.load(str(trained), step="best")
    again = pipe.evaluate("reconstruction", data=HELD_OUT, batch_size=4)
    assert again["psnr_objects"] == pytest.approx(event["reconstruction/psnr_objects"])
    image = shapes.make(split="test", size=2, res=16)[1]["image"]
    drawn = pipe.draw("reconstruct", {"image": [image]})
    assert np.abs(drawn[0].astype(int) - again["grid"][1, 16:]).max() <= 1
    with pytest.raises(errors.ConfigError, match="has no prediction 'sample'"):
        pipe(["a red circle"])


@pytest.mark.slow
def test_the_command_writes_a_run_as_a_folder_of_diffusers(trained, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "t2i_jax", "export", "--format=diffusers", "--dtype=float32"]
    command += [f"--workdir={trained}", f"--output={tmp_path / 'vq'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    net = diffusers.VQModel.from_pretrained(tmp_path / "vq")
    assert net.config.num_vq_embeddings == 1024


@pytest.mark.parametrize("kind", ["kl", SLOW_VQ])
def test_diffusers_reconstructs_the_same(made, kind, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    family, nets, _ = made[kind]
    _, net = family_of.diffusers(config(kind))
    writer.autoencoder(net, nets["autoencoder"]["params"], tmp_path, "float32")
    kinds = {"kl": diffusers.AutoencoderKL, "vq": diffusers.VQModel}
    theirs, said = kinds[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    batch = pictures()
    ours = jax.jit(family.predict["reconstruct"])(nets, batch, KEY)
    with torch.inference_mode():
        image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
        wanted = theirs.eval()(image).sample.permute(0, 2, 3, 1).clamp(-1, 1).numpy()
    assert np.ptp(wanted) > 0.5
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    # Here it opens with the same parameters and sizes.
    checkpoint = opener.open(str(tmp_path))
    assert checkpoint.module(Moments) == net
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoint.load(jax.eval_shape(lambda: nets["autoencoder"])),
        nets["autoencoder"],
    )


@pytest.mark.parametrize(
    "sizes",
    [
        dict(kind="kl", channels=5, depth=2, quant=False, post_quant=False, shift_factor=0.1),
        dict(kind="kl", widths=(6, 8, 4), groups=2, attends=False, scaling_factor=0.7, res=64),
        dict(kind="vq", entries=7, entry_channels=2, channels=3, scaling_factor=0.5),
    ],
)
def test_every_size_is_written_and_read_back(sizes):
    net = autoencoders.build(dict(widths=(4, 6), groups=2) | sizes)
    said = json.loads(json.dumps(autoencoder.to_config(net)))
    assert autoencoder.from_config({"model_type": said["_class_name"]} | said) == net


def test_what_diffusers_has_no_network_for_is_not_written(made, tmp_path):
    for kind, changes in (("fsq", {}), ("vq", dict(quant=False)), ("vq", dict(shift_factor=0.1))):
        other = config(kind)
        other.model.autoencoder = {**other.model.autoencoder, **changes}
        _, net = family_of.diffusers(other)
        with pytest.raises(errors.ConfigError, match="diffusers has no autoencoder"):
            writer.autoencoder(net, {}, tmp_path / "new", "float32")
    assert not (tmp_path / "new").exists()
