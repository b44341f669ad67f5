"""Caption states on disk: those of memory, after a kill too; another encoder's are refused."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from t2i_jax import errors, loop, pipeline, weights
from t2i_jax.data import cache
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import text_encoder
from t2i_jax.run import fingerprint
from t2i_jax.text import tokenize
from tests import runs, test_conditioning

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "t2i_jax", "cache", "--config=configs/shapes_flow.py:debug"]
COMMAND += ["--config.cache=encode", "--config.loss.prediction=v", "--config.data.size=12000"]


def given(states, records, tokens):
    """What an input of caption states makes of records, their tokens being there."""
    rows = [{"text": jax.tree.map(lambda x, i=i: x[i], tokens)} for i in range(len(records))]
    return states.make(rows, [None] * len(rows), records)


def cached(**changes):
    config = runs.config(cache="encode", prompts=(), save_every=9, **changes)
    config.data.size = 12000
    return config


def start(workdir, failpoint=""):
    environment = {**os.environ, "T2I_ENABLE_FAILPOINTS": "1", "T2I_FAILPOINT": failpoint}
    command = [*COMMAND, f"--workdir={workdir}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with captions' states, made by a start that was killed and a second one."""
    workdir = tmp_path_factory.mktemp("cached")
    assert start(workdir, "cache.file:2=kill").returncode == -signal.SIGKILL
    first = workdir / "captions/states-00000.array_record"
    before = first.stat().st_mtime_ns
    assert not (workdir / "captions/manifest.json").exists()
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before  # not computed again
    return workdir


@pytest.mark.slow
def test_training_reads_the_files(written, tmp_path, caplog):
    shutil.copytree(written, tmp_path / "run")
    with caplog.at_level("INFO", logger="absl"):
        loop.train(cached(steps=1), tmp_path / "run")
    assert "rows in" in caplog.text
    assert "computing" not in caplog.text


def test_what_files_and_memory_hold_is_what_the_encoder_says(written):
    run = loop.Run(cached(), written)
    run.load_frozen()
    encode, rows, identity = run.kept_rows()
    disk = cache.states(written / "captions", encode, rows, identity)
    memory = cache.precompute(encode, rows)
    source, tokenizer = run.source, run.predictor.tokenizers["text"]
    disk, memory = (functools.partial(given, found) for found in (disk, memory))
    records = np.array([11999, 0, 5, 5, 7000])
    tokens, _ = tokenizer([source[int(i)]["caption"] for i in records])
    direct = cache.arrays(encode({"text": tokens}))
    for name, want in direct.items():
        for got in (disk(records, tokens)[name], memory(records, tokens)[name]):
            np.testing.assert_allclose(got, want, atol=2e-3)
    np.testing.assert_array_equal(*(f(records, tokens)["cond_seq"] for f in (disk, memory)))
    assert np.abs(direct["cond_seq"]).max() > 0.5


@pytest.mark.slow
def test_states_of_another_encoder_data_set_or_length_are_refused(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    changed = (
        (dict(seed=1), "encoder"),
        (dict(text=dict(dtype="bfloat16")), "encoder"),
        (dict(text_length=12), "text_length"),
    )
    for changes, named in changed:
        with pytest.raises(errors.ConfigError, match=f"stale: .*{named}"):
            loop.train(cached(**changes), tmp_path / "run")
    other = cached()
    other.data.size = 500
    with pytest.raises(errors.ConfigError, match="stale: data"):
        loop.train(other, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_states_written_with_the_fingerprint_of_before_are_used(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    run = loop.Run(cached(), tmp_path / "run")
    run.load_frozen()
    states = run.kept_rows()
    path = tmp_path / "run/captions/manifest.json"
    manifest = json.loads(path.read_text()) | states[-1](sums=fingerprint.WEIGHTED)
    del manifest["sums"]
    path.write_text(json.dumps(manifest))
    assert cache.states(path.parent, *states).shapes["cond_seq"].shape == (16, 32)


@pytest.mark.slow
def test_a_damaged_file_is_named(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    path = tmp_path / "run/captions/states-00001.array_record"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.DataError, match="states-00001"):
        loop.train(cached(), tmp_path / "run")
    assert start(tmp_path / "run").returncode == 0  # makes that file again
    assert path.read_bytes() == (written / "captions/states-00001.array_record").read_bytes()


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_command_goes_on(written, tmp_path):
    if shutil.which("prlimit") is None:
        pytest.skip("no prlimit here")
    command = ["prlimit", "--fsize=300000", *COMMAND, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    assert "Traceback" not in done.stderr
    assert start(tmp_path).returncode == 0
    assert (tmp_path / "captions/manifest.json").exists()


def test_the_manifest_says_what_the_states_are(written):
    manifest = json.loads((written / "captions/manifest.json").read_text())
    shapes = {"cond_pooled": [[32], "float16"], "cond_seq": [[-1, 32], "float16"]}
    assert manifest["arrays"] == shapes
    assert len(manifest["files"]) > 1
    assert not list((written / "captions").glob("*.tmp"))


class Few:
    """A source of a few captions, one of them twice, one empty."""

    fingerprint = "few"
    texts = ("a red circle", "", "the blue square on the left of a circle", "a red circle")

    def __len__(self):
        return len(self.texts)

    def captions(self):
        return self.texts


def test_a_second_start_encodes_no_caption_again(tmp_path, monkeypatch, caplog):
    """But others, those of another encoder, and what was damaged meanwhile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer, encoded = text_encoder.tokenizer("", 16), []

    def encode(batch):
        ids_BL, mask_BL = batch["text"]
        encoded.append(len(ids_BL))
        seq_BLD = np.float32(ids_BL)[..., None] * np.linspace(0, 0.01, 5)
        return Cond(seq_BLD, mask_BL, seq_BLD.mean(1))

    def start(**changed):
        encoded.clear()
        identity = lambda: {"encoder": "one", **changed}
        extra = cache.states(tmp_path / "run", encode, cache.Captions(Few(), tokenizer), identity)
        return given(extra, np.arange(4), tokenizer(list(Few.texts))[0])

    first = start()
    assert encoded
    second = start()
    assert not encoded
    for name, states in first.items():
        np.testing.assert_array_equal(second[name], states)
    start(encoder="two")
    assert encoded
    start()
    assert not encoded
    folder = tmp_path / "t2i_jax" / "captions"
    assert folder.stat().st_mode & 0o777 == 0o700
    for file in folder.iterdir():
        flipped = bytearray(file.read_bytes())
        flipped[-40] ^= 1
        file.write_bytes(flipped)
    third = start()
    assert encoded
    np.testing.assert_array_equal(third["cond_seq"], first["cond_seq"])
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    start()
    assert encoded
    start()
    assert not encoded
    folder.chmod(0o777)
    start()
    assert encoded
    assert "others may write" in caplog.text


@pytest.mark.parametrize("order", [1, -1])
def test_states_of_several_encoders_lie_where_their_tokens_do(tmp_path, order):
    config = runs.config()
    config.load = dict(text=test_conditioning.small_encoders(tmp_path)[::order])
    predictor = pipeline.Predictor(config)
    nets = weights.frozen(predictor.objective, config)
    encode = functools.partial(predictor.run, "encode", nets)
    rows = cache.Captions(Few(), predictor.tokenizers["text"], batch=2)
    extra = cache.precompute(encode, rows)
    tokens, _ = tokenize.read(predictor.tokenizers["text"], list(Few.texts))
    direct = encode({"text": tokens})
    got = given(extra, np.arange(4), tokens)
    np.testing.assert_allclose(got["cond_seq"], direct.seq_BLD, atol=3e-3)
    np.testing.assert_allclose(got["cond_pooled"], direct.pooled_BD, atol=3e-3)
    np.testing.assert_array_equal(got["cond_seq"][0], got["cond_seq"][3])
