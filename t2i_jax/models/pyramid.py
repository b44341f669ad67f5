"""Convolutional networks that halve a picture's side again and again.

B batch · H W pixels · C channels · D width
"""

import flax.linen as nn

from t2i_jax import errors
from t2i_jax.models import layers, unet

BASE = 4  # side where pictures end
SLOPE = 0.2  # of leaky ReLUs


def widths(res: int, width: int, least: int) -> tuple[int, ...]:
    """Channels at BASE, 2·BASE, … res: `width` up to 8 pixels a side, half at each doubling."""
    sizes, side = [], BASE
    while side <= res:
        sizes.append(max(width * 8 // max(side, 8), min(least, width)))
        side *= 2
    return tuple(sizes)


def check(res: int) -> None:
    """Raises ConfigError unless halving leads from `res` to BASE."""
    if res < 2 * BASE or res & (res - 1):
        raise errors.ConfigError(
            f"res is {res}", where="config.res", fix="use 8, 16, 32, 64, 128, …"
        )


class Plain(nn.Module):
    """A residual block without normalisation."""

    @nn.compact
    def __call__(self, x_BHWC):
        width = x_BHWC.shape[-1]
        h = unet.Conv(width)(nn.leaky_relu(x_BHWC, SLOPE))
        return x_BHWC + unet.Conv(width, zero=True)(nn.leaky_relu(h, SLOPE))


class Shrink(nn.Module):
    """Half the side, `width` channels."""

    width: int

    @nn.compact
    def __call__(self, x_BHWC):
        return layers.Dense(self.width)(layers.space_to_depth(x_BHWC))


class Flat(nn.Module):
    """All places of a map as one vector of `width`.   -> BD"""

    width: int

    @nn.compact
    def __call__(self, x_BHWC):
        return layers.Dense(self.width)(nn.leaky_relu(x_BHWC, SLOPE).reshape(len(x_BHWC), -1))
