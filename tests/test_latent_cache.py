"""Frozen nets of a pretrained pipeline run once: the losses are those without a cache."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from configs import finetune
from t2i_jax import errors, loop, pipeline, weights
from t2i_jax.data import cache, inputs, transforms
from t2i_jax.pretrained import folder
from t2i_jax.run import checkpoint
from t2i_jax.text import tokenize
from tests import test_finetune

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
folders, data, ROOT = test_finetune.folders, test_finetune.data, test_finetune.ROOT
BOTH = "states,moments"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No cache of another test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def config(data, source=folder.TINY, **changes):
    made = test_finetune.small(finetune, source, data, augment=("flip",), **changes)
    made.loss.text_dropout = 0.5
    made.optim.model.learning_rate, made.strategy = 1e-3, "fsdp"
    return made


def losses(workdir):
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["model/loss"] for row in rows]


def write(config, workdir):
    """`python -m t2i_jax cache`, in this process.   -> digests of the nets"""
    run = loop.Run(config, workdir)
    run.load_frozen()
    for name, kept in run.cached.items():
        cache.write(workdir / kept.folder, *run.kept_rows(name))
    return run._frozen_digests


@pytest.fixture(scope="module")
def tiny():
    return pipeline.Pipeline.load(str(folder.TINY))


def test_what_is_kept_gives_the_loss_of_pictures_and_captions(tiny):
    """A dropped caption is the kept states of the empty one."""
    family, nets = tiny.predictor.objective.predict["sample"].__self__, tiny.nets
    tokens, _ = tokenize.read(family.captions.tokenizers, [*folders.PROMPTS, "a ring", "", ""])
    rows = dict(index=np.arange(5), weight=np.ones(5, np.float32))
    rows["image"] = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)
    whole = rows | {"text": tokens}
    kept = rows | family.states(nets, whole, None) | family.moments(nets, whole, None)
    empty = jax.tree.map(lambda x: x[-1:], family.states(nets, whole, None))
    frozen = nets | {"text": nets["text"] | {"empty": empty}}
    loss = jax.jit(lambda nets, batch: family.loss(nets, batch, jax.random.key(0), 0)[0])
    np.testing.assert_allclose(loss(frozen, kept), loss(nets, whole), rtol=1e-5)
    other = kept | {"mean": 3 * kept["mean"] + 2}
    assert abs(loss(frozen, other) / loss(nets, whole) - 1) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "pixart"])
def test_a_cache_changes_no_loss(kind, data, tmp_path):
    """Dropped captions, mirrored pictures, SDXL's sizes, SD 3's zeros, padding in sight."""
    folders.save(folders.PIPELINES[kind], tmp_path / "source")
    for name, kept in (("without", ""), ("with", BOTH)):
        loop.train(config(data, tmp_path / "source", cache=kept, steps=4), tmp_path / name)
    without, kept = losses(tmp_path / "without"), losses(tmp_path / "with")
    np.testing.assert_allclose(kept, without, rtol=1e-4)
    assert np.ptp(without) > 0.01


@pytest.mark.slow
def test_files_take_the_place_of_nets(data, tmp_path, monkeypatch):
    """None is read that no step runs, and a stopped run goes on bit for bit."""
    read, load = [], weights.load_net
    monkeypatch.setattr(weights, "load_net", lambda *args: read.append(args[1]) or load(*args))
    digests = write(config(data, cache=BOTH), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    read.clear()
    (_, frozen, batch), _ = loop.Run(config(data, cache=BOTH), tmp_path / "whole").trace().args_info
    assert (frozen.keys(), frozen["text"].keys()) == ({"text"}, {"empty"})
    assert "image" not in batch
    loop.train(config(data, cache=BOTH), tmp_path / "whole")
    assert read == ["model"]
    for steps in (2, 3):
        loop.train(config(data, cache=BOTH, steps=steps), tmp_path / "stopped")
    assert read == ["model"] * 2
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    # What it was trained with is written down all the same.
    meta = checkpoint.Checkpoints(tmp_path / "whole", create=False).meta(3)
    assert meta["frozen"] == digests
    assert digests.keys() == {"text", "vae"}
    # A run that draws needs all nets.
    read.clear()
    more = dict(cache=BOTH, steps=4, sample_every=4, prompts=("a",), sample=dict(steps=1))
    loop.train(config(data, **more), tmp_path / "whole")
    assert sorted(read) == ["text", "vae"]
    assert (tmp_path / "whole/samples/step_00000004.png").exists()


def test_a_cache_of_other_nets_or_pictures_is_refused(data, tmp_path):
    source = shutil.copytree(folder.TINY, tmp_path / "source")
    write(config(data, source, cache=BOTH), tmp_path)
    moved = {"vae": f"{shutil.copytree(folder.TINY, tmp_path / 'moved')}#vae"}

    def kept(name, digests, **changes):
        """What a start makes of the files, which has loaded the nets of these digests."""
        run = loop.Run(config(data, source, cache=BOTH, **changes), tmp_path)
        run.frozen, run._frozen_digests = dict.fromkeys(digests), digests
        return cache.states(tmp_path / run.cached[name].folder, *run.kept_rows(name)).shapes

    for name, changes, named in (
        ("states", dict(text=dict(dtype="bfloat16")), "captions are stale: text"),
        ("states", dict(text_length=12), "captions are stale: text_length"),
        ("states", dict(int8="text"), "captions are stale: int8"),
        ("moments", dict(res=24), "pictures are stale: res"),
        ("moments", dict(load=moved), "pictures are stale: sources"),
    ):
        with pytest.raises(errors.ConfigError, match=named):
            kept(name, {}, **changes)
    # A net that is loaded is known by its content, wherever it lies.
    digests = json.loads((tmp_path / "pictures/manifest.json").read_text())["nets"]
    assert "mean" in kept("moments", digests, load=moved)
    with pytest.raises(errors.ConfigError, match="pictures are stale: nets"):
        kept("moments", {"vae": "another"})
    # One that is not loaded is known by marks of its files.
    assert "mean" in kept("moments", {})
    file = source / "vae/diffusion_pytorch_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: 1.1 * x for name, x in arrays.items()}, file)
    with pytest.raises(errors.ConfigError, match="pictures are stale: sources"):
        kept("moments", {})
    with (tmp_path / "captions/places.npy").open("r+b") as f:
        f.seek(-8, 2)
        f.write(b"1")
    with pytest.raises(errors.DataError, match=r"damaged.*places.npy"):
        kept("states", {})
    (tmp_path / "captions/manifest.json").write_text("[1]")
    with pytest.raises(errors.DataError, match="cannot be read"):
        kept("states", {})
    learning = config(data, cache="states")
    learning.lora.text = dict(rank=2)
    with pytest.raises(errors.ConfigError, match="a net that learns: 'text'"):
        loop.Run(learning, tmp_path)
    with pytest.raises(errors.ConfigError, match="encode"):
        loop.Run(config(data, cache="encode"), tmp_path)


class Source:
    """Eight pictures, of which some are broken."""

    fingerprint = ""

    def __init__(self, broken):
        self._broken = broken

    def __len__(self):
        return 8

    def __getitem__(self, record):
        if record in self._broken:
            raise transforms.BadExample("broken")
        return {"image": np.full((4, 4, 3), record, np.uint8), "caption": ""}


def test_what_was_broken_for_a_while_is_computed_again(tmp_path):
    def kept(*broken, budget=0.5):
        read = [inputs.picture((4, 4))]
        rows = cache.Pictures(Source(broken), read, (), batch=4, budget=budget)
        predict = lambda batch: {"mean": batch["image"].mean((1, 2, 3))}
        made = cache.precompute(predict, rows, kept=tmp_path / "kept.safetensors")
        return lambda record: made.make([{}], [None], [record])["mean"]

    with pytest.raises(transforms.BadExample, match="when the cache was made"):
        kept(5)(5)
    np.testing.assert_allclose(kept()(5), transforms.to_float(np.uint8(5)), atol=1e-3)
    (tmp_path / "kept.safetensors").unlink()
    with pytest.raises(errors.DataError, match="5 of 8 examples are broken"):
        kept(0, 1, 2, 5, 6)


def test_kept_floats_are_of_sixteen_bits():
    assert cache.arrays({"x": jnp.zeros(2, jnp.bfloat16)})["x"].dtype == jnp.float16


@pytest.mark.slow
def test_a_broken_picture_counts_nothing(data, tmp_path):
    """It is found when the cache is made, and no picture is opened afterwards."""
    own = tmp_path / "data"
    own.mkdir()
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(image).save(own / f"{i}.png")
        (own / f"{i}.txt").write_text("a")
    whole = (own / "2.png").read_bytes()
    (own / "2.png").write_bytes(whole[:200].ljust(len(whole), b"0"))
    write(config(own, cache=BOTH), tmp_path / "run")
    for path in own.glob("*.png"):
        path.write_bytes(bytes(path.stat().st_size))
    loop.train(config(own, cache=BOTH), tmp_path / "run")
    broken = [json.loads(x) for x in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert {row["record"] for row in broken} == {2}


@pytest.mark.slow
def test_the_command_writes_both(data, tmp_path):
    command = [sys.executable, "-m", "t2i_jax", "cache", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config=configs/finetune.py:source={folder.TINY},path={data},res=16"]
    done = subprocess.run(
        [*command, f"--config.cache={BOTH}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["3", "captions,"],
        ["8", "pictures,"],
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 78
