"""What both arms of a benchmark share: one set of weights and inputs, made by ours, in one file."""

import json
import pathlib
import sys

import numpy as np

CASES = {  # name -> backbone, its sizes
    "unet": dict(backbone="unet"),
    "transformer": dict(backbone="transformer"),
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
    from t2i_jax.text.condition import Cond

    return Cond(data["seq"], data["mask"], data["pooled"])


def variables(case: str):
    """The network's variables, moved."""
    import jax

    module, data = backbone(case), inputs(2)
    return moved(jax.jit(module.init)(jax.random.key(0), data["z"], data["t"], cond(data)))


def moved(tree):
    """Variables as after some training: nothing is zero."""
    import jax

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def write_weights(case: str, path: pathlib.Path) -> None:
    """One file for the peer: parameters under our names, the position table, the sizes."""
    from t2i_jax.models import layers

    module = backbone(case)
    side = RES // getattr(module, "patch", 4)
    sizes = {
        name: getattr(module, name) for name in ("depth", "heads", "patch") if hasattr(module, name)
    }
    positions = layers.positions_2d(side, side, module.width)
    write(path, variables(case), sizes=json.dumps(sizes), positions=positions)


def write(path: pathlib.Path, tree, **more) -> None:
    """A net's variables under our names, and what else the peer needs, in one file."""
    from flax import traverse_util

    flat = traverse_util.flatten_dict(tree, sep="/")
    np.savez(path, **{name: np.asarray(value) for name, value in flat.items()}, **more)


def peer(case: str, path: pathlib.Path):
    """The torch network with the weights of `write_weights`."""
    from benchmarks import peers

    flat = dict(np.load(path))
    sizes = json.loads(str(flat.pop("sizes")))
    return {"unet": peers.UNet, "transformer": peers.Transformer}[case](flat, **sizes)


if __name__ == "__main__":
    write_weights(sys.argv[1], pathlib.Path(sys.argv[2]))
