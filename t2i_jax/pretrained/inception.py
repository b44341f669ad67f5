"""InceptionV3 (arXiv:1512.00567) as FID was defined with it: the graph `inception-2015-12-05`.

Other implementations differ in their weights, and in that averages near the border count padding
and that the last block averages, too. Tensors are named as in pytorch-fid's port of that graph,
`pt_inception-2015-12-05-6726825d.pth`.

B pictures · H W pixels · C channels · D features · K classes
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax.models.types import Features
from t2i_jax.pretrained import convolution, tensors

KINDS = ("inception_v3_fid",)
CLASSES = 1008  # of the graph; those from 1000 on mean nothing
SPATIAL = 7  # channels of its spatial features


class Conv(NamedTuple):
    """A convolution without bias, batch norm and ReLU; strided ones have no padding."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def _mean(x_BHWC):
    """Of 3 × 3 places, of which those in the padding do not count."""
    return nn.avg_pool(x_BHWC, (3, 3), padding="SAME", count_include_pad=False)


def _largest(x_BHWC):
    return nn.max_pool(x_BHWC, (3, 3), padding="SAME")


def _shrink(x_BHWC):
    return nn.max_pool(x_BHWC, (3, 3), (2, 2))


# A block is a tuple of branches, side by side; a branch is a tuple of steps, one after another; a
# step is a convolution, a function, or a tuple of convolutions side by side.


def _a(pooled):
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (_mean, Conv("branch_pool", pooled)),
    )


def _b():
    return (
        (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
        (_shrink,),
    )


def _c(width):
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (_mean, Conv("branch_pool", 192)),
    )


def _d():
    return (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
        (_shrink,),
    )


def _e(pool):
    fork = lambda name: (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            fork("branch3x3dbl_3"),
        ),
        (pool, Conv("branch_pool", 192)),
    )


STEM = (
    (
        Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
        Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
        Conv("Conv2d_2b_3x3", 64, (3, 3)),
        _shrink,
    ),
    (Conv("Conv2d_3b_1x1", 80), Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"), _shrink),
)
BLOCKS = {
    **{"Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": _b()},
    **{"Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192)},
    # The graph's last block takes maxima where the one before it averages.
    **{"Mixed_7a": _d(), "Mixed_7b": _e(_mean), "Mixed_7c": _e(_largest)},
}


class Unit(nn.Module):
    """What a Conv says."""

    spec: Conv

    @nn.compact
    def __call__(self, x_BHWC):
        _, width, kernel, stride, padding = self.spec
        conv = nn.Conv(width, kernel, stride, padding, use_bias=False, name="conv")
        return nn.relu(convolution.Norm(name="bn")(conv(x_BHWC)))


def _run(steps, x_BHWC):
    """Within a compact method, of which the convolutions become parts."""
    for step in steps:
        if isinstance(step, Conv):
            x_BHWC = Unit(step, name=step.name)(x_BHWC)
        elif isinstance(step, tuple):
            x_BHWC = jnp.concatenate([_run((one,), x_BHWC) for one in step], axis=-1)
        else:
            x_BHWC = step(x_BHWC)
    return x_BHWC


class Block(nn.Module):
    """Branches side by side, their channels joined."""

    branches: tuple

    @nn.compact
    def __call__(self, x_BHWC):
        return jnp.concatenate([_run(steps, x_BHWC) for steps in self.branches], axis=-1)


class Inception(nn.Module):
    """Features of pictures in [-1, 1] of 299 pixels a side, what the graph resizes all others to.

    pooled_BD: 2048 of the layer `pool_3`, for FID, KID, precision and recall.
    logits_BK: 1008 without the layer's bias, which the first code of the Inception Score left out,
      and so do ADM's evaluator and torch-fidelity (there `logits_unbiased`).
    spatial_BD: the first 7 channels of `mixed_6/conv`, 17 × 17 × 7 = 2023, for sFID as ADM measures
      it (arXiv:2105.05233). The graph counts its blocks from 0: its mixed_6 is Mixed_6d here.
    maps: 64, 192, 768 and 2048 channels of 73, 35, 17 and 8 a side.
    """

    res: int = 299

    @nn.compact
    def __call__(self, image_BHWC) -> Features:
        convolution.check(image_BHWC, self.res, "Inception")
        x_BHWC = (127.5 * image_BHWC - 0.5) / 128  # the graph's (x - 128) / 128 of 0 … 255
        maps, ends = [], {}
        for steps in STEM:
            x_BHWC = _run(steps, x_BHWC)
            maps.append(x_BHWC)
        for name, branches in BLOCKS.items():
            x_BHWC = ends[name] = Block(branches, name=name)(x_BHWC)
        pooled_BD = convolution.pool(x_BHWC)
        logits_BK = nn.Dense(CLASSES, use_bias=False, name="fc")(pooled_BD)
        spatial_BD = ends["Mixed_6d"][..., :SPATIAL].reshape(len(image_BHWC), -1)
        return Features(pooled_BD, logits_BK, spatial_BD, (*maps, ends["Mixed_6e"], x_BHWC))


def names(config) -> tensors.Names:
    table = {"fc": "fc"}
    for path, steps in (("", STEM), *((f"{k}/", branches) for k, branches in BLOCKS.items())):
        for conv in _convs(steps):
            for part in ("conv", "bn"):
                ours = f"{path}{conv.name}/{part}"
                table[tensors.pattern(ours)] = tensors.pattern(ours).replace("/", ".")
    # num_batches_tracked counts training steps for torch's running means, which are final here.
    return tensors.Names(tensors=table, ignored=("fc.bias", "*.num_batches_tracked"))


def from_config(config: dict) -> Inception:
    return Inception()


def _convs(steps):
    """All that are in a nest of steps."""
    for step in steps:
        if isinstance(step, Conv):
            yield step
        elif isinstance(step, tuple):
            yield from _convs(step)
