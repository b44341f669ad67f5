"""Bad input on the command line: one clear error, its exit code, nothing written, no traceback."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from t2i_jax import __main__ as commands
from t2i_jax import errors, fields, loop
from t2i_jax.commands import cli
from t2i_jax.run import distributed

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=configs/shapes_flow.py:debug"


def start(*command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


BUILTIN = ["sample.py", "--checkpoint=builtin:shapes", "--prompt=a circle"]
EVALUATE = ["-m", "t2i_jax", "evaluate", "--checkpoint=builtin:shapes", "--protocol=shapes"]
EXPORT = ["-m", "t2i_jax", "export", "--workdir=builtin:shapes"]
CASES = {
    "no config": (["train.py", "--workdir={new}"], 78, "--config is missing"),
    "no workdir": (["train.py", CONFIG], 78, "--workdir is missing"),
    "no such config": (
        ["train.py", "--config=configs/shapes_flo.py", "--workdir={new}"],
        78,
        "no config 'configs/shapes_flo.py' (at --config). Fix: did you mean 'shapes_flow'?",
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
    "a size without its net": (
        ["train.py", "--config=shapes_gan:debug", "--config.model.width=3", "--workdir={new}"],
        78,
        "by net: --config.model.disc.width or --config.model.gen.width)",
    ),
    "wrong type": (
        ["train.py", CONFIG, "--config.steps=many", "--workdir={new}"],
        78,
        "steps is 'many' (at --config.steps). Fix: give a whole number",
    ),
    "zero steps": (["train.py", CONFIG, "--config.steps=0", "--workdir={new}"], 78, "steps is 0"),
    "unwritable workdir": (["train.py", CONFIG, "--workdir=/dev/null/run"], 74, "/dev/null/run"),
    "workdir in a bucket": (["train.py", CONFIG, "--workdir=gs://a/run"], 78, "--workdir"),
    "nothing to draw": (["sample.py", "--checkpoint=builtin:shapes"], 78, "nothing to draw"),
    "no model": (["sample.py", "--prompt=a circle"], 78, "no model"),
    "two models to draw with": ([*BUILTIN, "--workdir=runs/flow"], 78, "two models"),
    "two models to judge": (
        [
            "-m",
            "t2i_jax",
            "evaluate",
            "--protocol=shapes",
            "--checkpoint=builtin:shapes",
            "--workdir=x",
        ],
        78,
        "two models",
    ),
    "empty prompt": (["sample.py", "--checkpoint=builtin:shapes", "--prompt="], 78, "empty"),
    "negative seed": (
        ["sample.py", "--prompt=a circle", "--seed=-1"],
        78,
        "seed is -1 (at --seed)",
    ),
    "unknown builtin": (
        ["sample.py", "--prompt=a circle", "--checkpoint=builtin:shaps"],
        78,
        "shaps",
    ),
    "foreign folder": (["sample.py", "--prompt=a circle", "--workdir=docs"], 78, "config.json"),
    "zero sampling steps": ([*BUILTIN, "--steps=0"], 78, "steps is 0"),
    "a shift of no grid": (
        [*BUILTIN, "--shift=0"],
        78,
        "shift is 0.0 (at --shift). Fix: give a finite number above 0",
    ),
    "guidance that is no number": ([*BUILTIN, "--guidance=nan"], 78, "guidance is nan"),
    "an option of another family": (
        [*BUILTIN, "--truncation=0.5"],
        78,
        "unknown option 'truncation'",
    ),
    "options that another makes void": (
        [*BUILTIN, "--interpolate=4", "--grid", "--format=jpg"],
        78,
        "--grid, --format beside --interpolate",
    ),
    "a way that the family has not": (
        [*BUILTIN, "--interpolate=4"],
        78,
        "(at --interpolate). Fix: leave it out, or choose a model that has one",
    ),
    "an option that is set twice": (
        [*BUILTIN, "--set=guidance=2", "--guidance=3"],
        78,
        "guidance is set twice (at --set guidance=2)",
    ),
    "adapters that are named twice": (
        [*BUILTIN, "--lora=a:0.5", "--lora=a"],
        78,
        "a is named twice (at --lora=a). Fix: give it once",
    ),
    "adapters of no weight": ([*BUILTIN, "--lora=a:nan"], 78, "weight is nan (at --lora=a:nan)"),
    "a side below 0": (
        ["-m", "t2i_jax", "verify", "x", "--width=-16"],
        78,
        "width is '-16' (at --width). Fix: give a whole number, 0 or more",
    ),
    "an image that is not there": (
        [*BUILTIN, "--predict=img2img", "--image=none.png"],
        65,
        "No such file or directory (at none.png). Fix: give a file that can be read",
    ),
    "settings beside those of a picture": (
        ["sample.py", "--reproduce=x.png", "--seed=3"],
        78,
        "--seed beside --reproduce",
    ),
    "folder for pictures that is a file": ([*BUILTIN, "--output_dir=setup.py"], 74, "is a file"),
    "a row of results that is a folder": (
        [*EVALUATE, "--output=docs"],
        74,
        "it is a folder (at docs). Fix: choose another --output",
    ),
    "a row of results where nothing is": ([*EVALUATE, "--output=no/x.jsonl"], 74, "is not there"),
    "a network that no metric uses": (
        [*EVALUATE, "--extractor=inception"],
        78,
        "no metric of the protocol 'shapes",
    ),
    "an export into a file": ([*EXPORT, "--output=setup.py"], 74, "setup.py is a file"),
    "a card that is not there": (
        [*EXPORT, "--output={new}", "--card=no.md"],
        78,
        "cannot read it: No such file or directory (at --card=no.md)",
    ),
    "a report into a file": (
        ["-m", "t2i_jax", "compare", "runs/flow", "--output=setup.py"],
        74,
        "setup.py is a file",
    ),
    "a dictionary that is none": (
        ["train.py", CONFIG, "--config.mesh=data", "--workdir={new}"],
        78,
        "mesh is 'data' (at --config.mesh). Fix: give a dictionary",
    ),
    "no such size of a config": (
        ["train.py", "--config=dit:size=M", "--workdir={new}"],
        78,
        "choose one of ['B', 'L', 'S', 'XL']",
    ),
    "a prompt that is a number": (
        ["train.py", CONFIG, "--config.prompts=(3,)", "--workdir={new}"],
        78,
        "a prompt is 3 (at config.prompts)",
    ),
    "no such command": (["-m", "t2i_jax", "trian"], 78, "did you mean 'train'"),
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
    "unknown flag": (
        ["sample.py", "--promt=a"],
        78,
        "no flag --promt (at the command line). Fix: did you mean 'prompt'",
    ),
    "a flag that is an option of the model's": (
        ["sample.py", "--width=64"],
        78,
        "an option of the model's is --set width=…",
    ),
    "a size of no batch": ([*BUILTIN, "--batch_size=0"], 78, "give a whole number, 1 or more"),
    "no such format": ([*BUILTIN, "--format=gif"], 78, "format is 'gif'"),
    "a flag without a value": (["train.py", "--workdir"], 78, "no value (at --workdir)"),
    "stray argument": (["sample.py", "a circle"], 78, "unexpected argument"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_clear_error(case, tmp_path):
    command, code, message = CASES[case]
    command = [part.format(new=tmp_path / "new") for part in command]
    if command[0] == "sample.py" and not any("output_dir" in part for part in command):
        command.append(f"--output_dir={tmp_path / 'new'}")
    done = start(*command)
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("t2i_jax: ")
    assert message in last
    assert "Fix: " in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_an_installed_package_finds_its_configs_by_name_anywhere(tmp_path):
    build = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path / 'build'}"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "mine.py").write_text(
        "from configs import shapes_gan_from_flow\n"
        "def get_config(arg=None):\n    return shapes_gan_from_flow.get_config(arg)\n"
    )
    (elsewhere / "elsewhere.txt").write_text("hello")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "build" / "lib")}
    for config, message in (
        ("shapes_gan_from_flow:debug", "no key 'stepz'; did you mean 'steps'"),
        ("mine.py:debug", "no key 'stepz'; did you mean 'steps'"),
        ("elsewhere.txt", "it has no function get_config"),
        ("shapes_flo", "did you mean 'shapes_flow'"),
        ("mime.py", "did you mean 'mine'"),
    ):
        train = [sys.executable, "-m", "t2i_jax", "train", f"--config={config}", "--workdir=x"]
        done = subprocess.run(
            [*train, "--config.stepz=3"],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 78
        assert message in done.stderr


def test_commands_are_listed_by_one_name():
    done = start("-m", "t2i_jax")
    assert done.returncode == 0
    for name, (module, _) in commands.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert importlib.util.find_spec(module)


def test_an_address_is_refused_for_every_flag_that_names_a_path():
    """What is neither in cli.PATHS nor here is a flag that nobody has decided on."""
    others = {"sampler", "prompt", "negative_prompt", "coordinator", "metric", "topology", "kind"}
    others |= {"predict", "set", "int8"}
    sources = [*ROOT.glob("*.py"), *(ROOT / "t2i_jax").rglob("*.py")]
    defined = re.compile(r'DEFINE_(?:multi_)?string\(\s*"(\w+)"')
    names = {name for source in sources for name in defined.findall(source.read_text())}
    assert names - set(cli.PATHS) <= others
    for text in ("gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "GS://b/r", "gs:/b/r"):
        with pytest.raises(errors.ConfigError, match="is not supported"):
            errors.check_local(text, "--workdir")
        with pytest.raises(errors.ConfigError, match="is not supported"):
            loop.train(None, pathlib.Path(text))
    for text in ("runs/flow", "builtin:shapes", "hf:org/name@1f", "C:/runs", "", "/a:b/c"):
        errors.check_local(text, "--workdir")


def test_help_shows_our_flags():
    done = start("sample.py", "--help")
    assert done.returncode == 0
    assert "--prompt:" in done.stdout
    for name in fields.FLAGS:
        assert f"--{name}:" in done.stdout


def test_an_unexpected_error_names_the_line_of_the_users_own_file(tmp_path, monkeypatch, capsys):
    """Not that of the library in which it arises, as the shapes here do in JAX."""
    path = tmp_path / "own_family.py"
    path.write_text("import jax.numpy as jnp\n\n\ndef loss(x):\n    return x + jnp.zeros(3)\n")
    spec = importlib.util.spec_from_file_location("own_family", path)
    family = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(family)
    monkeypatch.setattr(distributed, "leave", sys.exit)
    with pytest.raises(SystemExit, match="70"):
        cli.run(lambda: jax.jit(family.loss)(jnp.zeros(2)), argv=["train.py"])
    told = capsys.readouterr().err
    assert f"(at {path}:5). Fix: mend that line" in told
    assert "shapes" in told


def test_debug_shows_the_traceback():
    done = start("sample.py", "--prompt=", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
