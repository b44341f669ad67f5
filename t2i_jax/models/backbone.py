"""Flow networks by name, built from a config's `model`."""

import math

import flax.linen as nn

from t2i_jax import errors, plugins


def build(sizes, *, res: int, where: str) -> nn.Module:
    """The `Backbone` of models/<sizes.backbone>.py, by default the U-net.

    It maps (x_BHWC, t_B, cond) to the shape of x_BHWC.

    Args:
      sizes: the network's fields by name, and `backbone`.
      res: pixels a side of the images.
      where: the place of `sizes` in the config, for errors.
    Raises:
      ConfigError: no such network or size, or sizes that do not fit the images.
    """
    sizes = dict(sizes)
    kind = plugins.load("models", sizes.pop("backbone", "unet"))
    model = plugins.network(kind.Backbone, where=where, options=sizes)
    for name, value, unit in (
        ("config.res", res, model.unit),
        # Sines and cosines of rows and columns are a quarter of the width each.
        (f"{where}.width", model.width, math.lcm(4, model.heads)),
    ):
        if value < unit or value % unit:
            raise errors.ConfigError(
                f"{name.removeprefix('config.')} is {value}, which is no multiple of {unit}",
                where=name,
                fix=f"use {max(value // unit, 1) * unit} or {(value // unit + 1) * unit}",
            )
    return model
