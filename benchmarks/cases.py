"""What both arms of a benchmark share: one set of weights and inputs, made by ours, in one file."""

import json
import pathlib

import numpy as np

from benchmarks import harness

SIZES = dict(width=32, depth=1, heads=2) if harness.CHECK else {}
CASES = {  # name -> backbone, its sizes
    "unet": dict(backbone="unet", **SIZES),
    "transformer": dict(backbone="transformer", **SIZES),
}
RES, LENGTH, TEXT_WIDTH = 32, 24, 384


def backbone(case: str):
    from t2i_jax import plugins

    sizes = dict(CASES[case])
    return plugins.load("models", sizes.pop("backbone")).Backbone(**sizes)


def inputs(batch: int) -> dict[str, np.ndarray]:
    """A picture's worth of everything, captions of unequal length."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "z": normal(batch, RES, RES, 3),
        "target": normal(batch, RES, RES, 3),
        "t": rng.uniform(0.05, 0.95, batch).astype(np.float32),
        "seq": normal(batch, LENGTH, TEXT_WIDTH),
        "mask": np.arange(LENGTH)[None] < rng.integers(8, LENGTH + 1, (batch, 1)),
        "pooled": normal(batch, TEXT_WIDTH),
    }


def cond(data):
    from t2i_jax.models.types import Cond

    return Cond(data["seq"], data["mask"], data["pooled"])


def variables(case: str, folder: pathlib.Path):
    """The network's variables, moved; writes `weights.npz` for `peer`."""
    import jax

    from t2i_jax.models import layers

    module, data = backbone(case), inputs(2)
    tree = moved(jax.jit(module.init)(jax.random.key(0), data["z"], data["t"], cond(data)))
    side = RES // getattr(module, "patch", 4)
    sizes = {
        name: getattr(module, name) for name in ("depth", "heads", "patch") if hasattr(module, name)
    }
    positions = layers.positions_2d(side, side, module.width)
    write(folder / "weights.npz", tree, sizes=json.dumps(sizes), positions=positions)
    return tree


def moved(tree):
    """Variables as after some training: nothing is zero."""
    import jax

    rng = np.random.default_rng(1)
    noise = lambda x: 0.02 * rng.standard_normal(x.shape).astype(x.dtype)
    return jax.tree.map(lambda x: np.asarray(x) + noise(x), tree)


def write(path: pathlib.Path, tree, **more) -> None:
    """A net's variables under our names, and what else the peer needs, in one file."""
    from flax import traverse_util

    flat = traverse_util.flatten_dict(tree, sep="/")
    np.savez(path, **{name: np.asarray(value) for name, value in flat.items()}, **more)


def peer(case: str, folder: pathlib.Path):
    """The torch network with the weights of `variables`."""
    from benchmarks import peers

    flat = dict(np.load(folder / "weights.npz"))
    sizes = json.loads(str(flat.pop("sizes")))
    return {"unet": peers.UNet, "transformer": peers.Transformer}[case](flat, **sizes)
