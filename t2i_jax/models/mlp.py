"""The networks of the first GANs (arXiv:1406.2661): pixels are a vector, layers are dense.

B batch · H W pixels · C channels · Z noise · D width
"""

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import gan, layers, pyramid
from t2i_jax.models.types import Cond


class Generator(nn.Module):
    """(z_BZ, cond) -> image_BHWC in [-1, 1].

    res: pixels a side.
    width: of the first layer. Each further one doubles it.
    depth: layers.
    noise: numbers in z.
    grey: all three channels are equal.
    """

    res: fields.Size = 28
    width: fields.Size = 256
    depth: fields.Size = 3
    noise: fields.Size = 64
    grey: bool = True

    def setup(self):
        self.text_norm = layers.RMSNorm()
        self.enter = layers.Dense(self.width)
        self.hidden = [layers.Dense(self.width * 2**i) for i in range(1, self.depth)]
        self.leave = layers.Dense(self.res * self.res * (1 if self.grey else 3))

    def style(self, z_BZ, cond: Cond):
        """The first layer's output, from noise and caption.   -> BD"""
        return self.enter(jnp.concatenate([z_BZ, self.text_norm(cond.pooled_BD)], -1))

    def draw(self, style_BD, cond: Cond):
        """The image of a style.   -> image_BHWC"""
        h_BD = nn.leaky_relu(style_BD, pyramid.SLOPE)
        for layer in self.hidden:
            h_BD = nn.leaky_relu(layer(h_BD), pyramid.SLOPE)
        x_BHWC = jnp.tanh(self.leave(h_BD)).reshape(-1, self.res, self.res, 1 if self.grey else 3)
        return jnp.broadcast_to(x_BHWC, (*x_BHWC.shape[:3], 3))

    def __call__(self, z_BZ, cond: Cond):
        return self.draw(self.style(z_BZ, cond), cond)

    # Borrowed: it asks for `style` and `noise` alone, which this class has, too.
    mean_style = gan.Generator.mean_style
    between = staticmethod(gan.Generator.between)

    @property
    def z_shape(self) -> tuple[int, ...]:
        return (self.noise,)


class Discriminator(nn.Module):
    """(image_BHWC, *conds) -> a Judgement for each cond, whose one region is the whole image.

    res: pixels a side.
    width: of the last layer. Each layer before it is twice as wide as the next.
    depth: layers.
    embedding: width of a Judgement's embeddings.
    """

    res: fields.Size = 28
    width: fields.Size = 256
    depth: fields.Size = 3
    embedding: fields.Size = 64

    @nn.compact
    def __call__(self, image_BHWC, *conds: Cond) -> tuple[gan.Judgement, ...]:
        h_BD = image_BHWC.reshape(len(image_BHWC), -1)
        for i in reversed(range(self.depth)):  # the last has no activation: the head begins with it
            h_BD = layers.Dense(self.width * 2**i)(h_BD)
            h_BD = nn.leaky_relu(h_BD, pyramid.SLOPE) if i else h_BD
        text_norm, words_norm = layers.RMSNorm(name="text_norm"), layers.RMSNorm(name="words_norm")
        head = gan.Head(self.width, self.embedding, name="Verdict_0")  # its name in checkpoints

        def judgement(cond):
            text_BE, words_BLE = text_norm(cond.pooled_BD), words_norm(cond.seq_BLD)
            return head(h_BD, h_BD[:, None, None], text_BE, words_BLE, cond.mask_BL)

        return tuple(judgement(cond) for cond in conds)
