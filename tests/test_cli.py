"""Bad input on the command line: one clear error, its exit code, nothing written, no traceback."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=configs/shapes_flow.py:debug"


def start(*command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


BUILTIN = ["sample.py", "--checkpoint=builtin:shapes", "--prompt=a circle"]
CASES = {
    "no config": (["train.py", "--workdir={new}"], 78, "--config is missing"),
    "no workdir": (["train.py", CONFIG], 78, "--workdir is missing"),
    "no such config": (
        ["train.py", "--config=configs/shape.py", "--workdir={new}"],
        78,
        "shape.py",
    ),
    "misspelt option": (
        ["train.py", "--config=configs/shapes_flow.py:debgu", "--workdir={new}"],
        78,
        "did you mean 'debug'",
    ),
    "misspelt key": (
        ["train.py", CONFIG, "--config.stepz=3", "--workdir={new}"],
        78,
        "no key 'stepz'; did you mean 'steps'? (at --config.stepz=3)",
    ),
    "wrong type": (["train.py", CONFIG, "--config.steps=many", "--workdir={new}"], 78, "many"),
    "zero steps": (["train.py", CONFIG, "--config.steps=0", "--workdir={new}"], 78, "steps is 0"),
    "unwritable workdir": (["train.py", CONFIG, "--workdir=/dev/null/run"], 74, "/dev/null/run"),
    "nothing to draw": (["sample.py", "--checkpoint=builtin:shapes"], 78, "nothing to draw"),
    "no model": (["sample.py", "--prompt=a circle"], 78, "no model"),
    "two models to draw with": ([*BUILTIN, "--workdir=runs/flow"], 78, "two models"),
    "two models to judge": (
        [
            "-m",
            "t2i_jax.evaluate",
            "--protocol=shapes",
            "--checkpoint=builtin:shapes",
            "--workdir=x",
        ],
        78,
        "two models",
    ),
    "empty prompt": (["sample.py", "--checkpoint=builtin:shapes", "--prompt="], 78, "empty"),
    "negative seed": (["sample.py", "--prompt=a circle", "--seed=-1"], 78, "seed is -1"),
    "unknown builtin": (
        ["sample.py", "--prompt=a circle", "--checkpoint=builtin:shaps"],
        78,
        "shaps",
    ),
    "foreign folder": (["sample.py", "--prompt=a circle", "--workdir=docs"], 78, "config.json"),
    "zero sampling steps": ([*BUILTIN, "--steps=0"], 78, "steps is 0"),
    "guidance that is no number": ([*BUILTIN, "--guidance=nan"], 78, "guidance is nan"),
    "an option of another family": ([*BUILTIN, "--top_k=3"], 78, "takes no option 'top_k'"),
    "no such pictures": (
        ["train.py", "--config=configs/folder_flow.py:path=nowhere", "--workdir={new}"],
        65,
        "no such folder",
    ),
    "a size that does not divide": (
        ["train.py", "--config=configs/folder_flow.py:path=docs,res=50", "--workdir={new}"],
        78,
        "use 48 or 52",
    ),
    "unknown flag": (["sample.py", "--promt=a circle"], 78, "promt"),
    "stray argument": (["sample.py", "a circle"], 78, "unexpected argument"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_clear_error(case, tmp_path):
    command, code, message = CASES[case]
    command = [part.format(new=tmp_path / "new") for part in command]
    command += [f"--output_dir={tmp_path / 'new'}"] if command[0] == "sample.py" else []
    done = start(*command)
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("t2i_jax: ")
    assert message in last
    assert "Fix: " in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_help_shows_our_flags():
    done = start("sample.py", "--help")
    assert done.returncode == 0
    assert "--prompt:" in done.stdout
    assert "--guidance:" in done.stdout


def test_debug_shows_the_traceback():
    done = start("sample.py", "--prompt=", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
