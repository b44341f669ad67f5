"""What guidance by the dual encoder gives a GAN for equal compute.

python -m benchmarks.guidance FOLDER [--minutes=10]

Trains configs/shapes_gan.py with L = L_CLIP + λ·L_GAN for each λ of LAMBDAS and one seed, takes the
best by `full_match` of captions of the split `heldout`, then trains with that λ and without
guidance for three seeds each, and judges the six by the protocol shapes-features (full_match,
precision, recall). A run without guidance gets as many more steps as its steps are cheaper, by the
clock of runs of 30 steps. What is finished is not repeated.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

MINUTES = flags.DEFINE_float("minutes", 10.0, "Of training, for each run.")
CONFIG = flags.DEFINE_string("config", "configs/shapes_gan.py", "What is trained.")
LAMBDAS = (0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)
PROBE = 30  # steps
CHOICE = ("--evaluators=shapes", "--num_images=256", "--seed=1")
METRICS = ("full_match", "precision", "recall")


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def trained(folder: pathlib.Path, steps: int, seed: int, weight: float | None, **more) -> None:
    """`weight`: λ, or None for no guidance."""
    loss = dict(clip=0.0) if weight is None else dict(clip=1.0, adversarial=weight)
    given = {f"loss.{name}": value for name, value in loss.items()}
    given |= dict(steps=steps, seed=seed, eval_every=0, sample_every=0, save_every=1000) | more
    changes = [f"--config.{name}={value}" for name, value in given.items()]
    run("train.py", f"--config={CONFIG.value}", f"--workdir={folder}", *changes)


def seconds_a_step(folder: pathlib.Path, weight: float | None) -> float:
    trained(folder, PROBE, 0, weight, log_every=5)
    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    return float(np.median([row["seconds"] for row in rows[1:]])) / 5


def judged(folder: pathlib.Path, name: str, *arguments: str) -> dict:
    """The row of an evaluation, which is kept."""
    kept = folder / f"{name}.json"
    if not kept.exists():
        printed = run("-m", "t2i_jax.evaluate", f"--workdir={folder}", *arguments)
        kept.write_text(printed[printed.index("{") : printed.rindex("}") + 1])
    return json.loads(kept.read_text())


def main(argv) -> None:
    folder = pathlib.Path(argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    speeds = folder / "seconds.json"
    if not speeds.exists():
        measured = {
            name: seconds_a_step(folder / f"probe_{name}", weight)
            for name, weight in (("guided", 1.0), ("none", None))
        }
        speeds.write_text(json.dumps(measured))
    steps = {
        name: round(60 * MINUTES.value / seconds)
        for name, seconds in json.loads(speeds.read_text()).items()
    }
    found = {}
    for weight in LAMBDAS:
        here = folder / f"lambda{weight:g}_seed0"
        trained(here, steps["guided"], 0, weight)
        found[weight] = judged(here, "choice", *CHOICE)["shapes/heldout/full_match"]
    best = max(found, key=found.get)
    print(json.dumps({"steps": steps, "heldout full_match by lambda": found, "chosen": best}))
    for name, weight in ((f"lambda{best:g}", best), ("none", None)):
        rows = []
        for seed in SEEDS:
            here = folder / f"{name}_seed{seed}"
            trained(here, steps["none" if weight is None else "guided"], seed, weight)
            rows.append(judged(here, "features", "--protocol=shapes-features"))
        line = {"guidance": name}
        for metric in METRICS:
            values = [v for row in rows for key, v in row.items() if key.split("-")[0] == metric]
            line[metric] = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
