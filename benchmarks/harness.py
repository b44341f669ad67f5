"""Honest timing: one process per arm, turns ABAB, a quiet machine, parity before any clock starts.

An arm is a program that answers on its standard output: a line of JSON when it is ready (the files
with what it computed), then one line with the seconds of a round for every line it reads.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

ROUNDS = 9
THREADS = 2
QUIET = 5.0  # per cent of a core that others may use


def serve(ready: dict, run) -> None:
    """The arm's side: says what it has, then times `run()` once for every line on its input.

    A `run` that returns seconds has timed itself.
    """
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        seconds = run()
        print(json.dumps(seconds or time.perf_counter() - started), flush=True)


def environment() -> dict:
    threads = str(THREADS)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
        "JAX_PLATFORMS": "cpu",
        "NPROC": threads,
    }


def call(module: str, *arguments: str) -> None:
    """Runs a program to its end, in its own process."""
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, env=environment(), check=True)


class Arm:
    """One competitor in its own process."""

    def __init__(self, module: str, *arguments: str, python: str = sys.executable):
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{module} {' '.join(arguments)} died before it was ready")
        self.ready = json.loads(line)

    def round(self) -> float:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def parity(ours: pathlib.Path, peer: pathlib.Path, tolerance: float = 1e-4) -> float:
    """The largest difference of two .npz files relative to the largest value; fails over
    `tolerance`.
    """
    a, b = np.load(ours), np.load(peer)
    worst = max(
        float(np.abs(a[name] - b[name]).max() / max(np.abs(a[name]).max(), 1e-6))
        for name in a.files
    )
    if not worst <= tolerance:
        raise SystemExit(f"the arms compute different things: {worst:.2e} > {tolerance:.0e}")
    return worst


def compare(name: str, ours: Arm, peer: Arm, parity: float | None, *, amount: float) -> dict:
    """Rounds of `amount` pictures (or megabytes) in turns; prints and returns how many each arm
    does in a core-second, and their ratio.

    A ratio above 1 means that ours is faster; `ratio_low` is its bootstrapped lower 95 % bound.
    """
    refuse_noise()
    times = np.array([[ours.round(), peer.round()] for _ in range(ROUNDS)])
    ratios = times[:, 1] / times[:, 0]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, ROUNDS)), axis=1)
    result = {
        "name": name,
        "ours": round(amount / THREADS / float(np.median(times[:, 0])), 2),
        "peer": round(amount / THREADS / float(np.median(times[:, 1])), 2),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_low": round(float(np.quantile(medians, 0.05)), 3),
        "spread": round(float(np.ptp(times[:, 0]) / np.median(times[:, 0])), 3),
        "versions": {**ours.ready["versions"], **peer.ready["versions"]},
        "parity": parity,
    }
    print(json.dumps(result), flush=True)
    return result


def refuse_noise() -> None:
    """Stops where other processes use more than 5 % of a core."""
    import psutil

    mine = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    others = [p for p in psutil.process_iter() if p.pid not in mine]
    for p in others:
        try_cpu(p)
    time.sleep(2.0)
    busy = [(use, p.pid) for p in others if (use := try_cpu(p)) > QUIET]
    if busy and "T2I_BENCH_NOISY" not in os.environ:
        raise SystemExit(f"not quiet: processes {[pid for _, pid in busy]} use {busy} % of a core")


def try_cpu(process) -> float:
    import psutil

    try:
        return process.cpu_percent()
    except psutil.Error:  # it ended meanwhile
        return 0.0
