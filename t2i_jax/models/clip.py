"""The two towers of a dual encoder (CLIP, arXiv:2103.00020): images and captions to one space.

B batch · H W pixels · C channels · S = 1 + L tokens · D width · P embedding
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import blocks, layers, pyramid, unet
from t2i_jax.models.types import Cond, Features

SCALE = math.log(1 / 0.07)  # where CLIP's logit scale begins
SCALE_LIMIT = math.log(100)  # and where it ends


class Convolutional(nn.Module):
    """image_BHWC -> Features: an image tower without attention.

    Its `maps` are taken after the blocks of every size, from fine to coarse.

    res: pixels a side.
    width: channels at 8 pixels a side. Each doubling of the side halves them.
    least: the smallest number of channels.
    depth: blocks at each size.
    projected: width of the embedding.
    """

    res: fields.Size = 32
    width: fields.Size = 128
    least: fields.Size = 32
    depth: fields.Size = 1
    projected: fields.Size = 128

    @nn.compact
    def __call__(self, image_BHWC) -> Features:
        sizes = pyramid.widths(self.res, self.width, self.least)[::-1]
        x, maps = unet.Conv(sizes[0], name="enter")(image_BHWC), []
        # None stands for the smallest size, after whose blocks nothing is left to shrink.
        for i, out in enumerate((*sizes[1:], None)):
            for j in range(self.depth):
                x = pyramid.Plain(name=f"block_{i}_{j}")(x)
            maps.append(x)
            if out:
                x = pyramid.Shrink(out, name=f"shrink_{i}")(x)
        h_BD = nn.leaky_relu(pyramid.Flat(4 * self.width, name="mix")(x), pyramid.SLOPE)
        return Features(layers.Dense(self.projected, name="projection")(h_BD), maps=tuple(maps))


class Image(nn.Module):
    """An image tower with the scale of the logits.

    The tower's parameters lie in this module's own scope, so that weights of the tower alone fit.

    scale: the first value of the scale's logarithm.
    offset: the first value of a bias of the logits, as in SigLIP (arXiv:2303.15343). None: no bias.
    """

    tower: nn.Module
    scale: float = SCALE
    offset: float | None = None

    def setup(self):
        nn.share_scope(self, self.tower)
        self.logit_scale = blocks.Value((), nn.initializers.constant(self.scale))
        if self.offset is not None:
            self.logit_bias = blocks.Value((), nn.initializers.constant(self.offset))

    def __call__(self, image_BHWC) -> Features:
        self.temper()  # `init` calls this method, and must meet all parameters
        return self.tower(image_BHWC)

    def temper(self):
        """The factor of the cosines, at most 100, and the bias that is added to them."""
        scale = self.logit_scale()
        # Beyond the limit the value is cut off but its gradient is not, so that it can come back.
        scale -= jax.lax.stop_gradient(nn.relu(scale - SCALE_LIMIT))
        return jnp.exp(scale), 0.0 if self.offset is None else self.logit_bias()


class Caption(nn.Module):
    """Caption states -> embedding BP.

    A few transformer layers read the words and one learned token. That token, together with the
    pooled state, gives the embedding.
    """

    width: fields.Size = 128
    depth: fields.Size = 2
    heads: fields.Size = 4
    projected: fields.Size = 128

    @nn.compact
    def __call__(self, cond: Cond):
        tokens_BSD, mask_BS = layers.TextTokens(self.width, name="words")(
            cond.seq_BLD, cond.mask_BL
        )
        x_ND = tokens_BSD.reshape(-1, self.width)
        sizes = (self.heads, 4 * self.width, 1e-6, "gelu", "float32")
        # The learned null token of `TextTokens` gathers the words: it is valid in every caption.
        for i in range(self.depth):
            x_ND = blocks.Layer(*sizes, normed="before", name=f"layer_{i}")(x_ND, mask_BS)
        all_BD = x_ND.reshape(tokens_BSD.shape)[:, 0]
        pooled_BD = layers.Dense(self.width, name="pooled")(layers.RMSNorm()(cond.pooled_BD))
        h_BD = nn.LayerNorm(name="norm")(all_BD + pooled_BD)
        return layers.Dense(self.projected, name="projection")(h_BD)
