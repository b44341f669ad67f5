"""Whether pretrained pipelines fit a TPU slice: drawing, whole fine-tunes and adapters.

python -m benchmarks.fits [NAME[@SLICE] …]  compiles for v5e:2x4 or another slice without a TPU and
                            without weights, and prints a table for docs/tpu.md (pip install
                            ".[tpu-aot]"; results are kept in out/fits.jsonl, so that it goes on)
python -m benchmarks.fits beside [NAME]  adapters beside the whole fine-tune on one CPU device, in
                            float32: four pictures of 256 px, of Stable Diffusion 1.5 by default
python -m benchmarks.fits --check  a step of the tiny pipeline; without libtpu for the CPU

The programs are those of configs/finetune.py and configs/finetune_lora.py, at the pixels that a
pipeline was made for, and what they draw with. Training reads captions' states and pictures'
moments from caches, as it should where nets are this large; `beside` encodes them in the step.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import harness, tpu, true_sizes

SLICE = "v5e:2x4"
PROGRAMS = ("draw", "adapters", "whole")
BOTH = ("whole", "adapters")
LIMIT = 1800  # seconds of one compilation
MOST = 64  # pictures a chip
BESIDE = 2 if harness.CHECK else 4  # pictures of `beside`
KEPT = pathlib.Path("out/fits.jsonl")


def config_of(name: str, program: str, folder: pathlib.Path):
    """The config that trains a pipeline, of which only the configs lie in a folder."""
    from configs import finetune, finetune_lora
    from t2i_jax.pretrained import folder as folders

    source = folders.TINY if harness.CHECK else folder / name
    if not source.exists():
        true_sizes.write(name, source, dtype="bfloat16")
    module = finetune_lora if program == "adapters" else finetune
    config = module.get_config(f"source={source}")
    config.data, config.cache = dict(source="shapes", size=1), "states,moments"
    return config


def run_in(folder: pathlib.Path, config, devices):
    from t2i_jax import loop
    from t2i_jax.pretrained import hf

    with hf.configs_alone():
        return loop.Run(config, folder / "run", devices)


def run_of(name: str, program: str, per_chip: int, folder: pathlib.Path, slice_name: str):
    """A `loop.Run` of a pipeline; to draw, all nets are split over the chips, too."""
    config, devices = config_of(name, program, folder), tpu.chips_of(slice_name)
    config.batch_size, config.strategy = per_chip * len(devices), "fsdp"
    return run_in(folder, config, devices)


def trial(name, program, per_chip: int, folder: pathlib.Path, slice_name: str = SLICE) -> dict:
    """What a program needs, as JSON; "refused": the bytes that the compiler wanted."""
    from t2i_jax.commands import plan
    from t2i_jax.pretrained import hf

    run = run_of(name, program, per_chip, folder, slice_name)
    with hf.configs_alone():
        batch = run.config.batch_size
        traced = tpu.sampling(run, batch) if program == "draw" else run.trace()
    try:
        return plan.needs(traced, memory=memory_of(slice_name))._asdict()
    except plan.DoesNotFit as e:
        return {"refused": e.used}


def beside(name: str, program: str, folder: pathlib.Path) -> dict:
    """What a step needs above the frozen weights, on one CPU device: its state, and temporaries."""
    import jax

    from t2i_jax.commands import plan
    from t2i_jax.pretrained import hf

    config = config_of(name, program, folder)
    config.batch_size, config.strategy, config.model.model.dtype = BESIDE, "data", "float32"
    config.cache = ""
    if not harness.CHECK:
        config.res = 256
    with hf.configs_alone():
        need = plan.needs(run_in(folder, config, jax.devices()[:1]).trace())
    return dict(name=name, program=program, state=need.donated, temporaries=need.temporaries)


def chips(slice_name: str) -> int:
    return math.prod(int(side) for side in slice_name.split(":")[1].split("x"))


def memory_of(slice_name: str) -> int:
    """Bytes of one chip."""
    from t2i_jax.commands import plan

    return plan.HBM[slice_name.split(":")[0]]


def need_of(name: str, program: str, slice_name: str, per_chip: int):
    """The same in a process of its own, which may be stopped: TimeoutExpired."""
    from t2i_jax.commands import plan

    command = [sys.executable, "-m", "benchmarks.fits", "trial"]
    command += [name, program, slice_name, str(per_chip)]
    done = subprocess.run(command, timeout=LIMIT, stdout=subprocess.PIPE, text=True, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    if "refused" in values:
        refused = plan.DoesNotFit("")
        refused.used = values["refused"]
        raise refused
    traffic = {kind: plan.Traffic(*t) for kind, t in values["traffic"].items()}
    return plan.Needs(**values | {"traffic": traffic})


def row(name: str, program: str, slice_name: str) -> dict:
    from t2i_jax.commands import plan

    memory, found = memory_of(slice_name), dict(name=name, program=program, slice=slice_name)
    started = time.perf_counter()
    try:
        n, need, seconds = tpu.largest(lambda n: need_of(name, program, slice_name, n), memory, 1)
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
        "flops": need.flops // max(n * chips(slice_name), 1),
        "moved": sum(t.bytes for t in moved),
        "hidden": sum(t.hidden for t in moved),
    }


HEAD = """\
| | slice | program | pictures a chip | peak | of memory | frozen and batch | state | \
temporaries | TFLOP a picture | moved | hidden | compile |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def line(r) -> str:
    size = lambda b: f"{b / 2**30:.2f} GiB"
    cells = [r["name"], r["slice"], r["program"]]
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
            _, name, program, slice_name, per_chip = arguments
            return print(json.dumps(trial(name, program, int(per_chip), folder, slice_name)))
        if harness.CHECK:
            os.environ.update(harness.environment())
            harness.report(trial("sd15", "adapters", 1, folder))
        if harness.CHECK or arguments[:1] == ["beside"]:
            whole, adapters = (beside(*(arguments[1:] or ["sd15"]), p, folder) for p in BOTH)
            above = lambda found: found["state"] + found["temporaries"]
            for found in (whole, adapters):
                harness.report(found | {"of_whole": above(found) / above(whole)})
            return harness.done()
    asked = [(name, at or SLICE) for name, _, at in (a.partition("@") for a in arguments)]
    asked = asked or [(name, SLICE) for name in true_sizes.PIPELINES]
    if wrong := {name for name, _ in asked} - {*true_sizes.PIPELINES}:
        raise SystemExit(f"unknown {sorted(wrong)}: there are {', '.join(true_sizes.PIPELINES)}")
    KEPT.parent.mkdir(exist_ok=True)
    rows = [json.loads(text) for text in KEPT.read_text().splitlines()] if KEPT.exists() else []
    known = {(r["name"], r["program"], r["slice"]) for r in rows}
    for name, slice_name in asked:
        for program in PROGRAMS:
            if (name, program, slice_name) not in known:
                rows.append(harness.report(row(name, program, slice_name)))
                with KEPT.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(HEAD + "".join(map(line, rows)))


if __name__ == "__main__":
    main()
