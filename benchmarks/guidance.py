"""What guidance by the dual encoder gives a GAN for equal compute.

python -m benchmarks.guidance FOLDER [--steps=600] [-- --config.KEY=VALUE …]
python -m benchmarks.guidance --check     (one λ, one seed, tiny nets, ten steps)

Trains configs/shapes_gan.py:guided, L = L_CLIP + λ·L_GAN, for each λ of LAMBDAS and one seed, takes
the best by `full_match` of captions of the split `heldout`, then trains with that λ and without
guidance for three other seeds each, and judges the six by the protocol shapes-features (full_match,
precision, recall). A run without guidance gets as many more steps as its steps are cheaper, by the
clock of runs of 30 steps. As many runs at once as there are cores, each on its own. What is
finished is not repeated. What comes after -- changes the config of every run.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import harness
from t2i_jax.pretrained import hf
from t2i_jax.quality import protocol

STEPS = flags.DEFINE_integer("steps", 600, "Of a guided run.")
CONFIG = flags.DEFINE_string("config", "configs/shapes_gan.py", "What is trained.")
flags.DEFINE_bool("check", False, "Whether all of it still runs.")
KINDS = {"guided": 1.0, "none": None}  # kind of training -> λ of the run whose steps are clocked
LAMBDAS = (0.3, 1.0, 3.0)
SEEDS = (1, 2, 3)  # 0 chooses λ
PROBE = 30  # steps
CHOICE = ("--evaluators=shapes", "--num_images=512", "--seed=1")
PROTOCOL = "shapes-features"
JUDGE = (f"--protocol={PROTOCOL}",)
METRICS = ("full_match", "precision", "recall")
if harness.CHECK:
    KINDS, LAMBDAS, SEEDS, PROBE = {"guided": 1.0}, (1.0,), (0,), 10
    CHOICE = JUDGE = ("--evaluators=shapes", "--num_images=8", "--seed=1")
    METRICS = ("shapes/heldout/full_match",)
CORES = queue.Queue()  # that are free
CHANGES = []  # from the command line


def run(*arguments: str) -> str:
    """What a program prints that has one core."""
    core = CORES.get()
    try:
        pin = lambda: os.sched_setaffinity(0, {core})
        return subprocess.run(
            [sys.executable, *arguments],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            preexec_fn=pin,
            env=harness.environment() if harness.CHECK else None,
        ).stdout
    finally:
        CORES.put(core)


def trained(folder: pathlib.Path, steps: int, seed: int, weight: float | None, **more) -> None:
    """`weight`: λ, or None for no guidance."""
    given = {} if weight is None else {"loss.adversarial": weight}
    kinds = ["guided"] * (weight is not None) + ["debug"] * harness.CHECK
    config = f"{CONFIG.value}:{','.join(kinds)}"
    given |= dict(steps=steps, seed=seed, eval_every=0, sample_every=0, save_every=1000) | more
    changes = [f"--config.{name}={value}" for name, value in given.items()]
    run("train.py", f"--config={config}", f"--workdir={folder}", *CHANGES, *changes)


def seconds_a_step(folder: pathlib.Path, weight: float | None) -> float:
    trained(folder, PROBE, 0, weight, log_every=5)
    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    return float(np.median([row["seconds"] for row in rows[1:]])) / 5


def judged(folder: pathlib.Path, name: str, arguments, *training) -> dict:
    """The row of an evaluation of what `trained(folder, *training)` makes; it is kept."""
    kept = folder / f"{name}.json"
    if not kept.exists():
        trained(folder, *training)
        printed = run("-m", "t2i_jax", "evaluate", f"--workdir={folder}", *arguments)
        kept.write_text(printed[printed.index("{") : printed.rindex("}") + 1])
    return json.loads(kept.read_text())


def main(argv) -> None:
    if harness.CHECK:
        with tempfile.TemporaryDirectory() as name:
            alone(pathlib.Path(name), steps=PROBE)
    else:
        # Its weights must be there in the end.
        hf.locate(protocol.read(PROTOCOL).extractor)
        folder, CHANGES[:] = pathlib.Path(argv[1]), argv[2:]
        folder.mkdir(parents=True, exist_ok=True)
        asked, kept = [STEPS.value, CONFIG.value, *CHANGES], folder / "asked.json"
        if kept.exists() and json.loads(kept.read_text()) != asked:
            raise SystemExit(f"{folder} holds runs of {kept.read_text()}: give another folder")
        kept.write_text(json.dumps(asked))
        alone(folder, STEPS.value)
    harness.done()


def alone(folder: pathlib.Path, steps: int) -> None:
    """Compares with each run on a core of its own."""
    cores = os.sched_getaffinity(0)
    for core in cores:
        CORES.put(core)
    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        compared(folder, steps, lambda fn, items: list(pool.map(fn, items)))


def compared(folder: pathlib.Path, guided_steps: int, each) -> None:
    """`each`: map, several at once."""
    speeds = folder / "seconds.json"
    if not speeds.exists():
        clock = lambda kind: seconds_a_step(folder / f"clock_{kind}", KINDS[kind])
        speeds.write_text(json.dumps(dict(zip(KINDS, each(clock, KINDS), strict=True))))
    seconds = json.loads(speeds.read_text())
    steps = {
        kind: round(guided_steps * seconds["guided"] / value) for kind, value in seconds.items()
    }

    def chosen(weight):
        here = folder / f"lambda{weight:g}_seed0"
        row = judged(here, "choice", CHOICE, steps["guided"], 0, weight)
        return row["shapes/heldout/full_match"]

    found = dict(zip(LAMBDAS, each(chosen, LAMBDAS), strict=True))
    best = max(found, key=found.get)
    harness.report({"steps": steps, "heldout full_match by lambda": found, "chosen": best})

    def row(job):
        weight, seed = job
        here = folder / f"{'none' if weight is None else f'lambda{weight:g}'}_seed{seed}"
        kind = "none" if weight is None else "guided"
        return judged(here, "features", JUDGE, steps[kind], seed, weight)

    weights = (best, None)[: len(KINDS)]
    jobs = [(weight, seed) for seed in SEEDS for weight in weights]
    rows = dict(zip(jobs, each(row, jobs), strict=True))
    for weight in weights:
        line = {"lambda": weight}
        for metric in METRICS:
            values = [
                value
                for seed in SEEDS
                for key, value in rows[weight, seed].items()
                if key.split("-")[0] == metric
            ]
            line[metric] = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        harness.report(line)


if __name__ == "__main__":
    app.run(main)
