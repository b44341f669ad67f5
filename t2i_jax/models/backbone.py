"""Flow networks by name, built from a config's `model`."""

import math
from typing import Any, Protocol

import jax

from t2i_jax import errors, plugins


class FlowNetwork(Protocol):
    """The interface of a flow model's network, a Linen module.

    unit: height and width of the input must be multiples of it.
    """

    unit: int

    def prepare(self, cond: Any) -> Any:
        """The part of the conditions that is the same at every step, such as keys of the text.

        A sampler computes it once for all its steps.
        """

    def __call__(self, x_BHWC, t_B, cond: Any, prepared: Any = None) -> jax.Array:
        """The output in the shape of x_BHWC, for times from 0, the image, to 1, the noise.

        prepared: the result of `prepare(cond)`, where that has been computed before.
        """


def build(sizes, *, shape_HWC: tuple[int, int, int], where: str) -> FlowNetwork:
    """The `Backbone` of models/<sizes.backbone>.py, by default the U-net.

    Args:
      sizes: the network's fields by name, and `backbone`.
      shape_HWC: of an example. Its channels are the default for the network's.
      where: the place of `sizes` in the config, for errors.
    Raises:
      ConfigError: no such network or size, or one that does not fit the examples.
    """
    *sides, channels = shape_HWC
    sizes = {"channels": channels, **sizes}
    kind = plugins.load("models", sizes.pop("backbone", "unet"))
    model = plugins.network(kind.Backbone, where=where, options=sizes)
    for name, value, unit in (
        *(("config.res", side, model.unit) for side in sides),
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
