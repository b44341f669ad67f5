"""Parts of convolutional networks that halve an image's side again and again.

B batch · H W pixels · C channels · D width
"""

import flax.linen as nn

from t2i_jax import errors
from t2i_jax.models import layers, unet

BASE = 4  # pixels a side of the coarsest map
SLOPE = 0.2  # of all leaky ReLUs


def widths(res: int, width: int, least: int) -> tuple[int, ...]:
    """Channels at BASE, 2·BASE, … res pixels a side.

    There are `width` up to 8 pixels, half as many at each doubling, and never fewer than `least`.
    """
    sizes, side = [], BASE
    while side <= res:
        sizes.append(max(width * 8 // max(side, 8), min(least, width)))
        side *= 2
    return tuple(sizes)


def check(res: int) -> None:
    """Raises ConfigError unless halving leads from `res` to BASE."""
    # Only a power of two shares no bit with the number before it.
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
        # The last kernel is zero: without normalisation a random one would add variance each time.
        return x_BHWC + unet.Conv(width, zero=True)(nn.leaky_relu(h, SLOPE))


class Shrink(nn.Module):
    """Halves the side and changes the channels to `width`."""

    width: int

    @nn.compact
    def __call__(self, x_BHWC):
        return layers.Dense(self.width)(layers.space_to_depth(x_BHWC))


class Flat(nn.Module):
    """One vector of `width` from all places of a map.   -> BD"""

    width: int

    @nn.compact
    def __call__(self, x_BHWC):
        return layers.Dense(self.width)(nn.leaky_relu(x_BHWC, SLOPE).reshape(len(x_BHWC), -1))
