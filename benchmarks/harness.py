"""Honest timing: one process per arm, turns ABAB, a quiet machine, parity before any clock starts.

A benchmark is a module that ends in `main(parts, arms)`. A part yields cases. A case is two arms,
ours and a peer, that do the same work. An arm is a function that ends in `serve` and runs in a
process of its own.

python -m benchmarks.NAME [PART …]           rows of JSON, then a table for docs/results.md
python -m benchmarks.NAME --check [PART …]   each part's first case: parity and one round, on a
                                             noisy machine; no figure is judged

ours, peer   pictures (captions, megabytes) a core-second
ratio        above 1: ours is faster; ratio_low: its bootstrapped lower 95 % bound
gemm         GFLOP/s of the product of two square matrices in each arm, at both sizes of SIDES
of_gemm      operations of the work, counted once for both arms, over time, over the larger `gemm`
ratio_gemm   ratio ÷ (gemm of ours ÷ gemm of the peer), where they differ by 20 % or more
copy         GB/s read and written by a copy in memory, with as many threads as an arm has
of_copy      bytes of the work over time, over `copy`: for work that moves bytes once
"""

import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

CHECK = "--check" in sys.argv
ROUNDS = 1 if CHECK else 9
THREADS = 2
QUIET = 5.0  # per cent of a core that others may use
SIDES = (1024, 2048)
COPIED = 2**28  # bytes
DIFFERENT = 1.2  # the factor between two `gemm` from which on a ratio is corrected
# A check runs for seconds what takes a minute to make fast.
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"


class Case(NamedTuple):
    """Two arms, each the name of one and its arguments; the case's folder is the last of them.

    amount: pictures (captions, megabytes) of a round.
    prepare: an arm that runs to its end first and writes what both read.
    tolerance: of the largest difference between `ours.npz` and `peer.npz`; None: they write none.
    python: interpreter of `peer` and `prepare`.
    """

    name: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    amount: float
    prepare: tuple[str, ...] = ()
    tolerance: float | None = 1e-4
    python: str = sys.executable


def main(parts: dict, arms: dict) -> None:
    """Runs what the command line names: an arm, or the cases of `parts` (all by default)."""
    arguments = [a for a in sys.argv[1:] if a != "--check"]
    if arguments[:1] == ["arm"]:
        _, name, *rest, folder = arguments
        return arms[name](*rest, pathlib.Path(folder))
    if wrong := set(arguments) - set(parts):
        raise SystemExit(f"unknown parts {sorted(wrong)}: there are {', '.join(parts)}")
    cases = (itertools.islice(parts[p](), 1 if CHECK else None) for p in arguments or parts)
    rows = [measure(case) for case in itertools.chain.from_iterable(cases)]
    done(rows)


def done(rows=()) -> None:
    """Prints a table of rows, or in a check that its end was reached."""
    print(json.dumps({"checked": module()}) if CHECK else table(rows), flush=True)


def lacks(package: str, what: str) -> bool:
    """Whether a package is missing that `what` needs: a check says so and goes on."""
    missing = importlib.util.find_spec(package) is None
    if missing and not CHECK:
        raise SystemExit(f"{what} needs the package {package}")
    if missing:
        report({"name": what, "skipped": f"{package} is not installed"})
    return missing


# --- an arm's side --------------------------------------------------------------------------------


def serve(run, library: str, *, flops=None, moved=None, timed=False, dtype="float32") -> None:
    """Warms up, says what a round does, then answers requests on the standard input.

    Args:
      run: one round; what it returns is waited for.
      library: that computes: "jax", "torch", or one whose products are numpy's.
      flops, moved: operations and bytes of a round. Where ours gives none, nothing is held against
        a ceiling; where the peer gives none, its work is that of ours.
      timed: `run` returns the seconds of a round itself.
      dtype: of the products that `gemm` multiplies.
    """
    wait = _waiting(library)
    wait(run())
    version = importlib.metadata.version(library)
    print(json.dumps({"versions": {library: version}, "flops": flops, "moved": moved}), flush=True)
    for request in sys.stdin:
        started = time.perf_counter()
        if request == "gemm\n":
            answer = [gemm(library, side, dtype) for side in SIDES]
        else:
            result = wait(run())
            answer = result if timed else time.perf_counter() - started
        print(json.dumps(answer), flush=True)


def serve_steps(folder, forward, variables, data, spec, steps: int = 1) -> None:
    """Serves training steps of a network, after it wrote three losses in a row to `ours.npz`.

    Args:
      forward: (variables, data) -> output, whose squared error from data["target"] is the loss.
      data: name -> array of a batch.
      spec: of AdamW, without decay.
      steps: of a round. The work of each is three forward passes, as a backward pass has two
        products for each of one.
    """
    import jax

    from t2i_jax import losses, optim, step
    from t2i_jax.commands import plan
    from t2i_jax.objective import Aux, Loss, Objective

    def loss(nets, batch, key, n):
        out = forward(nets["model"], batch)
        return losses.squared_error(out, batch["target"]).mean(), Aux()

    family = Objective(None, (Loss(("model",), loss),), {})
    spec = dict(name="adamw", weight_decay=0.0, **spec)
    optimisers = {"model": optim.make(spec, steps=1000, where="benchmark")}
    state = step.start(optimisers, {}, {"model": variables})
    update = jax.jit(step.make_update(family, optimisers, ema={}), donate_argnums=0)
    products = plan.flops(jax.make_jaxpr(forward)(variables, data))
    weight = np.ones(len(data["target"]), np.float32)
    data = jax.device_put(data | {"weight": weight})
    update = update.lower(state, {}, data).compile()
    found = []
    for _ in range(3):
        state, metrics = update(state, {}, data)
        found.append(float(metrics["model/loss"]))
    np.savez(folder / "ours.npz", losses=found)

    def run():
        nonlocal state
        for _ in range(steps):
            state, _ = update(state, {}, data)
        return state

    serve(run, "jax", flops=3 * products * steps)


def _waiting(library: str):
    if library != "jax":
        return lambda result: result
    import jax

    return jax.block_until_ready


def gemm(library: str, side: int, dtype: str) -> float:
    """GFLOP/s of the product of two square matrices: the best of several."""
    a, wait = (
        np.random.default_rng(0).standard_normal((side, side)).astype(dtype),
        _waiting(library),
    )
    multiply = np.matmul
    if library == "jax":
        import jax

        a, multiply = jax.device_put(a), jax.jit(jax.numpy.matmul)
    elif library == "torch":
        import torch

        a, multiply = torch.from_numpy(a), torch.matmul
    return 2e-9 * side**3 / fastest(lambda: wait(multiply(a, a)))


def fastest(run) -> float:
    """Seconds of the fastest of several runs after a first."""
    times = 1 if CHECK else 7
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# --- the parent's side ----------------------------------------------------------------------------


class Arm:
    """One competitor in its own process."""

    def __init__(self, arguments, folder: pathlib.Path, python: str = sys.executable):
        self._command = command(arguments, folder, python)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.ready = self._answer()

    def round(self) -> float:
        return self._ask("round")

    def gemm(self) -> list[float]:
        return self._ask("gemm")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: str):
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"died: {' '.join(self._command)}")
        return json.loads(line)


def command(arguments, folder: pathlib.Path, python: str) -> list[str]:
    """Starts an arm."""
    check = ["--check"] if CHECK else []
    return [python, "-m", module(), "arm", *arguments, str(folder), *check]


def call(arguments, folder: pathlib.Path, python: str = sys.executable) -> str:
    """Runs an arm to its end; returns what it prints."""
    asked = command(arguments, folder, python)
    return subprocess.run(
        asked, env=environment(), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def environment() -> dict:
    threads = str(THREADS)
    quick = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + QUICK} if CHECK else {}
    return {
        **os.environ,
        **quick,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
        "JAX_PLATFORMS": "cpu",
        "NPROC": threads,
    }


def measure(case: Case) -> dict:
    """Starts both arms of a case in a folder of their own, holds their results against each other,
    and compares their speed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if case.prepare:
            call(case.prepare, folder, case.python)
        ours, peer = Arm(case.ours, folder), Arm(case.peer, folder, case.python)
        same = None
        if case.tolerance is not None:
            same = parity(folder / "ours.npz", folder / "peer.npz", case.tolerance)
        row = compare(case.name, ours, peer, same, amount=case.amount)
        ours.close()
        peer.close()
    return row


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
    """Rounds in turns; reports and returns the row of figures that this file's head explains."""
    refuse_noise()
    gemm = {"ours": ours.gemm(), "peer": peer.gemm()}
    times = np.array([[ours.round(), peer.round()] for _ in range(ROUNDS)])
    ratios = times[:, 1] / times[:, 0]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, ROUNDS)), axis=1)
    ratio, low = float(np.median(ratios)), float(np.quantile(medians, 0.05))
    seconds = dict(zip(gemm, np.median(times, axis=0), strict=True))
    row = {
        "name": name,
        **{arm: round(amount / THREADS / s, 2) for arm, s in seconds.items()},
        "ratio": round(ratio, 3),
        "ratio_low": round(low, 3),
        "spread": round(float(np.ptp(times[:, 0]) / seconds["ours"]), 3),
        "gemm": {arm: [round(rate) for rate in rates] for arm, rates in gemm.items()},
    }
    ahead = max(gemm["ours"]) / max(gemm["peer"])
    if max(ahead, 1 / ahead) >= DIFFERENT:
        row |= {"ratio_gemm": round(ratio / ahead, 3), "ratio_gemm_low": round(low / ahead, 3)}
    work = {"ours": ours.ready, "peer": peer.ready}
    rate = lambda kind, arm: (work[arm][kind] or work["ours"][kind]) / seconds[arm] / 1e9
    if ours.ready["flops"]:
        row["of_gemm"] = {a: round(rate("flops", a) / max(gemm[a]), 3) for a in work}
    if ours.ready["moved"]:
        row["copy"] = round(copy(), 1)
        row["of_copy"] = {a: round(rate("moved", a) / row["copy"], 3) for a in work}
    row |= {"versions": {**ours.ready["versions"], **peer.ready["versions"]}, "parity": parity}
    return report(row)


def copy() -> float:
    """GB/s read and written by a copy in memory, which every library's processes share."""
    halves = [(np.ones(COPIED // THREADS, np.uint8), np.zeros(COPIED // THREADS, np.uint8))]
    halves += [(a.copy(), b.copy()) for a, b in halves * (THREADS - 1)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        both = lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), halves))
        return 2e-9 * COPIED / fastest(both)


# --- what is printed ------------------------------------------------------------------------------


def report(row: dict) -> dict:
    """Prints a row, and where it comes from; returns both."""
    row = row | origin()
    print(json.dumps(row), flush=True)
    return row


def module() -> str:
    """The benchmark that runs, as `python -m` wants it."""
    return sys.modules["__main__"].__spec__.name


@functools.cache
def origin() -> dict:
    """Command, commit and machine: what a figure in docs/results.md must name."""
    describe = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    asked = " ".join(["python", "-m", module(), *sys.argv[1:]])
    return {"command": asked, "commit": commit, "machine": machine()}


def machine() -> str:
    """Processor and cores; whether it has matrix units decides about products."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    matrix = " with AMX" if "amx_tile" in facts.get("flags", "").split() else ""
    return f"{facts.get('model name', 'unknown processor')}{matrix}, {os.cpu_count()} cores"


COLUMNS = ("name", "ours", "peer", "ratio", "ratio_low", "ratio_gemm", "ratio_gemm_low")
COLUMNS += ("of_gemm", "of_copy", "spread", "parity")


def table(rows) -> str:
    """Rows as Markdown, with what they have in common below."""
    if not rows:
        return ""
    pair = lambda x: f"{x['ours']} / {x['peer']}" if isinstance(x, dict) else str(x)
    columns = [
        c for c in (*COLUMNS, "spread", "parity") if any(row.get(c) is not None for row in rows)
    ]
    lines = [columns, ["---"] * len(columns)]
    lines += [[pair("" if row.get(c) is None else row[c]) for c in columns] for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    best = lambda arm: max(max(row["gemm"][arm]) for row in rows)
    versions = {k: v for row in rows for k, v in row["versions"].items()}
    return (
        f"{text}\n`{rows[0]['command']}`, commit {rows[0]['commit']}, {rows[0]['machine']}; "
        f"products at {best('ours')} GFLOP/s and the peer's at {best('peer')}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def refuse_noise() -> None:
    """Stops where other processes use more than 5 % of a core; a check does not mind."""
    if CHECK or "T2I_BENCH_NOISY" in os.environ:
        return
    import psutil

    mine = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    others = [p for p in psutil.process_iter() if p.pid not in mine]
    for p in others:
        try_cpu(p)
    time.sleep(2.0)
    busy = [(use, p.pid) for p in others if (use := try_cpu(p)) > QUIET]
    if busy:
        raise SystemExit(f"not quiet: processes {[pid for _, pid in busy]} use {busy} % of a core")


def try_cpu(process) -> float:
    import psutil

    try:
        return process.cpu_percent()
    except psutil.Error:  # it ended meanwhile
        return 0.0
