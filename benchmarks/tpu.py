"""Writes the tables of docs/tpu.md: what training and sampling need, compiled without a TPU.

python -m benchmarks.tpu [SLICE …]      (pip install ".[tpu-aot]"; results are kept in
out/tpu.jsonl, so that a run that was stopped goes on; the page's last part is written from them)
python -m benchmarks.tpu --check        (a tiny step and a tiny sampler; nothing is written; where
libtpu is lacking, both are compiled for the CPU)
"""

import functools
import itertools
import json
import math
import os
import pathlib
import sys
import time

from benchmarks import harness

SLICES = ("v5e:2x4", "v6e:2x2", "v5p:2x2x1")
SIZES = ("B", "XL")
PROGRAMS = (  # strategy, remat policy (none: the sampler), the most telling first
    ("fsdp", "full"),
    ("data", "none"),
    ("data", ""),
    ("data", "full"),
    ("fsdp", "dots"),
    ("fsdp", ""),
)
KEPT = pathlib.Path("out/tpu.jsonl")
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "tpu.md"
FIRST, MOST = (
    (2, 4) if harness.CHECK else (32, 2048)
)  # pictures on a chip that the search begins with, and its end


@functools.cache
def chips_of(slice_name):
    """The devices to compile for."""
    import jax

    from t2i_jax.commands import plan

    if harness.lacks("libtpu", f"tpu/{slice_name}"):
        return jax.devices()
    return plan.slice_devices(slice_name)


def make_run(slice_name, size, strategy, remat, per_chip):
    from configs import dit
    from t2i_jax import loop

    devices = chips_of(slice_name)
    config = dit.get_config(f"size={size},debug" if harness.CHECK else f"size={size}")
    config.strategy, config.model.model.remat = strategy, remat
    config.batch_size = per_chip * len(devices)
    return loop.Run(config, pathlib.Path("out/none"), devices)


def sampling(run, batch_size: int):
    """The sampler's program for one batch of prompts, traced with the shardings of a run."""
    import jax

    from t2i_jax import sharding, weights

    config, layout = run.config, run.layout
    nets = weights.abstract_nets(run.predictor.objective, config)
    batch = weights.abstract_batch(run.family, batch_size)
    placed = layout.batch if batch_size % layout.parts == 0 else layout.whole
    return run.predictor.trace(
        "sample",
        sharding.on(nets, layout.nets(nets)),
        sharding.on(batch, jax.tree.map(lambda _: placed, batch)),
    )


def largest(need_of, memory, first=FIRST):
    """The largest power of two of pictures a chip whose program fits, and what it needs.

    need_of: pictures a chip -> `plan.Needs`; raises DoesNotFit where the compiler refuses.

    Between two programs memory is taken to grow in proportion with the pictures; what is returned
    has been compiled, and so has the next larger one if it seemed to fit. Returns (pictures, needs,
    seconds), pictures 0 where not even one fits.
    """
    from t2i_jax.commands import plan

    seen = {}

    def tried(n):
        started = time.perf_counter()
        try:
            need = need_of(n)
        except plan.DoesNotFit as e:
            need = e
        seen[n] = need, time.perf_counter() - started
        return getattr(need, "fits", False)

    n = first
    while not tried(n) and n > 1:
        n //= 2
    need = seen[n][0]
    if not getattr(need, "fits", False):
        return 0, *seen[n]
    fixed, each = need.peak - need.temporaries, need.temporaries / n
    while n < MOST and 2 * n not in seen and fixed + 2 * n * each <= memory:
        guess = 2 ** math.floor(math.log2((memory - fixed) / each))
        guess = max(min(guess, MOST), 2 * n)
        if not tried(guess):
            while guess > n and not getattr(seen[guess][0], "fits", False):
                guess //= 2
                if guess not in seen:
                    tried(guess)
            n = guess
            break
        each = (seen[guess][0].peak - seen[n][0].peak) / (guess - n)
        fixed, n = seen[guess][0].peak - guess * each, guess
    return n, *seen[n]


def row(slice_name, size, strategy, remat) -> dict:
    from t2i_jax.commands import plan

    memory = plan.HBM[slice_name.split(":")[0]]
    chips = len(chips_of(slice_name))
    if remat:
        traced = lambda n: make_run(slice_name, size, strategy, remat, n).trace()
    else:
        traced = lambda n: sampling(make_run(slice_name, size, strategy, "none", n), n * chips)
    n, need, seconds = largest(lambda n: plan.needs(traced(n), memory=memory), memory)
    found = dict(slice=slice_name, size=size, strategy=strategy, remat=remat, pictures=n)
    found |= dict(chips=chips, memory=memory, seconds=seconds)
    if isinstance(need, plan.DoesNotFit):
        return found | {"peak": need.used}
    moved = need.traffic.values()
    return found | {
        "peak": need.peak,
        "donated": need.donated,
        "temporaries": need.temporaries,
        "flops": need.flops // max(n * chips, 1),
        "traffic": {kind: list(t) for kind, t in need.traffic.items()},
        "bytes": sum(t.bytes for t in moved),
        "hidden": sum(t.hidden for t in moved),
    }


def measure(slices) -> list[dict]:
    import jax

    KEPT.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    known = {(r["slice"], r["size"], r["strategy"], r["remat"]) for r in rows}
    order = [(size, *program) for size in SIZES for program in PROGRAMS]
    cases = itertools.product(PROGRAMS, SIZES, slices)
    for case in ((name, size, *program) for program, size, name in cases):
        if case not in known:
            rows.append(row(*case) | {"jax": jax.__version__})
            harness.report(rows[-1])
            with KEPT.open("a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
    return sorted(rows, key=lambda r: order.index((r["size"], r["strategy"], r["remat"])))


MARK = "<!-- From here on: python -m benchmarks.tpu -->\n"
TABLE = """
| | remat | pictures | peak | of memory | temporaries | GFLOP a picture | moved | hidden | compile |
|---|---|---|---|---|---|---|---|---|---|
"""


def page(rows) -> str:
    """The page as it is, with these rows in its tables."""
    text = PAGE.read_text().split(MARK)[0] + MARK
    for slice_name in SLICES:
        for size in SIZES:
            chosen = [r for r in rows if (r["slice"], r["size"]) == (slice_name, size)]
            if not chosen:
                continue
            chips, memory = chosen[0]["chips"], chosen[0]["memory"] / 2**30
            text += f"\n## DiT-{size}/2 on {slice_name}: {chips} chips of {memory:.0f} GiB\n\n"
            text += f"Compiled with JAX {chosen[0]['jax']}.\n"
            text += TABLE + "".join(line(r) for r in chosen)
    return text


def line(r) -> str:
    gigabytes = lambda b: f"{b / 2**30:.2f} GiB"
    name = f"step, {r['strategy']}" if r["remat"] else f"sampler, {r['strategy']}"
    peak = gigabytes(r["peak"]) if r["peak"] else "?"
    share = f"{r['peak'] / r['memory']:.0%}" if r["peak"] else "?"
    cells = [name, r["remat"] or "–", r["pictures"] or "does not fit", peak, share]
    if "bytes" in r:
        moved = {kind: t[1] for kind, t in r["traffic"].items() if t[1] > 2**20}
        kinds = ", ".join(f"{kind} {gigabytes(b)}" for kind, b in moved.items())
        hidden = f"{r['hidden'] / r['bytes']:.0%}" if r["bytes"] > 2**20 else "–"
        cells += [gigabytes(r["temporaries"]), f"{r['flops'] / 1e9:.0f}", kinds or "–", hidden]
    else:
        cells += ["–"] * 4
    return "| " + " | ".join(map(str, [*cells, f"{r['seconds']:.0f} s"])) + " |\n"


def check():
    os.environ.update(harness.environment())
    import jax

    for strategy, remat in PROGRAMS[:3:2]:
        found = row(SLICES[0], SIZES[0], strategy, remat) | {"jax": jax.__version__}
        harness.report(found)
        if line(found) not in page([found]):
            raise SystemExit("the page lacks a row")


def main():
    if harness.CHECK:
        check()
        return harness.done()
    rows = measure(sys.argv[1:] or SLICES)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
