"""Residual blocks of latent diffusion (arXiv:2112.10752): what its U-net and autoencoder share.

Submodules are called as in diffusers, so that `tensors.alike` finds their tensors.

B batch · H W pixels · C channels · T tokens · E width of the time's embedding
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors
from t2i_jax.models import attention, convolution
from t2i_jax.models.layers import flat
from t2i_jax.pretrained import hf

PARTS = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "time_emb_proj")  # of Residual
BOTH, FAR = ((1, 1), (1, 1)), ((0, 1), (0, 1))  # sides that a strided convolution pads


class GroupNorm(nn.Module):
    """Group normalisation in float32 (arXiv:1803.08494); the result has x's type."""

    groups: int
    epsilon: float = 1e-6

    def setup(self):
        options = dict(epsilon=self.epsilon, dtype="float32", use_fast_variance=False)
        self.norm = nn.GroupNorm(self.groups, **options)
        nn.share_scope(self, self.norm)

    def __call__(self, x_BHWC):
        return self.norm(x_BHWC).astype(x_BHWC.dtype)


def conv(features: int, dtype: str, size: int = 3, **options) -> nn.Conv:
    """A convolution whose kernel gradient is fast on CPUs, too."""
    options = {"padding": size // 2, "dtype": dtype, **options}
    return nn.Conv(features, (size, size), conv_general_dilated=convolution.conv, **options)


class Residual(nn.Module):
    """Two convolutions, each after norm and SiLU, beside the input; `timed` adds an embedding of
    the time between them.
    """

    features: int
    groups: int
    epsilon: float
    dtype: str
    timed: bool = False
    widens: bool = False  # the input has other channels

    def setup(self):
        self.norm1, self.norm2 = (GroupNorm(self.groups, self.epsilon) for _ in range(2))
        self.conv1, self.conv2 = (conv(self.features, self.dtype) for _ in range(2))
        if self.timed:
            self.time_emb_proj = nn.Dense(self.features, dtype=self.dtype)
        if self.widens:
            self.conv_shortcut = conv(self.features, self.dtype, size=1)

    def __call__(self, x_BHWC, time_BE=None):
        h_BHWC = self.conv1(nn.silu(self.norm1(x_BHWC)))
        if self.timed:
            h_BHWC += self.time_emb_proj(nn.silu(time_BE))[:, None, None]
        h_BHWC = self.conv2(nn.silu(self.norm2(h_BHWC)))
        return (self.conv_shortcut(x_BHWC) if self.widens else x_BHWC) + h_BHWC


class Smaller(nn.Module):
    """A convolution of stride 2 over what `padding` adds at the sides."""

    features: int
    dtype: str
    padding: tuple = BOTH

    def setup(self):
        self.conv = conv(self.features, self.dtype, strides=(2, 2), padding=self.padding)

    def __call__(self, x_BHWC):
        return self.conv(x_BHWC)


class Larger(nn.Module):
    """Nearest neighbours at twice the size, or at `size`, then a convolution."""

    features: int
    dtype: str

    def setup(self):
        self.conv = conv(self.features, self.dtype)

    def __call__(self, x_BHWC, size=None):
        sides = x_BHWC.shape[1:3]
        for axis, (now, then) in enumerate(zip(sides, size or [2 * n for n in sides], strict=True)):
            if then == 2 * now:
                x_BHWC = jnp.repeat(x_BHWC, 2, axis=axis + 1)
            else:  # a side that was odd before it was halved
                x_BHWC = jnp.take(x_BHWC, np.arange(then) * now // then, axis=axis + 1)
        return self.conv(x_BHWC)


class PixelAttention(nn.Module):
    """Attention of all pixels with one head, beside the input."""

    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        channels = x_BHWC.shape[-1]
        h_BTC = GroupNorm(self.groups, name="group_norm")(x_BHWC)
        h_BTC = h_BTC.reshape(len(x_BHWC), -1, channels)
        qkv_BTC = flat(nn.Dense(3 * channels, dtype=self.dtype, name="qkv"), h_BTC)
        heads = (attention.split_heads(x, 1) for x in jnp.split(qkv_BTC, 3, -1))
        out_BTC = attention.merge_heads(attention.attention(*heads))
        out_BTC = flat(nn.Dense(channels, dtype=self.dtype, name="out"), out_BTC)
        return x_BHWC + out_BTC.reshape(x_BHWC.shape)


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
        raise errors.ConfigError(
            f"{name} is {value!r:.50}", where=hf.CONFIG, fix=f"it should be like {default!r}"
        )
    return tuple(listed)


def check_groups(groups: int, channels) -> None:
    """Raises ConfigError where channels do not divide into groups."""
    for count in channels:
        if count % groups:
            raise errors.ConfigError(
                f"{count} channels in {groups} groups",
                where=hf.CONFIG,
                fix="use the config.json that was saved with the weights",
            )
