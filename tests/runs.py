"""A :debug run that several tests look at, and what they read of it."""

import json
import sys

import jax
import numpy as np

from configs import shapes_flow, shapes_transformer
from t2i_jax import objective, weights

COMMAND = [sys.executable, "train.py", "--config=configs/shapes_flow.py:debug"]
COMMAND += ["--config.log_every=1", "--config.loss.prediction=v"]  # the same, as a command
COMMAND += ["--config.optim.model.decay=constant"]


def config(**changes):
    config = shapes_flow.get_config("debug")
    config.log_every = 1
    config.optim.model.decay = "constant"  # one program, however many the steps
    config.loss.prediction = "v"  # of a hardly trained net, velocities show the noise's seed
    for key, value in changes.items():
        config[key] = value
    return config


def small(**changes):
    """The same with a transformer and Adam, which compile in a third of the time."""
    model = shapes_transformer.get_config("debug").model
    optim = dict(model=dict(name="adamw", learning_rate=1e-3))
    return config(**dict(model=model, optim=optim) | changes)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def filled(init, *args, seed=0):
    """Nets as after some training: every array of `init(*args)` counts, and nothing is compiled."""
    rng = np.random.default_rng(seed)

    def values(path, spec):
        x = rng.normal(size=spec.shape)
        match str(path[-1].key):
            case "kernel":
                x *= np.prod(spec.shape[:-1], initial=1.0) ** -0.5
            case "scale" | "var":
                x = 1 + 0.05 * np.abs(x)
            case _:
                x *= 0.05
        return x.astype(spec.dtype)

    shapes = jax.eval_shape(init, *args)
    return jax.device_put(jax.tree_util.tree_map_with_path(values, shapes))


def abstract_batch(config, batch_size: int | None = None):
    """Shapes of a batch of the config's family."""
    return weights.abstract_batch(objective.make(config), batch_size or config.batch_size)
