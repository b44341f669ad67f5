"""Protocols: what they draw, measure and name; folders of pictures; evaluators behind a run."""

import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from t2i_jax import errors, images, loop, pipeline, plugins
from t2i_jax.data import pictures
from t2i_jax.data import shapes as world
from t2i_jax.evaluators import protocol as evaluator
from t2i_jax.pretrained import hf
from t2i_jax.quality import extractor, protocol, statistics
from t2i_jax.run import checkpoint, hooks, metrics, watchdog
from tests import runs, test_conditioning, test_convnets, test_vits
from tests.runs import config
from tests.test_shapes_judge import painter

SMALL = {
    "data": [{"source": "shapes", "split": "test", "size": 12}],
    "num_images": 12,
    "metrics": {"shapes": {}},
}


def write(tmp_path, **changes):
    """A protocol file."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps(SMALL | changes))
    return str(path)


TEXTS = world.make(split="test", size=12).captions()


@pytest.fixture(scope="session")
def dual(tmp_path_factory):
    """A tiny CLIP checkpoint, which is an extractor, too."""
    folder = tmp_path_factory.mktemp("clip")
    test_vits.by_golden("clip, both towers", folder)
    test_conditioning.small_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(evaluator.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def real(nets, texts, **options):
    """Draws the test split itself."""
    by_text = {e["caption"]: e["image"] for e in world.make(split="test", size=13, res=32)}
    return np.stack([by_text[text] for text in texts])


def measured(tmp_path, sample=real, **changes):
    run = evaluator.make({"sample": sample}, protocol=write(tmp_path, **changes))
    found = run({}, 0)()
    assert {*found} - {"definition"} <= {*run.names}
    return found


# --- protocols ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(protocol.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_our_protocols_read(path):
    data = "/nowhere" if "null" in path.read_text() else None
    assert protocol.read(path.stem, path=data).num_images > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_image": 3}, "did you mean 'num_images'"),
        ({"num_images": 0}, "num_images is missing"),
        ({"num_images": 2.5}, "a whole number"),
        ({"data": [{"split": "test"}]}, "dictionaries that each name"),
        ({"metrics": {"shapes": 1}}, "an object"),
        ({"metrics": {"shpaes": {}}}, "did you mean 'shapes'"),
        ({"metrics": {"kid": {"subset": 3}}, "extractor": "x"}, "did you mean 'subsets'"),
        ({"metrics": {"kid": {}}, "extractor": "x"}, "kid with subset_size 1000 of 12 pictures"),
        ({"metrics": {"fid": {}}}, "names none as extractor"),
        ({"metrics": {"clip_score": {}}}, "names none as clip"),
        ({"metrics": {"memorised": {}}, "extractor": "x"}, "training pictures"),
        ({"data": [{"source": "folder", "path": None}]}, "give its folder"),
        ({"data": [{"source": "shape"}]}, "did you mean 'shapes"),
        ({"per_caption": 5}, "multiple of per_caption"),
        ({"metrics": {"fid": {}}, "extractor": "inception"}, "t2i_jax convert inception"),
    ],
)
def test_what_is_wrong_with_a_protocol_is_said_before_anything_is_drawn(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setenv("T2I_JAX_WEIGHTS", str(tmp_path))
    with pytest.raises(errors.Error, match=message):
        evaluator.make({}, protocol=write(tmp_path, **changes))


def test_an_unknown_protocol_names_those_there_are():
    with pytest.raises(errors.ConfigError, match="did you mean 'shapes'"):
        protocol.read("shape")


def test_a_protocol_that_is_no_json_is_not_said_to_be_missing(tmp_path):
    path = tmp_path / "own.json"
    for text in ("{num_images: 3}", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(errors.ConfigError, match="not readable as JSON: "):
            protocol.read(str(path))


def test_captions_are_chosen_by_the_seed_and_whole_sets_keep_their_order(tmp_path):
    read = lambda **changes: protocol.read(write(tmp_path, **changes)).captions()
    whole = world.make(split="test", size=12).captions()
    assert read() == whole
    some = read(num_images=5)
    assert some != whole[:5]
    assert set(some) < set(whole)
    assert some == read(num_images=5) != read(num_images=5, seed=1)
    assert read(num_images=30)[:24] == whole * 2
    assert read(num_images=6, per_caption=3) == [t for t in read(num_images=2) for _ in range(3)]
    two = [{"source": "shapes", "split": s, "size": 3} for s in ("test", "heldout")]
    held_out = world.make(split="heldout", size=3).captions()
    assert read(data=two, num_images=6) == world.make(split="test", size=3).captions() + held_out


def test_changes_show_in_the_name_and_the_hash(tmp_path):
    plain, changed = (protocol.read(write(tmp_path), **c) for c in ({}, {"seed": 3}))
    assert (plain.name, changed.name) == ("own", "own seed=3")
    assert plain.sha256 != changed.sha256
    assert plain.sha256 == plain._replace(name="other").sha256  # a name measures nothing
    stored = json.loads(json.dumps(plain._asdict()))
    assert protocol.digest(stored) == plain.sha256


# --- measuring ------------------------------------------------------------------------------------


def test_pictures_that_show_what_captions_say_are_all_right_whatever_the_batch(tmp_path):
    sample = painter()
    run = evaluator.make({"sample": sample}, protocol=write(tmp_path), batch_size=5)
    assert run("nets", 0)()["full_match"] == 1.0
    seen = [(nets, len(texts), options["index"].tolist()) for nets, texts, options in sample.calls]
    ends = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 11, 11, 11]]  # one program for all
    assert seen == [("nets", 5, index) for index in ends]


def test_real_pictures_are_at_no_distance_and_harm_is_at_some(tmp_path, dual):
    ask = dict(
        extractor=str(dual), metrics={"fid": {}, "kid": dict(subset_size=12), "manifold": {}}
    )
    label = dual.name
    same = measured(tmp_path, **ask)
    assert same[f"fd-{label}"] == 0
    assert same[f"precision-{label}"] == same[f"recall-{label}"] == 1
    assert {key.rpartition("-")[0] or key for key in same} >= {"fd", "kd", "kd_spread", "coverage"}
    noise = np.random.default_rng(0).normal(size=(12, 32, 32, 3))
    harmed = lambda scale: (
        lambda *args, **options: np.clip(real(*args) + scale * noise, 0, 255).astype(np.uint8)
    )
    levels = [measured(tmp_path, harmed(s), **ask)[f"fd-{label}"] for s in (0, 8, 16, 32, 64)]
    assert levels == sorted(levels)
    assert levels[1] > 0


def test_features_of_real_pictures_are_kept_and_known_by_what_made_them(
    tmp_path, dual, cache, monkeypatch
):
    ask = dict(extractor=str(dual), metrics={"fid": {}})
    first = measured(tmp_path, **ask)
    assert len(list(cache.rglob("*.npz"))) == 1
    calls, plain = [], extractor.Extractor.__call__

    def counting(self, some, wanted):
        calls.append(len(some))
        return plain(self, some, wanted)

    monkeypatch.setattr(extractor.Extractor, "__call__", counting)
    assert measured(tmp_path, **ask) == first
    assert calls == [12]  # the drawn ones alone
    measured(tmp_path, **ask, resize="legacy_pytorch")
    measured(tmp_path, **ask, res=16)
    more = [{"source": "shapes", "split": "test", "size": 13}]
    measured(tmp_path, real, **ask, data=more)
    both = {"extractor": str(dual), "clip": str(dual)}
    assert "cmmd-" + dual.name in measured(tmp_path, **both, metrics={"fid": {}, "cmmd": {}})
    measured(tmp_path, **both, metrics={"fid": {}, "clip_score": {}})  # fewer columns of the same
    assert len(list(cache.rglob("*.npz"))) == 6
    for path in cache.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(errors.DataError, match="make the file again"):
        measured(tmp_path, **ask)


def test_a_mean_and_covariance_of_others_stand_for_the_real_pictures(tmp_path, dual):
    ask = dict(extractor=str(dual), metrics={"fid": {}})
    shown = [e["image"] for e in world.make(split="heldout", size=20, res=32)]
    features = extractor.Extractor(str(dual))(shown, ["pooled"])["pooled"].astype(np.float64)
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    run = evaluator.make(
        {"sample": real}, protocol=write(tmp_path, **ask), reference=str(path), batch_size=12
    )
    drawn = extractor.Extractor(str(dual))(real({}, TEXTS), ["pooled"])["pooled"]
    wanted = statistics.frechet(statistics.of(drawn), statistics.of(features))
    (got, definition) = run({}, 0)().values()
    assert definition == protocol.read(str(tmp_path / "own.json")).sha256[:8]
    assert got == pytest.approx(wanted, rel=1e-6)
    more = write(tmp_path, **ask | {"metrics": {"fid": {}, "manifold": {}}})
    with pytest.raises(errors.ConfigError, match="not for"):
        evaluator.make({"sample": real}, protocol=more, reference=str(path))({}, 0)


def test_features_do_not_depend_on_the_batch_and_rows_of_processes_are_woven(dual):
    shown = [e["image"] for e in world.make(size=7, res=20)]
    whole = extractor.Extractor(str(dual))(shown, ["pooled"])["pooled"]
    for i in (0, 6):
        alone = extractor.Extractor(str(dual))(shown[i : i + 1], ["pooled"])["pooled"]
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-5, atol=1e-6)
    rows_PN = np.arange(12).reshape(4, 3).T  # three processes, rows i·3 + p
    assert extractor._interleaved(rows_PN).tolist() == list(range(12))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """LPIPS with numbers of a rule, where converted weights lie."""
    folder = tmp_path / "weights" / "lpips"
    folder.mkdir(parents=True)
    tensors = test_convnets.state("lpips")
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    (folder / "config.json").write_text('{"model_type": "lpips_vgg"}')
    monkeypatch.setenv("T2I_JAX_WEIGHTS", str(folder.parent))


def test_pictures_are_compared_with_those_of_their_captions(tmp_path, weights):
    ask = dict(metrics={"psnr": {}, "ssim": {}}, num_images=6)
    found = measured(tmp_path, **ask)
    assert (found["psnr"], found["ssim"]) == (100.0, 1.0)  # exact copies
    darker = lambda *args, **options: real(*args) // 2
    harmed = measured(tmp_path, darker, **ask | {"metrics": {"psnr": {}, "ssim": {}, "lpips": {}}})
    assert harmed["psnr"] < 20
    assert harmed["ssim"] < 0.9
    assert harmed["lpips"] > 0.01


def test_diversity_is_among_the_pictures_of_one_caption(tmp_path, weights):
    ask = dict(metrics={"lpips_diversity": {}}, num_images=6, per_caption=3)
    rng = np.random.default_rng(0)
    noisy = lambda *args, **options: (
        real(*args) // 2 + rng.integers(0, 99, (6, 32, 32, 3), np.uint8)
    )
    assert measured(tmp_path, noisy, **ask)["lpips_diversity"] > 0.01
    ask["metrics"] = {"diversity": {}}
    found = measured(tmp_path, noisy, **ask)["diversity"]
    # of three draws from 0 … 98, the variance about their own mean
    assert found == pytest.approx(np.sqrt(2 / 3 * (99**2 - 1) / 12) / 255, rel=0.05)
    assert measured(tmp_path, **ask)["diversity"] == 0
    with pytest.raises(errors.ConfigError, match="several pictures of a caption"):
        measured(tmp_path, **ask | {"per_caption": 1})


def test_pictures_of_several_sizes_are_not_compared_one_by_one(tmp_path):
    ours = protocol.read(write(tmp_path, metrics={"psnr": {}}))
    sizes = [np.zeros((n, n, 3), np.uint8) for n in (32, 16)]
    with pytest.raises(errors.DataError, match="several sizes"):
        evaluator.Measure(ours, evaluator.Networks(ours), [(sizes, TEXTS[:2])])


def test_a_rectangle_is_judged_by_its_middle_square_as_real_pictures_are(tmp_path, dual, caplog):
    ask = dict(metrics={"fid": {}, "psnr": {}}, extractor=str(dual))
    ours = protocol.read(write(tmp_path, **ask))
    bars = ((0, 0), (0, 0), (9, 9), (0, 0))
    wide = np.pad(real({}, TEXTS), bars, constant_values=255)
    tall = wide.transpose(0, 2, 1, 3)
    nets = evaluator.Networks(ours)
    found = evaluator.Measure(ours, nets, [(list(wide), TEXTS)]).metrics()
    assert found == {f"fd-{dual.name}": 0, "psnr": 100}
    assert "the middle square is judged" in caplog.text
    found = evaluator.Measure(ours, nets, [(list(tall), TEXTS)]).metrics()
    assert found[f"fd-{dual.name}"] > 0  # turned by a quarter


def test_the_name_of_published_weights_is_theirs_alone(tmp_path, dual):
    folder = shutil.copytree(dual, tmp_path / "inception")
    label = extractor.Extractor(str(folder)).label
    assert re.fullmatch("inception-[0-9a-f]{8}", label)
    found = measured(tmp_path, metrics={"fid": {}}, extractor=str(folder))
    assert found[f"fd-{label}"] == 0
    config = json.loads((folder / hf.CONFIG).read_text())
    config |= {hf.MADE_OF: {"a.pth": "6726825d" + "0" * 56}, hf.WRITTEN: "0" * 64}
    (folder / hf.CONFIG).write_text(json.dumps(config))
    assert extractor.Extractor(str(folder)).label == label  # of other weights
    config[hf.WRITTEN] = hf.sha256(folder / hf.WEIGHTS)
    (folder / hf.CONFIG).write_text(json.dumps(config))
    moved = folder.rename(tmp_path / "elsewhere")
    assert extractor.Extractor(str(moved)).label == "inception"


def test_towers_of_two_spaces_are_no_dual_encoder(tmp_path, dual):
    folder = shutil.copytree(dual, tmp_path / "two")
    config = json.loads((folder / hf.CONFIG).read_text())
    width = config.pop("projection_dim")
    for name, own in (("text_config", width + 1), ("vision_config", width)):
        config[name]["projection_dim"] = own
    (folder / hf.CONFIG).write_text(json.dumps(config))
    wanted = f"vectors of {width + 1} numbers, its image tower of {width}"
    with pytest.raises(errors.ConfigError, match=wanted):
        evaluator.make({}, protocol=write(tmp_path, metrics={"cmmd": {}}, clip=str(folder)))


# --- folders of pictures --------------------------------------------------------------------------


def encoded(image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def test_a_folder_is_judged_as_the_model_that_drew_it(tmp_path):
    folder, texts = tmp_path / "drawn", TEXTS
    folder.mkdir()
    drawn = painter()({}, texts)
    for i, (picture, text) in enumerate(zip(drawn, texts, strict=True)):
        images.save(folder / f"{i:05d}.png", picture, {"prompt": text})
    ours = protocol.read(write(tmp_path))
    nets = evaluator.Networks(ours)
    found = pictures.Pictures(folder)
    got = evaluator.Measure(ours, nets, found.batches(5)).metrics()
    again = evaluator.make({"sample": painter()}, protocol=ours)({}, 0)()
    assert {**got, "definition": ours.sha256[:8]} == again
    before = found.fingerprint
    images.save(folder / "00000.png", drawn[0], {"prompt": texts[1]})
    assert pictures.Pictures(folder).fingerprint != before
    before = pictures.Pictures(folder).fingerprint
    (folder / "00003.txt").write_text(texts[0])
    assert pictures.Pictures(folder).fingerprint != before
    (folder / "00003.txt").unlink()
    (folder / "00003.png").write_bytes(encoded(Image.fromarray(drawn[3])))  # without its prompt
    with pytest.raises(errors.ConfigError, match="no captions"):
        evaluator.Measure(ours, nets, pictures.Pictures(folder).batches(5))


def test_captions_that_a_metric_cannot_use_are_named_before_anything_is_read(tmp_path):
    ours = protocol.read(write(tmp_path))
    nets = evaluator.Networks(ours)
    folder = tmp_path / "drawn"
    folder.mkdir()
    for name, text in {"a": TEXTS[0], "b": "", "c": None, "d": "two red circles"}.items():
        (folder / f"{name}.png").write_bytes(b"no picture")
        if text is not None:
            (folder / f"{name}.txt").write_text(text)
    captions = pictures.Pictures(folder).captions
    with pytest.raises(errors.ConfigError, match=r"2 of 4 .*: b\.png, c\.png"):
        evaluator.check_captions(ours, nets, captions)
    captions = {name: text for name, text in captions.items() if text}
    with pytest.raises(errors.ConfigError, match=r"d\.png \('two red circles'\).*purple"):
        evaluator.check_captions(ours, nets, captions)
    evaluator.check_captions(ours, nets, {"a.png": TEXTS[0]})


def test_the_judge_of_shapes_takes_pictures_of_any_size(tmp_path):
    ours = protocol.read(write(tmp_path, num_images=2))
    nets, texts = evaluator.Networks(ours), TEXTS[:2]
    large = [np.kron(p, np.ones((40, 40, 1), np.uint8)) for p in painter()({}, texts)]
    started = time.perf_counter()
    found = evaluator.Measure(ours, nets, [(large, texts)]).metrics()
    assert found["full_match"] == 1
    assert time.perf_counter() - started < 10
    evaluator.Measure(ours, nets, [([np.zeros((1, 1, 3), np.uint8)] * 2, texts)]).metrics()


def test_odd_pictures_are_taken_and_broken_ones_counted(tmp_path, dual):
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    odd = {
        "grey": colour.convert("L"),
        "palette": colour.convert("P"),
        "alpha": colour.convert("RGBA"),
        "deep": Image.fromarray(rng.integers(0, 2**16, (9, 9), np.uint16)),
        "dot": colour.crop((0, 0, 1, 1)),
        "large": colour.resize((1200, 800)),
    }
    for name, image in odd.items():
        (tmp_path / f"{name}.png").write_bytes(encoded(image))
    whole = encoded(colour)
    for name, data in {"cut": whole[:-60], "empty": b"", "text": b"no picture"}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    found = pictures.Pictures(tmp_path)
    (batch,) = found.batches(16)
    assert [len(p) for p in batch[0]] == [
        20,
        9,
        1,
        20,
        800,
        20,
    ]  # alpha deep dot grey large palette
    assert batch[1] is None
    assert sorted(found.broken) == ["cut.png", "empty.png", "text.png"]
    features = extractor.Extractor(str(dual))(batch[0], ["pooled"])["pooled"]
    assert np.isfinite(features).all()
    for name in odd:
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(errors.DataError, match="none of 3 files"):
        list(pictures.Pictures(tmp_path).batches(2))


# --- behind a run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rated(run, tmp_path_factory):
    """A run whose evaluator likes step 2 best; keeps one more checkpoint than that."""
    workdir, phases, collect = tmp_path_factory.mktemp("rated"), [], hooks.Hooks.collect

    def noting(self, writer, checkpoints, *, before=0):
        phases.extend([watchdog._phases[-1][0]] * bool(before))
        collect(self, writer, checkpoints, before=before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "falls", lambda name: False)  # losses fall: the last were the best
        patch.setattr(hooks.Hooks, "collect", noting)
        loop.train(best_config(steps=6), workdir)
    (workdir / "phases.json").write_text(json.dumps(phases))
    return workdir


def best_config(**changes):
    evaluators = {"held_out_loss": {**LOSS, "batch_size": 4, "num_images": 8}}
    return runs.small(
        **{
            **dict(evaluators=evaluators, eval_every=2, best="held_out_loss/mean", keep=1),
            **dict(prompts=(), save_every=100),
            **changes,
        }
    )


LOSS = dict(data=dict(source="shapes", split="test", size=8, res=16))


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def test_every_evaluation_has_one_row_and_the_best_checkpoint_stays(rated):
    rows = events(rated)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {f"held_out_loss/{i}" for i in range(8)} < rows[0].keys()
    best = max(rows, key=lambda row: row["held_out_loss/mean"])
    kept = sorted(int(p.name) for p in (rated / "checkpoints").iterdir() if p.name.isdecimal())
    assert kept == sorted({best["step"], 6})
    pipe = pipeline.Pipeline.load(str(rated), step="best")
    assert pipe.step == best["step"]
    run = pipe.predictor.evaluator("held_out_loss", **best_config().evaluators.held_out_loss)
    assert run(pipe.nets, 0)()["mean"] == pytest.approx(best["held_out_loss/mean"], rel=1e-5)
    whole = pipe.predictor.evaluator("held_out_loss", **LOSS, batch_size=8)
    assert whole(pipe.nets, 0)()["mean"] == pytest.approx(best["held_out_loss/mean"], rel=1e-4)


def test_a_wait_for_evaluators_counts_as_theirs(rated):
    """Three before saves, the last at the end."""
    assert json.loads((rated / "phases.json").read_text()) == ["hooks"] * 4


def test_without_a_best_checkpoint_none_can_be_asked_for(run):
    with pytest.raises(errors.ConfigError, match=r"config\.best"):
        pipeline.Pipeline.load(str(run), step="best")


def test_parameters_may_be_asked_for_as_they_are(run):
    nets = [pipeline.Pipeline.load(str(run), averaged=a).nets["model"] for a in (True, False)]
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *nets)
    assert max(jax.tree.leaves(apart)) > 0


def test_a_best_that_an_evaluator_does_not_give_is_an_error(tmp_path):
    """One that does not say what it measures, so that only its first results tell."""
    slow = Slow()
    slow.go.set()
    ours = hooks.Hooks(pipeline.Predictor(best_config(evaluators={}, best="slow/y")), tmp_path)
    ours._evaluators = {"slow": slow.evaluator}
    ours.run(2, loop.step.State(0, {}, {}, {}, 0), {}, slow)
    with pytest.raises(errors.ConfigError, match="did you mean 'slow/x'"):
        ours.collect(slow, slow, before=3)


@pytest.mark.parametrize(
    ("name", "metric", "known"),
    [
        *(("held_out_loss", metric, True) for metric in ("mean", "7", "12")),
        *(("shapes", metric, True) for metric in ("full_match", "heldout/num_relation")),
        *(("shapes", metric, False) for metric in ("ful_match", "held/full_match")),
        *(("protocol", metric, metric == "single/count") for metric in ("single/count", "fid")),
        *(("digits", metric, metric == "accuracy") for metric in ("accuracy", "acuracy")),
    ],
)
def test_a_metric_is_known_before_anything_is_drawn(tmp_path, name, metric, known):
    options = dict(held_out_loss=LOSS, shapes=dict(num_images=4), protocol=dict(protocol="shapes"))
    ask = dict(best=f"{name}/{metric}", evaluators={name: options.get(name, {})})
    make = lambda: hooks.Hooks(pipeline.Predictor(best_config(**ask)), tmp_path)
    if known:
        make()
    else:
        with pytest.raises(errors.ConfigError, match=f"unknown metric '{name}/{metric}'"):
            make()


class Slow:
    """Hooks' parts: evaluators that end when they are told."""

    def __init__(self):
        self.go = threading.Event()
        self.rows, self.said = [], []

    def evaluator(self, nets, n):
        return lambda: (self.go.wait(10), {"x": float(n)})[1]

    event = lambda self, n, found: self.rows.append((n, found))
    pause = lambda self: None
    best = lambda self: self.said[-1] if self.said else None

    def set_best(self, step, metric, value):
        self.said.append(dict(step=step, metric=metric, value=value))


def test_evaluators_end_behind_the_training(tmp_path):
    slow = Slow()
    predictor = pipeline.Predictor(best_config(evaluators={}, best="-slow/x"))
    ours = hooks.Hooks(predictor, tmp_path)
    ours._evaluators = {"slow": slow.evaluator}
    empty = loop.step.State(0, {}, {}, {}, 0)
    for n in (2, 4):
        ours.run(n, empty, {}, slow)  # returns at once
    ours.collect(slow, slow)
    assert slow.rows == []
    slow.go.set()
    ours.collect(slow, slow, before=4)  # waits for the first
    assert slow.rows[0] == (2, {"slow/x": 2.0})
    ours.collect(slow, slow, before=5)
    assert slow.rows == [(2, {"slow/x": 2.0}), (4, {"slow/x": 4.0})]
    assert slow.said == [dict(step=2, metric="slow/x", value=2.0)]  # the least


def test_images_of_an_evaluator_are_a_picture_in_samples(tmp_path):
    slow = Slow()
    slow.go.set()
    slow.picture = lambda n, name, grid: slow.said.append((n, name, grid.shape))
    drawn = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    ours = hooks.Hooks(pipeline.Predictor(best_config(evaluators={}, best="")), tmp_path)
    ours._evaluators = {"grid": lambda nets, n: lambda: {"hole": drawn, "error": 0.5}}
    ours.run(2, loop.step.State(0, {}, {}, {}, 0), {}, slow)
    ours.collect(slow, slow, before=3)
    assert slow.rows == [(2, {"grid/error": 0.5})]
    assert slow.said == [(2, "samples_grid_hole", (18, 18, 3))]
    with Image.open(tmp_path / "samples" / "step_00000002_grid_hole.png") as written:
        np.testing.assert_array_equal(np.asarray(written), images.grid(drawn))


@pytest.mark.slow
def test_a_result_lost_with_its_process_is_found_again(tmp_path, monkeypatch):
    small = best_config(best="", steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(hooks.Hooks, "collect", lambda *args, **options: False)  # not yet there
        loop.train(small, tmp_path)
    assert not (tmp_path / "events.jsonl").exists()
    for _ in range(2):
        loop.train(small, tmp_path)
        assert [row["step"] for row in events(tmp_path)] == [2]


def test_broken_pictures_are_left_out_of_the_held_out_loss(tmp_path, caplog):
    for i in range(5):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "1.png").write_bytes(b"<html>")
    told = []
    predict = {
        "batch": lambda image, caption, scale: {"image": image, "index": np.arange(len(caption))},
        "loss_at_times": lambda nets, batch, seed: (
            told.append(batch) or [batch["image"][0][0, 0, 0]]
        ),
    }
    options = dict(data=dict(source="folder", path=str(tmp_path)), batch_size=2)
    assert plugin("held_out_loss", predict, **options)({}, 0)() == {"0": 1.5, "mean": 1.5}
    assert [batch["index"].tolist() for batch in told] == [[0, 1], [2, 3]]  # 0, 2; 3, 4
    assert "1.png" in caplog.text
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"<html>")
    with pytest.raises(errors.DataError, match="all of 5 held-out pictures are broken"):
        plugin("held_out_loss", predict, **options)({}, 0)


def test_held_out_loss_needs_the_prediction():
    with pytest.raises(errors.ConfigError, match="no prediction 'loss_at_times'"):
        plugin("held_out_loss", {}, **LOSS)
    with pytest.raises(errors.ConfigError, match="there is none to choose"):
        plugin("held_out_loss", {"batch": None}, **LOSS)
    with pytest.raises(errors.ConfigError, match="no prediction 'batch'"):
        plugin("held_out_loss", {"batch": None}, prediction="batch", **LOSS)


@pytest.mark.parametrize(
    ("name", "falls"),
    [
        *(("own/fd-lite0", True), ("own/kid_spread", True), ("held_out_loss/3", True)),
        *(("disc/loss", True), ("own/lpips", True), ("own/lpips_diversity", False)),
        *(("digits/distance", True), ("digits/diversity", False)),
        *(("shapes/full_match", False), ("own/precision-lite0", False), ("gen/grad_norm", False)),
    ],
)
def test_less_is_better_of_distances_and_losses(name, falls):
    assert metrics.falls(name) == falls


@pytest.mark.parametrize(
    ("best", "values", "kept"),
    [
        ("own/fd-x", (3, 2, 4), 2),
        ("own/full_match", (3, 2, 4), 4),
        ("-own/full_match", (3, 2, 4), 2),
    ],
)
def test_the_best_is_the_least_or_the_most_as_the_metric_wants(best, values, kept):
    ours = object.__new__(hooks.Hooks)
    ours._config, said = config(best=best), []
    memory = types.SimpleNamespace(
        best=lambda: said[-1] if said else None,
        set_best=lambda n, metric, value: said.append({"metric": metric, "value": value}),
    )
    for n, value in enumerate(values):
        ours._rate(n, {best.removeprefix("-"): value}, memory)
    assert said[-1]["value"] == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": "shape/full_match"}, "no evaluator is called 'shape'"),
        ({"best": "full_match"}, "no evaluator is called 'full_match'"),
        ({"eval_every": 0}, "nothing is evaluated"),
        ({"best": "held_out_loss/maen"}, "did you mean 'held_out_loss/mean'"),
        (
            {"best": "", "evaluators": {"held_out_loss": {"num_imagse": 3}}},
            "did you mean 'num_images'",
        ),
        (
            {"best": "", "evaluators": {"protocol": "own.json"}},
            "protocol is 'own.json' .at config.evaluators.protocol",
        ),
    ],
)
def test_evaluators_that_cannot_be_are_refused_before_anything(tmp_path, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        loop.train(best_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_was_evaluated_is_not_when_the_run_grows(tmp_path):
    loop.train(best_config(steps=2, best=""), tmp_path)
    (first,) = events(tmp_path)
    (tmp_path / "events.jsonl").write_text(json.dumps({**first, "mark": 1}) + "\n")
    loop.train(best_config(steps=4, best=""), tmp_path)
    assert [row.get("mark") for row in events(tmp_path)] == [1, None]


def test_distances_that_say_little_are_warned_of(tmp_path, dual, caplog):
    data = [{"source": "shapes", "split": "test", "size": 40, "res": 32}]
    ask = dict(extractor=str(dual), metrics={"fid": {}, "manifold": {}}, data=data, num_images=4)
    file = write(tmp_path, **ask)
    evaluator.make({"sample": painter()}, protocol=file, batch_size=12)({}, 0)()
    assert "sizes" not in " ".join(record.getMessage() for record in caplog.records)
    ours = protocol.read(file)
    pictures = [np.zeros((side, side, 3), np.uint8) for side in (32, 32, 32, 1)]
    texts = ours.captions()
    evaluator.Measure(ours, evaluator.Networks(ours), [(pictures, texts)]).metrics()
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "4 pictures in" in said
    assert "4 pictures against 40" in said
    assert "pictures of 2 sizes, such as 1×1 32×32" in said


def plugin(name, predict, **options):
    return plugins.load("evaluators", name).make(predict, **options)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path, dual):
    """Pictures, features shared out, held-out loss and the best checkpoint."""
    protocol_file = write(
        tmp_path,
        data=[{"source": "shapes", "split": "test", "size": 12, "res": 16}],
        extractor=str(dual),
        metrics={"shapes": {}, "fid": {}, "kid": {"subset_size": 8}},
    )
    evaluators = {
        "protocol": {"protocol": protocol_file, "batch_size": 4},
        "held_out_loss": {**LOSS, "batch_size": 4},
    }
    command = [*runs.COMMAND, f"--config.evaluators={evaluators}", "--config.eval_every=3"]
    command += ["--config.best=-held_out_loss/mean", "--config.keep=1"]
    found = {}
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    for count in (1, 2):
        workdir = tmp_path / f"{count}"
        together = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
        started = [
            subprocess.Popen(
                [*command, f"--workdir={workdir}"]
                + ([*together, f"--process_id={i}"] if count > 1 else []),
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        for process in started:
            _, log = process.communicate(timeout=600)
            assert process.returncode == 0, log[-3000:]
        best = json.loads((workdir / "checkpoints" / "best.json").read_text())
        found[count] = events(workdir), best["step"]
    assert [row["step"] for row in found[1][0]] == [3, 6]
    assert found[1][1] == found[2][1]
    for one, two in zip(found[1][0], found[2][0], strict=True):
        assert one.pop("protocol/definition") == two.pop("protocol/definition")
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


# --- what goes by the places of pictures ----------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "names", "texts", "message"),
    [
        ("psnr", range(11), None, "11 pictures for 12 captions"),
        ("psnr", range(12), TEXTS[::-1], "not those of the protocol"),
        ("psnr", range(12), None, "10 comes before 2"),
        ("diversity", range(11), None, "11 pictures, 2 of each caption"),
        ("diversity", range(10, 22), TEXTS, "not 2 by 2"),
    ],
)
def test_pictures_that_are_not_where_they_belong_are_refused(
    tmp_path, metric, names, texts, message
):
    own = write(tmp_path, metrics={metric: {}}, per_caption=2 if metric == "diversity" else 1)
    ours = protocol.read(own)
    files = sorted(f"{n}.png" for n in names)
    captions = dict(zip(files, texts or [None] * len(files), strict=True))
    with pytest.raises(errors.DataError, match=message):
        evaluator.check_places(ours, evaluator.Networks(ours), captions)


@pytest.mark.parametrize("metric", ["psnr", "shapes"])
def test_pictures_where_they_belong_pass(tmp_path, metric):
    ours = protocol.read(write(tmp_path, metrics={metric: {}}))
    captions = {f"{i:05d}.png": text for i, text in enumerate(ours.captions())}
    evaluator.check_places(ours, evaluator.Networks(ours), captions)


def test_equal_captions_are_no_rivals_of_each_other():
    same = {"image_emb": np.eye(4), "text_emb": np.eye(4)[[0, 0, 1, 2]]}
    with pytest.raises(errors.ConfigError, match="its own rival"):
        evaluator.METRICS["r_precision"].fn(same, {}, candidates=3)


def test_an_inception_score_does_not_depend_on_the_order_of_classes():
    """Ten images of each of ten classes, sorted as in folders: each split has all of them."""
    logits = 50 * np.eye(10)[np.arange(100) // 10]
    found = evaluator.METRICS["inception_score"].fn({"logits": logits}, {}, splits=10)
    assert found["inception_score"] > 4


def test_padded_pictures_are_other_pictures(tmp_path, dual):
    """Their features are not those that were stored of cut ones."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (16, 32, 3), np.uint8)
        images.save(folder / f"{i}.png", image)
        (folder / f"{i}.txt").write_text("a picture")
    keys = set()
    for pad in (False, True):
        data = [{"source": "folder", "path": str(folder), "pad": pad}]
        ask = dict(data=data, num_images=4, metrics={"fid": {}}, extractor=str(dual), res=32)
        run = evaluator.make(
            {"sample": lambda nets, texts, **o: np.zeros((len(texts), 32, 32, 3), np.uint8)},
            protocol=write(tmp_path, **ask),
        )
        run({}, 0)()
        keys |= {p.name for p in (tmp_path / "cache" / "features").iterdir()}
    assert len(keys) == 2


def test_a_flag_changes_one_option_of_a_protocols_sampler(tmp_path):
    own = write(tmp_path, sample={"guidance": 5.0, "steps": 50})
    assert protocol.read(own, sample={"steps": 20}).sample == {"guidance": 5.0, "steps": 20}


def test_what_is_not_finite_is_never_the_best():
    ours = object.__new__(hooks.Hooks)
    ours._config, said = config(best="own/full_match"), []
    memory = types.SimpleNamespace(
        best=lambda: said[-1] if said else {"metric": "own/full_match", "value": float("nan")},
        set_best=lambda n, metric, value: said.append({"metric": metric, "value": value}),
    )
    for n, value in enumerate((float("nan"), 0.9, float("inf"), 0.5)):
        ours._rate(n, {"own/full_match": value}, memory)
    assert [one["value"] for one in said] == [0.9]


@pytest.mark.parametrize("again", ["all", "from"])
def test_a_value_does_not_outlive_the_checkpoint_that_had_it(tmp_path, again):
    """What comes anew under its number was not rated."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    folder = tmp_path / "checkpoints" / "20"

    def save():
        folder.mkdir()
        (folder / checkpoint.MANIFEST).write_text("{}")

    save()
    checkpoints.set_best(20, "own/full_match", 0.9)
    assert checkpoints.best()["step"] == 20
    if again == "all":
        checkpoints.set_all_aside()
    else:
        checkpoints.set_aside_from(20, "diverged")
    save()
    assert checkpoints.best() is None
