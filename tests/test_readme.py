"""The README's toy family trains; commands, flags, links and files that pages name exist."""

import ast
import importlib.util
import pathlib
import re
import sys

import pytest

from t2i_jax import __main__ as door
from t2i_jax import loop, objectives, pipeline
from tests import runs

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
CONFIGS = [path for path in CONFIGS if path.stem not in ("__init__", "common")]
COMMANDS = ROOT / "t2i_jax" / "commands"
# One of our commands, up to its end, which is that of the line or of the quoted code.
COMMAND = re.compile(r"\b(?:(train|sample)\.py|t2i_jax (?!import\b)([a-z]+))(?= |$)(.*)", re.M)
FLAG = re.compile(r"(?<![\w-])--(\w[\w.]*)(?![\w.-])")


# --- the toy family of the README ---------------------------------------------------------------


def blocks(heading):
    """The Python blocks below a heading of the README."""
    section = README.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_the_toy_family_of_the_readme_trains_resumes_and_draws(tmp_path, monkeypatch):
    family, config = blocks("Add a family")
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "mean.py").write_text(family)
    (tmp_path / "shapes_mean.py").write_text(config)
    # The package looks for families in one more folder, while the test runs.
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path / "families")])
    monkeypatch.delitem(sys.modules, "t2i_jax.objectives.mean", raising=False)
    spec = importlib.util.spec_from_file_location("shapes_mean", tmp_path / "shapes_mean.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config("debug")
        config.data.size = config.batch_size  # each step has the same examples
        config.steps = config.save_every = 3
        loop.train(config, tmp_path / "run")
        config.steps = 6
        loop.train(config, tmp_path / "run")
        rows = runs.rows(tmp_path / "run")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert rows[-1]["model/loss"] < rows[0]["model/loss"]
        images = pipeline.Pipeline.load(str(tmp_path / "run"))("a red circle")
        assert images.shape == (1, config.res, config.res, 3)
    finally:
        sys.modules.pop("t2i_jax.objectives.mean", None)


def test_the_readme_shows_the_fields_of_the_contract():
    (shown,) = blocks("How it works")
    for text in (shown, (ROOT / "t2i_jax" / "objective.py").read_text()):
        fields = {
            node.name: [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
            for node in ast.parse(text).body
            if isinstance(node, ast.ClassDef)
        }
        assert fields["Objective"][:3] == ["init", "losses", "predict"]
        assert fields["Loss"][:2] == ["nets", "fn"]


# --- commands -----------------------------------------------------------------------------------


def flags_of(path, functions=None):
    """The flags that a file defines; of cli.py those that all commands have, or those of some of
    its functions.
    """
    tree = ast.parse(path.read_text())
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found, todo = set(), [node for node in tree.body if node not in defined.values()]
    todo = [defined[name] for name in functions] if functions else todo
    while todo:
        for node in ast.walk(todo.pop()):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called.startswith("DEFINE"):
                found.add(next(a.value for a in node.args if isinstance(a, ast.Constant)))
            elif isinstance(node.func, ast.Name) and called in defined and functions:
                todo.append(defined[called])
            elif called.endswith(("_flags", "_flag")) and not functions:
                found |= flags_of(COMMANDS / "cli.py", [called])
    return found


FLAGS = {
    name: {"help"}
    | flags_of(COMMANDS / f"{module.rpartition('.')[2]}.py")
    | flags_of(COMMANDS / "cli.py")
    for name, (module, _) in door.COMMANDS.items()
}


def config_of(path, options=None):
    spec = importlib.util.spec_from_file_location(f"read_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(options)


def has(config, key):
    """Whether a flag can set the key, such as "optim.model.decay"."""
    for part in key.split("."):
        if not hasattr(config, "keys") or part not in config:
            return False
        config = config[part]
    return True


def code_of(path):
    """Lines of shell and pieces of quoted code of a page, and a config's docstring."""
    text = path.read_text()
    if path.suffix == ".py":
        return [(ast.get_docstring(ast.parse(text)) or "").replace("\\\n", " ")]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    shell = [code.replace("\\\n", " ") for language, code in fenced if language != "python"]
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return shell + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands_in(path):
    """(command, its flags and values) of a page."""
    for code in code_of(path):
        for match in COMMAND.finditer(code):
            yield match[1] or match[2], re.sub(r"\s#.*", "", match[3])


def test_flags_are_read_out_of_the_code():
    assert {"config", "workdir", "dry_run", "topology", "distributed", "debug"} <= FLAGS["train"]
    assert {"checkpoint", "step", "load", "prompt", "guidance"} <= FLAGS["sample"]
    assert "guidance" not in FLAGS["train"]
    assert "kind" in FLAGS["convert"]


def test_wrong_commands_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    quoted, shell = "Run `python train.py\n--wrong=1`.\n", "t2i_jax judge --x \\\n  --y  # --z\n"
    page.write_text(f"{quoted}```\n{shell}```\n")
    assert [(name, FLAG.findall(rest)) for name, rest in commands_in(page)] == [
        ("judge", ["x", "y"]),
        ("train", ["wrong"]),
    ]


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: path.stem)
def test_commands_name_existing_flags_and_configs(path):
    wrong = []
    for name, rest in commands_in(path):
        if name not in FLAGS:
            wrong.append(f"no command {name}")
            continue
        config = None
        if named := re.search(r"--config=(\w[\w/.]*?)(\.py)?(?::(\S+?))?[\"')]?(?=\s|$)", rest):
            file = ROOT / "configs" / f"{pathlib.Path(named[1]).stem}.py"
            if file.exists():
                config = config_of(file, named[3])
            elif file.stem != "shapes_mean":  # the reader writes it
                wrong.append(f"no config {file.stem}")
        for flag in FLAG.findall(rest):
            key = flag.removeprefix("config.")
            if flag not in FLAGS[name] and not (config and key != flag and has(config, key)):
                wrong.append(f"{name} has no --{flag}")
    assert not wrong


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_its_command_hardware_and_expected_number(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=configs/{path.name}" in text
    assert "Hardware: " in text
    assert "Expected" in text


def test_flags_that_stand_alone_are_those_of_a_command():
    configs = [config_of(path) for path in CONFIGS]
    every = {"check"}.union(*FLAGS.values())  # that one is of benchmarks
    wrong = []
    for path in PAGES:
        for code in code_of(path):
            if not code.startswith("--"):
                continue
            for flag in FLAG.findall(code):
                key = flag.removeprefix("config.")
                if flag not in every and not (key != flag and any(has(c, key) for c in configs)):
                    wrong.append(f"{path.name}: --{flag}")
    assert not wrong


def test_make_targets_and_modules_that_pages_name_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    wrong = []
    for path in PAGES:
        for code in code_of(path):
            wrong += [t for t in re.findall(r"^make ([a-z-]+)", code, re.M) if t not in targets]
            for module in re.findall(r"python -m ((?:t2i_jax|tests|benchmarks)[\w.]*)", code):
                file = ROOT / module.replace(".", "/")
                if not (file.with_suffix(".py").exists() or (file / "__main__.py").exists()):
                    wrong.append(f"{path.name}: {module}")
    assert not wrong


# --- links --------------------------------------------------------------------------------------


def anchors(path):
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_point_to_files_and_headings():
    wrong = []
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            target, _, heading = "".join(link).partition("#")
            if ":" in target:
                continue
            file = path.parent / target if target else path
            if not file.exists() or (heading and heading not in anchors(file)):
                wrong.append(f"{path.name}: {''.join(link)}")
    assert not wrong


def test_files_that_pages_name_exist():
    ours = r"(?:t2i_jax|configs|docs|tests|benchmarks)/[\w./-]*\w\.(?:py|md|png|txt|json)"
    written = ("configs/shapes_mean.py", "t2i_jax/objectives/mean.py")  # by the reader
    wrong = []
    for path in PAGES:
        for code in code_of(path):
            named = re.findall(rf"(?<![\w/.]){ours}", code)
            wrong += [x for x in named if x not in written and not (ROOT / x).exists()]
    assert not wrong
