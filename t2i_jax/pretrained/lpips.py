"""LPIPS, a distance of pictures that agrees with people (arXiv:1801.03924): VGG16, linear, v0.1.

Tensors are named as in torchvision's `vgg16-397923af.pth` (VGG16, arXiv:1409.1556) and, those of
the distance, as in `weights/v0.1/vgg.pth` of the PyPI package lpips.

B pictures · H W pixels or places · C channels
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models.types import Features
from t2i_jax.pretrained import convolution, tensors

KINDS = ("lpips_vgg",)
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST = 2 ** (len(WIDTHS) - 1)  # side of a picture: all stages but the first halve it
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's channels in [-1, 1]


class Weights(nn.Module):
    """Of every channel in the distance, as the kernel of a convolution to one channel."""

    @nn.compact
    def __call__(self, channels: int):
        return self.param("kernel", nn.initializers.ones, (1, 1, channels, 1)).reshape(channels)


class Lpips(nn.Module):
    """Distances between pictures in [-1, 1] of one size, 16 pixels a side or more.

    As features: pooled_BD: 512, the mean of the last stage. maps: after the last ReLU of each of
    VGG16's stages, 64, 128, 256, 512 and 512 channels at strides 1, 2, 4, 8 and 16.
    """

    res: int = 256

    def __call__(self, image_BHWC) -> Features:
        maps, _ = self._stages(image_BHWC)
        return Features(convolution.pool(maps[-1]), maps=maps)

    def distance(self, x_BHWC, y_BHWC) -> jax.Array:
        """Of every x from its y: B, at least 0 and seldom above 1 (eq. 1)."""
        if x_BHWC.shape != y_BHWC.shape:
            raise errors.DataError(
                f"pictures of shapes {list(x_BHWC.shape)} and {list(y_BHWC.shape)}",
                where="Lpips.distance",
                fix="give pairs of one size",
            )
        maps, weights = self._stages(jnp.concatenate([x_BHWC, y_BHWC]))
        pairs = [jnp.split(_normalise(map_BHWC), 2) for map_BHWC in maps]
        each = [
            # The 1 × 1 convolution is linear. Behind the mean it is a small product.
            convolution.pool((a_BHWC - b_BHWC) ** 2) @ weight_C
            for (a_BHWC, b_BHWC), weight_C in zip(pairs, weights, strict=True)
        ]
        return sum(each)

    def diversity(self, image_BHWC) -> jax.Array:
        """The mean distance of all pairs of pictures, such as those of one prompt: a number.

        The mean of (a - b)² over pairs is twice the variance, so the pairs are never made.
        """
        if len(image_BHWC) < 2:
            raise errors.DataError(
                f"{len(image_BHWC)} pictures", where="Lpips.diversity", fix="give at least 2"
            )
        maps, weights = self._stages(image_BHWC)
        each = [
            2 * _normalise(map_BHWC).var(0, ddof=1).mean((0, 1)) @ weight_C
            for map_BHWC, weight_C in zip(maps, weights, strict=True)
        ]
        return sum(each)

    @nn.compact
    def _stages(self, image_BHWC):
        """Maps BHWC and weights C of every stage."""
        if (
            image_BHWC.ndim != 4
            or image_BHWC.shape[3] != 3
            or min(image_BHWC.shape[1:3]) < SMALLEST
        ):
            raise errors.DataError(
                f"pictures of shape {list(image_BHWC.shape)}",
                where="Lpips",
                fix=f"give them as [B, H, W, 3], H and W at least {SMALLEST}",
            )
        x_BHWC = (image_BHWC - jnp.array(SHIFT)) / jnp.array(SCALE)
        maps, weights, number = [], [], 0
        for stage, widths in enumerate(WIDTHS):
            if stage:
                x_BHWC = nn.max_pool(x_BHWC, (2, 2), (2, 2))
            for width in widths:
                x_BHWC = nn.relu(nn.Conv(width, (3, 3), name=f"features_{number}")(x_BHWC))
                number += 2  # the odd ones are the ReLUs
            number += 1  # that of the pooling
            maps.append(x_BHWC)
            weights.append(Weights(name=f"lin_{stage}")(widths[-1]))
        return tuple(maps), weights


def names(config) -> tensors.Names:
    return tensors.Names(
        tensors={"features_{}": "features.{}", "lin_{}": "lin{}.model.1"},
        ignored=("classifier.*",),
    )


def from_config(config: dict) -> Lpips:
    return Lpips()


def _normalise(x_BHWC):
    """Every place's channels to length 1.

    The root has no derivative where all are 0, but there the ReLU before it lets none through.
    """
    return x_BHWC / (jnp.sqrt(jnp.square(x_BHWC).sum(-1, keepdims=True)) + 1e-10)
