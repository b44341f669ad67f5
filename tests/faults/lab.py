"""Runs of the tiny experiment as other processes, and an uninterrupted one to compare with."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent.parent
LIMIT = 240  # seconds that any process here may take


class Row(NamedTuple):
    """A fault: its id in the catalogue, what is promised, and how it is tried."""

    id: str
    promise: str
    run: Callable  # lab -> None, or a text to print; AssertionError is a failure
    long: bool


ROWS: list[Row] = []


def row(id: str, promise: str, *, long: bool = False):
    """Registers a row; `long` ones are left out of the quick tier."""

    def add(fn):
        ROWS.append(Row(id, promise, fn, long))
        return fn

    return add


class Ended(NamedTuple):
    code: int
    log: str


class Lab:
    """A folder for one job's workdirs and its compile cache."""

    def __init__(self, root: pathlib.Path, *, long: bool = False):
        self.root, self.long, self._count = root, long, 0

    def folder(self) -> pathlib.Path:
        """A new path; nothing is there."""
        self._count += 1
        return self.root / f"{self._count:03d}"

    @functools.cached_property
    def oracle(self) -> pathlib.Path:
        """The workdir of a run that nothing interrupted."""
        workdir = self.folder()
        ended = self.run(workdir)
        assert ended.code == 0, ended.log[-2000:]
        return workdir

    def run(self, workdir, *flags, **options) -> Ended:
        """A start, to its end."""
        return self.end(self.start(workdir, *flags, **options))

    def start(
        self, workdir, *flags, config="", folder="", devices=1, failpoint="", env=None, wrap=None
    ):
        """A start of the experiment, or of another config; its output goes to a file that `log`
        reads.
        """
        config = config or "tests/faults/experiment.py" + (f":folder={folder}" if folder else "")
        command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags]
        if wrap:
            command = ["sh", "-c", wrap, "sh", *command]
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        environment = {
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "T2I_ENABLE_FAILPOINTS": "1",
            "T2I_FAILPOINT": failpoint,
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self.root / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            **(env or {}),
        }
        log_path = self.folder().with_suffix(".log")
        with log_path.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        process.log_path = log_path
        return process

    def log(self, process) -> str:
        return process.log_path.read_text(errors="replace")

    def wait_for(self, process, text: str) -> None:
        """Returns when the log shows the text; fails if the process ends before."""
        until = time.monotonic() + LIMIT
        while text not in self.log(process):
            assert process.poll() is None, f"ended before {text!r}:\n{self.log(process)[-2000:]}"
            assert time.monotonic() < until, f"{text!r} did not come:\n{self.log(process)[-2000:]}"
            time.sleep(0.005)

    def end(self, process, limit=LIMIT) -> Ended:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"hung for {limit} s:\n{self.log(process)[-2000:]}") from None
        return Ended(code, self.log(process))

    def finish(self, workdir, *flags, **options) -> Ended:
        """Starts again; the run must end well and be the oracle's, bit for bit."""
        ended = self.run(workdir, *flags, **options)
        assert ended.code == 0, ended.log[-2000:]
        assert_same(workdir, self.oracle)
        return ended


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir) -> list[int]:
    folders = (workdir / "checkpoints").glob("*/manifest.json")
    return sorted(int(p.parent.name) for p in folders if p.parent.name.isdecimal())


def prints(workdir, step: int) -> dict:
    """The fingerprints that a checkpoint's manifest holds."""
    path = workdir / "checkpoints" / str(step) / "manifest.json"
    return json.loads(path.read_text())["arrays"]


def assert_same(workdir, oracle) -> None:
    """Every loss, one row a step, and the last state: equal to the last bit."""
    assert rows(workdir) == rows(oracle)
    last = steps(oracle)[-1]
    assert prints(workdir, last) == prints(oracle, last)


def assert_error(ended: Ended, code: int, *texts: str, noise=False) -> None:
    """One clear error with its exit code, without a traceback but for `noise` of other threads."""
    assert ended.code == code, (ended.code, ended.log[-2000:])
    assert noise or "Traceback" not in ended.log, ended.log[-2000:]
    message = [line for line in ended.log.splitlines() if line.startswith("t2i_jax: ")]
    assert message, ended.log[-2000:]
    assert "Fix: " in message[-1], message[-1]
    for text in texts:
        assert text in message[-1], (text, message[-1])
