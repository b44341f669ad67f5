"""The loop on a :debug config: it trains, resumes bit for bit, and keeps its books."""

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

from configs import shapes_flow
from t2i_jax import checkpoint, errors, loop, pipeline, sharding

ROOT = pathlib.Path(__file__).parent.parent


def config(**changes):
    config = shapes_flow.get_config("debug")
    config.log_every = 1
    for key, value in changes.items():
        config[key] = value
    return config


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole :debug run of six steps."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train(config(sample_every=6), workdir)
    return workdir


def test_a_run_leaves_what_users_expect(run):
    names = {p.name for p in run.iterdir()}
    wanted = {"config.json", "checkpoints", "metrics.jsonl", "tb", "samples", "log.txt", "env.txt"}
    assert wanted <= names
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert (run / "samples" / "step_00000006.png").exists()
    saved = run / "checkpoints" / "6"
    assert {"params", "ema", "opt", "meta"} <= {p.name for p in saved.iterdir()}
    assert not any("text" in p.name for p in (saved / "params").rglob("*"))  # frozen: not saved


def test_a_finished_run_is_left_alone(run):
    before = (run / "metrics.jsonl").read_text()
    assert loop.train(config(sample_every=6), run) == {}
    assert (run / "metrics.jsonl").read_text() == before


def test_more_steps_go_on_from_the_last_checkpoint(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "copy")
    loop.train(config(steps=8), workdir)
    assert [row["step"] for row in rows(workdir)] == list(range(1, 9))


def test_killed_and_started_again_it_continues_bit_for_bit(run, tmp_path):
    """SIGKILL between checkpoints; the oracle is the uninterrupted run of this session."""
    workdir = tmp_path / "killed"
    command = [sys.executable, "train.py", "--config=configs/shapes_flow.py:debug"]
    command += [f"--workdir={workdir}", "--config.log_every=1", "--config.sample_every=6"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    for line in process.stderr:
        seen += line
        if "step 4/6" in line:  # past the save at 3, before the end
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL, seen
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(workdir) == rows(run)
    target, step = _abstract_state(run), 6
    ours = checkpoint.Checkpoints(workdir).restore(step, target)
    oracle = checkpoint.Checkpoints(run).restore(step, target)
    jax.tree.map(np.testing.assert_array_equal, ours, oracle)


def _abstract_state(workdir):
    from t2i_jax import optim, step, weights

    settings = weights.read_config(workdir)
    family = pipeline.Predictor(settings).objective
    optimisers = {n: optim.make(s, steps=6, where="") for n, s in settings.optim.items()}
    whole = sharding.replicated(sharding.make_mesh(settings.mesh))
    state = jax.eval_shape(
        lambda key, batch: step.init(family, optimisers, dict(settings.ema), key, batch),
        jax.random.key(0),
        weights.abstract_batch(settings),
    )
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), state)


def test_sigterm_saves_and_exits_75(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/shapes_flow.py:debug"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.log_every=1", "--config.steps=100000"]
    command += ["--config.save_every=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "step 2/" in line:
            process.send_signal(signal.SIGTERM)
            break
    tail = process.stderr.read()
    assert process.wait(60) == 75, tail
    assert "Traceback" not in tail
    assert "Fix: start the same command again" in tail
    last = rows(tmp_path / "run")[-1]["step"]
    assert checkpoint.Checkpoints(tmp_path / "run").steps() == [last]  # no step lost


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(run):
    other = config(batch_size=16)
    with pytest.raises(errors.ConfigError, match="batch_size: 8 → 16"):
        loop.train(other, run)


def test_the_sampler_draws_from_a_run_whatever_the_batch_size(run):
    pipe = pipeline.Pipeline.load(str(run))
    captions = ["a red circle", "a blue square", "a green star"]
    together = pipe(captions, seed=3)
    alone = pipe(captions[2:], seed=3, index=[2])
    assert together.shape == (3, 16, 16, 3)
    assert together.dtype == np.uint8
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert np.abs(together.astype(int) - pipe(captions, seed=4)).max() > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"top_k": 3}, "takes no option 'top_k'"),
        ({"sampler": "huen"}, "heun"),
    ],
)
def test_bad_sampling_options_are_refused(run, options, message):
    pipe = pipeline.Pipeline.load(str(run))
    with pytest.raises(errors.ConfigError, match=message):
        pipe(["a red circle"], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 7, "accumulate": 2}, "does not divide"),
        ({"objective": "flwo"}, "did you mean 'flow'"),
        ({"data": {"source": "shape"}}, "did you mean 'shapes"),
        ({"data": {"source": "shapes", "sise": 3}}, "unknown option 'sise'"),
        ({"model": {"backbone": "unett"}}, "did you mean 'unet'"),
        ({"loss": {"predicton": "v"}}, "prediction"),
        ({"ema": {"modle": 0.9}}, "trained nets are"),
        ({"ema": {"model": 1.5}}, "EMA decay is 1.5"),
        ({"load": {"txt": "minilm"}}, "no net 'txt'"),
        ({"allow_random": False}, "'text' has no weights"),
        ({"mesh": {"data": 3}}, "does not fit"),
        ({"sample": {"guidanse": 2.0}}, "unknown option 'guidanse'"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        loop.train(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_reports_and_writes_nothing(tmp_path, capsys):
    found = loop.train(config(), tmp_path / "run", dry_run=True)
    assert found["parameters/model"] > 1000
    assert found["state_bytes"] >= 4 * 4 * found["parameters/model"]  # params, two moments, average
    assert not (tmp_path / "run").exists()
    assert "parameters/model" in capsys.readouterr().out


def test_a_key_that_nobody_reads_does_not_exist():
    """Every key of configs/common.py is read somewhere in the package."""
    from configs import common

    text = "".join(p.read_text() for p in (ROOT / "t2i_jax").rglob("*.py"))
    for key in common.base():
        assert f"config.{key}" in text or f'"{key}"' in text, key
