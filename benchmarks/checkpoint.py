"""Saving and restoring a training state against torch.save and torch.load of the same bytes.

python -m benchmarks.checkpoint [FOLDER]    (FOLDER: the disk to try, default a temporary one)

"blocked" is how long training stands still for one save: until the next step's result is there,
less that step's own time; "restore" is verified against manifest and fingerprint, torch.load is
not. The state is that of configs/dit.py:size=S: weights, two moments, averages. Ratios above 1 mean
that ours is faster. The last line gives the share of a save that fingerprint and manifest take.
"""

import json
import pathlib
import sys
import tempfile
import time

import numpy as np

from benchmarks import harness

TORCH_FILE, SHAPES = "state.pt", "shapes.json"


def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        for case in ("blocked", "restore"):
            ours = harness.Arm("benchmarks.checkpoint", "--ours", case, folder)
            peer = harness.Arm("benchmarks.checkpoint", "--peer", case, folder)
            if ours.ready["bytes"] != peer.ready["bytes"]:
                raise SystemExit(f"unequal states: {ours.ready['bytes']}, {peer.ready['bytes']}")
            megabytes = ours.ready["bytes"] / 1e6
            harness.compare(f"checkpoint/{case}", ours, peer, 0.0, amount=megabytes)
            ours.close()
            peer.close()
        ours = harness.Arm("benchmarks.checkpoint", "--ours", "share", folder)
        shares = [ours.round() for _ in range(harness.ROUNDS)]
        ours.close()
        found = {"name": "checkpoint/share", "share": float(np.median(shares)), "max": max(shares)}
        print(json.dumps(found | {"versions": ours.ready["versions"]}), flush=True)


def state():
    """A State of real shapes with random values, and its size in bytes."""
    import jax

    from configs import dit
    from t2i_jax import objective, optim, step, weights

    config = dit.get_config("size=S")
    config.load, config.allow_random = {}, True
    family = objective.make(config)
    optimisers = {"model": optim.make(config.optim.model, steps=10, where="")}
    fresh = lambda key: step.init(family, optimisers, config.ema, key, zeros)
    zeros = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), weights.abstract_batch(config, batch_size=1)
    )
    made = jax.jit(fresh)(jax.random.key(0))
    return made, sum(x.nbytes for x in jax.tree.leaves(made))


def ours(case: str, folder: pathlib.Path):
    import jax

    from t2i_jax import checkpoint, fingerprint

    versions = {"jax": jax.__version__}
    current, size = state()
    leaves = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(current)]
    (folder / SHAPES).write_text(json.dumps(leaves))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), current
    )
    after = jax.jit(
        lambda s: s._replace(step=s.step + 1, nets=jax.tree.map(lambda x: x * 0.999, s.nets)),
        donate_argnums=0,
    )
    workdir = folder / "ours"
    books = checkpoint.Checkpoints(workdir, keep=2)

    def one_step():
        nonlocal current
        started = time.perf_counter()
        current = jax.block_until_ready(after(current))
        return time.perf_counter() - started

    def blocked():
        one_step()
        alone = one_step()
        started = time.perf_counter()
        books.save(current, {})
        one_step()
        took = time.perf_counter() - started - alone
        books.wait()
        return took

    def restore():
        nonlocal current
        current = None
        started = time.perf_counter()
        current = jax.block_until_ready(books.restore(books.choose(), shapes))
        return time.perf_counter() - started

    def share():
        """Fingerprint and manifest as a share of one whole save."""
        one_step()
        started = time.perf_counter()
        books.save(current, {})
        books.wait()
        whole = time.perf_counter() - started
        started = time.perf_counter()
        fingerprint.of(checkpoint._items(current))
        checkpoint._files(workdir / "checkpoints" / str(books.choose()))
        return (time.perf_counter() - started) / whole

    run = {"blocked": blocked, "restore": restore, "share": share}[case]
    if case == "restore":
        books.save(current, {})
        books.wait()
    run()
    harness.serve({"versions": versions, "bytes": size}, run)


def peer(case: str, folder: pathlib.Path):
    import torch

    rng = np.random.default_rng(0)
    tensors = {
        str(i): torch.from_numpy(rng.standard_normal(shape).astype(dtype))
        for i, (shape, dtype) in enumerate(json.loads((folder / SHAPES).read_text()))
    }
    size = sum(x.nbytes for x in tensors.values())
    path = folder / TORCH_FILE

    def blocked():
        started = time.perf_counter()
        torch.save(tensors, path)
        return time.perf_counter() - started

    def restore():
        nonlocal tensors
        tensors = None
        started = time.perf_counter()
        tensors = torch.load(path, weights_only=True)
        return time.perf_counter() - started

    if case == "restore":
        blocked()
    run = {"blocked": blocked, "restore": restore}[case]
    run()
    harness.serve({"versions": {"torch": torch.__version__}, "bytes": size}, run)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--ours"], ["--peer"]):
        {"--ours": ours, "--peer": peer}[sys.argv[1]](sys.argv[2], pathlib.Path(sys.argv[3]))
    else:
        main()
