"""Flow networks by name, as a config's `model` describes them."""

import math

import flax.linen as nn

from t2i_jax import errors, plugins


def build(sizes, *, res: int, where: str) -> nn.Module:
    """`Backbone` of models/<sizes.backbone>.py, by default the U-net.

    It maps (x_BHWC, t_B, cond) to pictures' shape.

    Raises:
      ConfigError: no such network or size, or one that does not fit the pictures.
    """
    sizes = dict(sizes)
    kind = plugins.load("models", sizes.pop("backbone", "unet"))
    model = plugins.network(kind.Backbone, where=where, options=sizes)
    for name, value, unit in (
        ("config.res", res, model.unit),
        (f"{where}.width", model.width, math.lcm(4, model.heads)),  # positions take quarters
    ):
        if value < unit or value % unit:
            raise errors.ConfigError(
                f"{name.removeprefix('config.')} is {value}, which is no multiple of {unit}",
                where=name,
                fix=f"use {max(value // unit, 1) * unit} or {(value // unit + 1) * unit}",
            )
    return model
