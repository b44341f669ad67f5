"""Saving and restoring a training state against torch.save and torch.load of the same bytes.

python -m benchmarks.checkpoint [blocked] [restore] [share] [--check]    (TMPDIR: the disk to try)

"blocked" is how long training stands still for one save: until the next step's result is there,
less that step's own time; "restore" is verified against manifest and fingerprint, torch.load is
not. The state is that of configs/dit.py:size=S: weights, two moments, averages. Its bytes, read
once and written once, are the work. In "share" the peer is ours, too: its ratio is the share of a
whole save that fingerprint and manifest take.
"""

import functools
import json
import pathlib
import time

import numpy as np

from benchmarks import harness

TORCH_FILE, SHAPES = "state.pt", "shapes.json"


def fresh():
    """A function of a key that makes a State of real shapes with random values."""
    import jax

    from configs import dit
    from t2i_jax import objective, optim, step, weights

    config = dit.get_config("size=S,debug" if harness.CHECK else "size=S")
    config.load, config.allow_random = {}, True
    family = objective.make(config)
    optimisers = {"model": optim.make(config.optim.model, steps=10, where="")}
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), weights.abstract_batch(family, 1))
    return lambda key: step.init(family, optimisers, config.ema, key, zeros)


def size() -> int:
    """Bytes of the state."""
    import jax

    shapes = jax.tree.leaves(jax.eval_shape(fresh(), jax.random.key(0)))
    return sum(x.size * x.dtype.itemsize for x in shapes)


def ours(case: str, folder: pathlib.Path):
    import jax

    from t2i_jax.run import checkpoint, fingerprint

    current = jax.jit(fresh())(jax.random.key(0))
    leaves = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(current)]
    (folder / SHAPES).write_text(json.dumps(leaves))
    np.savez(folder / "ours.npz", bytes=sum(x.nbytes for x in jax.tree.leaves(current)))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), current
    )
    after = jax.jit(
        lambda s: s._replace(step=s.step + 1, nets=jax.tree.map(lambda x: x * 0.999, s.nets)),
        donate_argnums=0,
    )
    workdir = folder / case
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

    def whole():
        one_step()
        started = time.perf_counter()
        books.save(current, {})
        books.wait()
        return time.perf_counter() - started

    def verify():
        started = time.perf_counter()
        fingerprint.of(checkpoint._items(current), format=checkpoint.FORMAT)
        checkpoint._files(workdir / "checkpoints" / str(books.choose()))
        return time.perf_counter() - started

    if case in ("restore", "verify"):
        whole()
    run = {"blocked": blocked, "restore": restore, "whole": whole, "verify": verify}[case]
    harness.serve(run, "jax", moved=2 * size(), timed=True)


def peer(case: str, folder: pathlib.Path):
    import torch

    rng = np.random.default_rng(0)
    tensors = {
        str(i): torch.from_numpy(rng.standard_normal(shape).astype(dtype))
        for i, (shape, dtype) in enumerate(json.loads((folder / SHAPES).read_text()))
    }
    np.savez(folder / "peer.npz", bytes=sum(x.nbytes for x in tensors.values()))
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
    harness.serve(run, "torch", timed=True)


def against(case: str):
    arms = ("ours", case), ("peer", case)
    yield harness.Case(f"checkpoint/{case}", *arms, size() / 1e6, tolerance=0.0)


def share():
    arms = ("ours", "whole"), ("ours", "verify")
    yield harness.Case("checkpoint/share", *arms, size() / 1e6, tolerance=None)


ARMS = {"ours": ours, "peer": peer}
PARTS = {case: functools.partial(against, case) for case in ("blocked", "restore")}
PARTS["share"] = share

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
