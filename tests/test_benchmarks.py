"""The benchmarks' harness; `make bench-check` runs the benchmarks themselves."""

import io
import json
import pathlib
import re
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as runner
from benchmarks import harness

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """As a module that was started by its name, on a quiet machine."""
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="benchmarks.toy"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(harness, "refuse_noise", lambda: None)


@pytest.mark.parametrize(
    "result", [jnp.zeros((2, 3)), jnp.zeros(()), None, 0.0, 7.5, {"a": jnp.ones(2)}]
)
def test_an_arm_is_timed_whatever_its_round_returns(result, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("round\nround\n"))
    harness.serve(lambda: result, "jax", flops=3)
    ready, *seconds = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["flops"] == 3
    assert len(seconds) == 2
    assert all(0 < s < 5 for s in seconds)


def test_an_arm_can_time_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("round\n"))
    harness.serve(lambda: 0.25, "numpy", timed=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == 0.25


@pytest.mark.parametrize("library", ["jax", "numpy"])
def test_gemm_is_the_rate_of_a_product(library, monkeypatch):
    """The clock is set: a product of 2 n³ operations that takes a second."""
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    assert harness.gemm(library, 8, "float32") == pytest.approx(2 * 8**3 / 1e9)


class Arm:
    """An arm whose rounds and products take as long as they are said to."""

    def __init__(self, seconds, gemm, **work):
        self.ready = {"versions": {}, "flops": None, "moved": None} | work
        self.round, self.gemm = lambda: seconds, lambda: gemm


def compared(ours, peer):
    return harness.compare("toy", ours, peer, 1e-6, amount=8)


def test_shares_of_the_ceiling_hold_both_arms_to_the_same_work():
    row = compared(Arm(2.0, [90.0, 100.0], flops=40e9), Arm(1.0, [100.0, 80.0]))
    assert row["ratio"] == row["ratio_low"] == 0.5
    assert row["of_gemm"] == {"ours": 0.2, "peer": 0.4}
    assert (row["ours"], row["peer"]) == (8 / 2 / harness.THREADS, 8 / harness.THREADS)
    assert "ratio_gemm" not in row  # the better of the two sizes is the same
    assert "of_copy" not in row


def test_a_peer_with_work_of_its_own_is_held_against_that():
    row = compared(Arm(1.0, [100.0], flops=40e9), Arm(2.0, [100.0], flops=120e9))
    assert row["of_gemm"] == {"ours": 0.4, "peer": 0.6}


@pytest.mark.parametrize(
    ("ours", "peer", "corrected"),
    [(400, 200, 0.6), (200, 400, 2.4), (119, 100, None), (100, 119, None)],
)
def test_a_ratio_is_corrected_where_one_library_multiplies_faster(ours, peer, corrected):
    row = compared(Arm(1.0, [float(ours)], flops=1e9), Arm(1.2, [float(peer)]))
    assert row["ratio"] == 1.2
    assert row.get("ratio_gemm") == row.get("ratio_gemm_low") == corrected


def test_work_that_moves_bytes_is_held_against_a_copy(monkeypatch):
    monkeypatch.setattr(harness, "copy", lambda: 20.0)
    row = compared(Arm(1.0, [100.0], moved=10e9), Arm(2.0, [100.0]))
    assert (row["copy"], row["of_copy"]) == (20.0, {"ours": 0.5, "peer": 0.25})
    assert "of_gemm" not in row


def test_a_copy_counts_what_is_read_and_written(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(harness, "COPIED", 2**20)
    assert harness.copy() == pytest.approx(2 * 2**20 / 1e9)


def test_arms_that_compute_different_things_are_not_compared(tmp_path):
    ours, peer = tmp_path / "ours.npz", tmp_path / "peer.npz"
    np.savez(ours, x=np.array([1.0, 2.0]))
    for wrong in (2.001, np.nan):
        np.savez(peer, x=np.array([1.0, wrong]))
        with pytest.raises(SystemExit, match="different things"):
            harness.parity(ours, peer)
    np.savez(peer, x=np.array([1.0, 2.00001]))
    assert 0 < harness.parity(ours, peer) < 1e-4


def test_a_row_names_command_commit_and_machine_and_a_table_repeats_them(monkeypatch):
    row = compared(Arm(1.0, [400.0], flops=1e9), Arm(1.2, [200.0]))
    assert row["command"].startswith("python -m benchmarks.toy")
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", row["commit"])
    assert re.fullmatch(r".+, \d+ cores", row["machine"])
    text = harness.table([row, row | {"name": "other"}])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[0].startswith("| name | ours | peer | ratio | ratio_low | ratio_gemm |")
    assert all(row[part] in lines[-1] for part in ("command", "commit", "machine"))
    assert "400 GFLOP/s and the peer's at 200" in lines[-1]


# --- no benchmark is forgotten --------------------------------------------------------------------


def test_every_benchmark_is_checked():
    names = runner.names(ROOT / "benchmarks")
    assert {"sampler", "train_step", "tpu", "guidance"} <= set(names)
    for name in runner.LIBRARIES - {"__init__"}:
        assert (ROOT / "benchmarks" / f"{name}.py").exists()


MODULES = {
    "": "does not know --check",
    "raise SystemExit(3)": "ended with 3",
    "import time; time.sleep(60)": "has not ended",
    "from benchmarks import harness; harness.done()": "",
}


@pytest.mark.parametrize("source", MODULES)
def test_a_new_benchmark_without_a_check_fails(source, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 2 if "sleep" in source else 60)
    folder = tmp_path / "measuring"
    folder.mkdir()
    (folder / "new.py").write_text(source)
    assert runner.names(folder) == ["new"]
    wrong = runner.check("new", folder, {"PYTHONPATH": str(ROOT)})
    assert wrong.startswith(MODULES[source])
    assert bool(wrong) == bool(MODULES[source])


def test_unknown_parts_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy", "fast", "slow"])
    with pytest.raises(SystemExit, match=r"\['slow'\].*fast"):
        harness.main({"fast": lambda: iter(())}, {})


# --- what the project says of machines ------------------------------------------------------------


def test_no_file_names_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    here = re.escape(str(ROOT).encode())
    homes = rb"(?<![\w.~}])/(?:work|root|home|Users|workspace|builds)/\w[^\s\"'`]*|" + here
    for name in listed.stdout.decode().split("\0")[:-1]:
        path = ROOT / name
        if path.is_file():
            assert not re.findall(homes, path.read_bytes()), name


def test_every_direct_dependency_is_pinned_for_each_python(monkeypatch):
    import setuptools

    plain = lambda name: re.split(r"[\[<>=!]", name)[0].replace("_", "-").lower()
    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    exec((ROOT / "setup.py").read_text(), {"__file__": str(ROOT / "setup.py")})
    direct = {plain(name) for name in said["install_requires"]}
    for extra in ("bench", "dev", "digits", "emoji", "parity", "report"):
        direct |= {plain(name) for name in said["extras_require"][extra]}
    pins = {}
    for path in (ROOT / "requirements").iterdir():
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        pins[path.stem] = {plain(name): v for name, v in (line.split("==") for line in lines)}
        assert direct <= set(pins[path.stem]), path.name
    assert set(pins["py311"]) == set(pins["py312"])
    assert pins["py311"]["jax"] == pins["py311"]["jaxlib"] == "0.10.1"  # the last for Python 3.11
