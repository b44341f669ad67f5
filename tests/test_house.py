"""The house keeps its order: imports go down, none in a circle, and the core names no family."""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "t2i_jax"
LAYERS = (  # from bottom to top; a module has its own entry or that of its folder
    ("errors",),
    ("images", "files", "losses", "plugins", "randomness", "limits", "fields", "space"),
    ("run",),
    ("sharding", "optim", "lora", "int8", "objective", "step"),
    ("run.checkpoint",),
    ("models", "sampling", "text", "pretrained.hf"),
    ("pretrained",),
    ("text.conditioner",),
    ("data",),
    ("quality",),
    ("weights", "run.checks", "run.rundir", "run.health", "run.minutes"),
    ("objectives", "evaluators"),
    ("pipeline",),
    ("loop",),
    ("commands", "__main__"),
)
CORE = ("loop", "step", "optim", "sharding", "run.checkpoint", "pipeline", "commands.plan")
BY_NAME = ("objectives", "models", "evaluators")  # folders whose modules a config names
# Families whose name is a word of others: gradients are clipped, a pipeline has an autoencoder.
ORDINARY = ("autoencoder", "clip")


def names(package) -> dict[str, pathlib.Path]:
    """Module -> file, such as "run.owner"; not the folders' own, which are empty."""
    files = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in files}


def imported(package) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, in functions too."""
    files, root = names(package), package.name
    found = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                full = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports relatively"
                full = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in full:  # a module, or something in one
                parts = target.split(".")
                inner = [".".join(parts[1:n]) for n in (len(parts), len(parts) - 1)]
                found[name] |= {x for x in inner if parts[0] == root and x in files}
    return found


def layer(name: str) -> int:
    """The number of a module's layer, by the longest entry that it is or lies in."""
    fits = [
        (len(entry), number)
        for number, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert fits, f"{name} has no layer: write it into LAYERS"
    return max(fits)[1]


def upward(graph) -> set[tuple[str, str]]:
    return {(a, b) for a, targets in graph.items() for b in targets if layer(b) > layer(a)}


def circle(graph) -> list[str]:
    """Modules that import each other in a circle; [] if there is none."""
    done, way = set(), []

    def visit(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        way.append(name)
        for target in sorted(graph[name]):
            if found := visit(target):
                return found
        done.add(way.pop())
        return []

    return next(filter(None, map(visit, sorted(graph))), [])


def families() -> set[str]:
    return {path.stem for path in (PACKAGE / "objectives").glob("[!_]*.py")}


def named(text: str) -> set[str]:
    """The families that a text names. A built-in model's name is none."""
    text = re.sub(r"builtin:[\w-]+", "", text)
    return {name for name in families() - set(ORDINARY) if re.search(rf"\b{name}\b", text)}


def test_imports_go_down():
    assert upward(imported(PACKAGE)) == set()


def test_no_imports_go_round_in_a_circle():
    assert circle(imported(PACKAGE)) == []


def test_contributing_shows_this_order():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```\n(commands.*?)\n```", text, re.DOTALL)
    entries = [re.split(r" {2,}", line)[0].replace("/", ".") for line in block.splitlines()]
    assert [tuple(line.split(", ")) for line in reversed(entries)] == list(LAYERS)


def test_every_entry_has_a_module():
    modules = names(PACKAGE)
    for entry in [entry for entries in LAYERS for entry in entries]:
        assert any(name == entry or name.startswith(f"{entry}.") for name in modules), entry


@pytest.mark.parametrize("name", CORE)
def test_the_core_names_no_family(name):
    assert named(names(PACKAGE)[name].read_text()) == set()
    assert {x for x in imported(PACKAGE)[name] if x.split(".")[0] in BY_NAME} == set()


def test_what_the_guard_is_there_for_is_seen(tmp_path):
    """Imports within functions, of names and of modules, upward and round."""
    package = tmp_path / "ours"
    for name, text in {
        "errors": "def f():\n    from ours.run import owner\n",
        "run/owner": "import ours.run.rundir\nfrom ours.errors import f\n",
        "run/rundir": "import ours\nfrom ours import run, loop as x\n",
        "loop": "import json\n",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = imported(package)
    assert graph["errors"] == {"run.owner"}
    assert graph["run.owner"] == {"run.rundir", "errors"}
    assert graph["run.rundir"] == {"loop"}
    assert upward(graph) == {
        ("errors", "run.owner"),
        ("run.owner", "run.rundir"),
        ("run.rundir", "loop"),
    }
    assert circle(graph) == ["errors", "run.owner", "errors"]
    graph["errors"] = set()
    assert circle(graph) == []
    assert named('if config.objective == "flow":') == {"flow"}
    assert named('"such as builtin:shapes-gan"; gradients flows') == set()
