"""Residual blocks of diffusers' convolutional networks.

B pictures · H W pixels · C channels · D width of a state of time
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors
from t2i_jax.models import convolution
from t2i_jax.pretrained import hf

PARTS = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")


def names(ours: str, theirs: str) -> dict[str, str]:
    """The entries of `tensors.Names` for a `Block` at `ours`."""
    return {f"{ours}/{part}": f"{theirs}.{part}" for part in PARTS}


def conv(width: int, size: int = 3, *, dtype: str, name: str | None = None, **options) -> nn.Conv:
    """A convolution of NHWC by a square kernel; by default it keeps the sides."""
    options = dict(conv_general_dilated=convolution.conv) | options
    return nn.Conv(width, (size, size), dtype=dtype, name=name, **options)


def halving(width: int, padding, **options) -> nn.Conv:
    """A 3 × 3 convolution at every second pixel of either side."""
    return conv(width, strides=(2, 2), padding=padding, **options)


def doubling(width: int, **options) -> nn.Conv:
    """A 3 × 3 convolution of a map whose sides are doubled by repeating its pixels."""
    return conv(width, conv_general_dilated=convolution.of_doubled, **options)


def norm(groups: int, epsilon: float, *, dtype: str, name: str | None = None) -> nn.GroupNorm:
    """Statistics and the product are float32; `dtype` is that of the result."""
    # The squares of differences from the mean: those of large values lose the digits.
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Two convolutions beside a skip, each behind a group norm; `dtype` computes.

    epsilon: of the norms.
    """

    width: int
    groups: int = 32
    epsilon: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC, time_BD=None):
        """time_BD: a state of time that is projected and added between the convolutions."""
        dtype = self.dtype
        y_BHWC = norm(self.groups, self.epsilon, dtype=dtype, name="norm1")(x_BHWC)
        y_BHWC = conv(self.width, dtype=dtype, name="conv1")(nn.silu(y_BHWC))
        if time_BD is not None:
            project = nn.Dense(self.width, dtype=dtype, name="time_emb_proj")
            y_BHWC += project(nn.silu(time_BD))[:, None, None]
        y_BHWC = norm(self.groups, self.epsilon, dtype=dtype, name="norm2")(y_BHWC)
        y_BHWC = conv(self.width, dtype=dtype, name="conv2")(nn.silu(y_BHWC))
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = conv(self.width, 1, dtype=dtype, name="conv_shortcut")(x_BHWC)
        return x_BHWC + y_BHWC


class Smaller(nn.Module):
    """A convolution of stride 2 over a row and column of zeros on all sides."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        return halving(self.width, ((1, 1), (1, 1)), dtype=self.dtype, name="conv")(x_BHWC)


class Larger(nn.Module):
    """A convolution of a map at twice its size, or at `size`, by its nearest pixels."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC, size):
        now = x_BHWC.shape[1:3]
        # Doubling is the common case, and has a faster program.
        if tuple(size) == (2 * now[0], 2 * now[1]):
            return doubling(self.width, dtype=self.dtype, name="conv")(x_BHWC)
        for axis in (0, 1):  # a side that was odd before it was halved
            nearest = np.arange(size[axis]) * now[axis] // size[axis]
            x_BHWC = jnp.take(x_BHWC, nearest, axis=axis + 1)
        return conv(self.width, dtype=self.dtype, name="conv")(x_BHWC)


def sizes(config, name: str, default, entries: int = 0) -> tuple[int, ...]:
    """A list of sizes from a config.json; one number stands for `entries` of them.

    Raises:
      ConfigError: it is something else.
    """
    value = config.get(name)
    value = default if value is None else value
    listed = [value] * entries if isinstance(value, int) and entries else value
    fits = isinstance(listed, list | tuple) and (not entries or len(listed) == entries) and listed
    if not fits or not all(type(n) is int and 0 < n <= hf.LARGE for n in listed):
        raise errors.misfit(f"{name} is {value!r:.50}", f"it should be like {default!r}")
    return tuple(listed)


def check_groups(groups: int, channels) -> None:
    """Raises ConfigError where channels do not divide into groups."""
    for count in channels:
        if count % groups:
            raise errors.misfit(f"{count} channels in {groups} groups")
