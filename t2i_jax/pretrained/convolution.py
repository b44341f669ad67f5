"""Parts of convolutional networks with frozen statistics.   BHWC pictures, or maps of features"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors


class Norm(nn.Module):
    """Batch norm by stored statistics: `mean` and `var` are parameters, too."""

    # The default of TensorFlow, where these networks were trained; torch's is 1e-5.
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (x_BHWC.shape[-1],)
        scale_C = self.param("scale", nn.initializers.ones, shape)
        bias_C = self.param("bias", nn.initializers.zeros, shape)
        mean_C = self.param("mean", nn.initializers.zeros, shape)
        var_C = self.param("var", nn.initializers.ones, shape)
        # One factor and one term for each channel: a map takes one product and one sum.
        factor_C = scale_C * jax.lax.rsqrt(var_C + self.epsilon)
        return x_BHWC * factor_C + (bias_C - mean_C * factor_C)


class Depthwise(nn.Module):
    """A convolution of every channel by itself, padded to "SAME", without bias.

    As a sum of shifted products: XLA's own for CPUs (`feature_group_count`) takes 3 to 40 times as
    long.
    """

    size: int
    stride: int = 1

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (self.size, self.size, 1, x_BHWC.shape[-1])
        kernel_HW1C = self.param("kernel", nn.initializers.lecun_normal(), shape)
        window, strides = (self.size, self.size), (self.stride, self.stride)
        sides = x_BHWC.shape[1:3]
        pads = jax.lax.padtype_to_pads(sides, window, strides, "SAME")
        x_BHWC = jnp.pad(x_BHWC, ((0, 0), *pads, (0, 0)))
        # From the first to the last pixel that one tap reads: "SAME" makes ⌈side / stride⌉ outputs.
        spans = [(-(-side // self.stride) - 1) * self.stride + 1 for side in sides]
        part = lambda i, j: x_BHWC[
            :, i : i + spans[0] : self.stride, j : j + spans[1] : self.stride
        ]
        places = itertools.product(range(self.size), repeat=2)
        return sum(part(i, j) * kernel_HW1C[i, j, 0] for i, j in places)


def check(image_BHWC, res: int, name: str) -> None:
    """DataError unless these are pictures in colour of `res` pixels a side."""
    if image_BHWC.ndim != 4 or image_BHWC.shape[1:] != (res, res, 3):
        raise errors.DataError(
            f"pictures of shape {list(image_BHWC.shape)}",
            where=name,
            fix=f"resize them to [B, {res}, {res}, 3]",
        )


def pool(x_BHWC) -> jnp.ndarray:
    """The mean over all places: BC."""
    return x_BHWC.mean((1, 2))
