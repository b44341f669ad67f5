"""Notebooks: each is the same as its script, and the script runs."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_notebook_is_its_script(script):
    jupytext = pytest.importorskip("jupytext")
    ours, theirs = (jupytext.read(p).cells for p in (script, script.with_suffix(".ipynb")))
    assert [(c.cell_type, c.source) for c in ours] == [(c.cell_type, c.source) for c in theirs]
    assert not any(c.get("outputs") for c in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_notebook_runs_to_its_end(script, tmp_path):
    """On the tiny pipeline, in another folder, cell after cell as a script."""
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "JAX" in done.stdout
