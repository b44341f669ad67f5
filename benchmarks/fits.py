"""Whether pretrained pipelines fit a TPU slice: drawing, whole fine-tunes and adapters.

python -m benchmarks.fits [NAME …]   compiles for v5e:2x4 without a TPU and without weights, and
                                     prints a table for docs/tpu.md (pip install ".[tpu-aot]";
                                     results are kept in out/fits.jsonl, so that it goes on)
python -m benchmarks.fits --check    a step of the tiny pipeline; without libtpu for the CPU

The programs are those of configs/finetune.py and configs/finetune_lora.py, at the pixels that a
pipeline was made for, and what they draw with.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import harness, tpu, true_sizes

SLICE = "v5e:2x4"
PROGRAMS = ("draw", "adapters", "whole")
LIMIT = 600  # seconds of one compilation
MOST = 64  # pictures a chip
KEPT = pathlib.Path("out/fits.jsonl")


def run_of(name: str, program: str, per_chip: int, folder: pathlib.Path):
    """A `loop.Run` of a pipeline; to draw, all nets are split over the chips, too."""
    from configs import finetune, finetune_lora
    from t2i_jax import loop
    from t2i_jax.pretrained import folder as folders
    from t2i_jax.pretrained import hf

    source = folders.TINY if harness.CHECK else folder / name
    if not source.exists():
        true_sizes.write(name, source, dtype="bfloat16")
    module = finetune_lora if program == "adapters" else finetune
    config = module.get_config(f"source={source}")
    devices = tpu.chips_of(SLICE)
    config.batch_size, config.strategy = per_chip * len(devices), "fsdp"
    config.data = dict(source="shapes", size=1)
    with hf.configs_alone():
        return loop.Run(config, folder / "run", devices)


def trial(name: str, program: str, per_chip: int, folder: pathlib.Path) -> dict:
    """What a program needs, as JSON; "refused": the bytes that the compiler wanted."""
    from t2i_jax.commands import plan
    from t2i_jax.pretrained import hf

    run = run_of(name, program, per_chip, folder)
    with hf.configs_alone():
        batch = run.config.batch_size
        traced = tpu.sampling(run, batch) if program == "draw" else run.trace()
    try:
        return plan.needs(traced, memory=plan.HBM[SLICE.split(":")[0]])._asdict()
    except plan.DoesNotFit as e:
        return {"refused": e.used}


def need_of(name: str, program: str, per_chip: int):
    """The same in a process of its own, which may be stopped: TimeoutExpired."""
    from t2i_jax.commands import plan

    command = [sys.executable, "-m", "benchmarks.fits", "trial", name, program, str(per_chip)]
    done = subprocess.run(command, timeout=LIMIT, stdout=subprocess.PIPE, text=True, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    if "refused" in values:
        refused = plan.DoesNotFit("")
        refused.used = values["refused"]
        raise refused
    traffic = {kind: plan.Traffic(*t) for kind, t in values["traffic"].items()}
    return plan.Needs(**values | {"traffic": traffic})


def row(name: str, program: str) -> dict:
    from t2i_jax.commands import plan

    memory, found = plan.HBM[SLICE.split(":")[0]], dict(name=name, program=program)
    started = time.perf_counter()
    try:
        n, need, seconds = tpu.largest(lambda n: need_of(name, program, n), memory, 1)
    except subprocess.TimeoutExpired:
        return found | {"stopped": time.perf_counter() - started}
    found |= dict(pictures=n, seconds=seconds, memory=memory)
    if isinstance(need, plan.DoesNotFit):
        return found | {"peak": need.used}
    moved = need.traffic.values()
    return found | {
        "peak": need.peak,
        "arguments": need.arguments,
        "state": need.donated,
        "temporaries": need.temporaries,
        "flops": need.flops // max(n * 8, 1),
        "moved": sum(t.bytes for t in moved),
        "hidden": sum(t.hidden for t in moved),
    }


HEAD = """\
| | program | pictures a chip | peak | of memory | frozen and batch | state | temporaries | \
TFLOP a picture | moved | hidden | compile |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def line(r) -> str:
    size = lambda b: f"{b / 2**30:.2f} GiB"
    cells = [r["name"], r["program"]]
    if "stopped" in r:
        cells += [f"not compiled in {LIMIT} s", *["–"] * 9]
        return f"| {' | '.join(cells)} |\n"
    share = [size(r["peak"]), f"{r['peak'] / r['memory']:.0%}"] if r["peak"] else ["?", "?"]
    cells += [str(r["pictures"] or "does not fit"), *share]
    if "state" in r:
        state = r["state"] if r["program"] != "draw" else 0
        cells += [size(r["arguments"] - state), size(state) if state else "–"]
        hidden = f"{r['hidden'] / r['moved']:.0%}" if r["moved"] else "–"
        cells += [size(r["temporaries"]), f"{r['flops'] / 1e12:.2f}", size(r["moved"]), hidden]
    else:
        cells += ["–"] * 6
    cells.append(f"{r['seconds']:.0f} s")
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--check"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if arguments[:1] == ["trial"]:
            _, name, program, per_chip = arguments
            return print(json.dumps(trial(name, program, int(per_chip), folder)))
        if harness.CHECK:
            os.environ.update(harness.environment())
            found = trial("sd15", "adapters", 1, folder)
            harness.report(found)
            return harness.done()
    if wrong := set(arguments) - set(true_sizes.PIPELINES):
        raise SystemExit(f"unknown {sorted(wrong)}: there are {', '.join(true_sizes.PIPELINES)}")
    KEPT.parent.mkdir(exist_ok=True)
    rows = [json.loads(text) for text in KEPT.read_text().splitlines()] if KEPT.exists() else []
    known = {(r["name"], r["program"]) for r in rows}
    for name in arguments or true_sizes.PIPELINES:
        for program in PROGRAMS:
            if (name, program) not in known:
                rows.append(harness.report(row(name, program)))
                with KEPT.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(HEAD + "".join(map(line, rows)))


if __name__ == "__main__":
    main()
