"""A generator that draws in one pass, and a discriminator that reads the caption, too.

Both are residual nets without batch statistics. A mapping of noise and caption modulates the
generator's blocks (StyleGAN, arXiv:1812.04948). The discriminator has no normalisation (R3GAN,
arXiv:2501.05441). Attention to the words (GigaGAN, arXiv:2303.05511) comes at the generator's first
two sizes and at one of the discriminator. The latter also reads the caption by projection
(arXiv:1802.05637) and word by word (AttnGAN, arXiv:1711.10485).

B batch · H W pixels · C channels · T regions · L words · Z noise · D width
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields, losses
from t2i_jax.models import attention, layers, pyramid, unet
from t2i_jax.models.types import Cond
from t2i_jax.sampling import prediction

MEAN_OF = 64  # draws of noise for the mean style
READ = 2  # sizes at which the generator reads words, from the smallest
BLOCK = 16  # captions that all images are compared with at once


class Level(nn.Module):
    """The generator at one size: `reads` times `depth` residual blocks and attention to the words.

    With `reads` = 0 there are `depth` blocks and no attention.
    """

    width: int
    depth: int
    reads: int
    heads: int

    @nn.compact
    def __call__(self, x_BHWC, c_BD, tokens_BSD, mask_BS):
        for i in range(max(self.reads, 1)):
            for _ in range(self.depth):
                x_BHWC = unet.Residual(self.width)(x_BHWC, c_BD)
            if self.reads:
                kv = layers.KeysValues(self.width, self.heads, name=f"kvs_{i}")(tokens_BSD)
                attend = unet.Attention(self.width, self.heads, name=f"attentions_{i}")
                x_BHWC = attend(x_BHWC, c_BD, kv, mask_BS)
        return x_BHWC


class Generator(nn.Module):
    """(z_BZ, cond) -> image_BHWC, not bounded. An image has values in [-1, 1].

    res: pixels a side, 4 times a power of two.
    width: channels at 8 pixels a side. Each doubling of the side halves them.
    least: the smallest number of channels.
    depth: blocks at each size, and before each attention.
    reads: how often words are read at 4 and at 8 pixels.
    heads: of that attention.
    noise: numbers in z.
    """

    res: fields.Size = 32
    width: fields.Size = 128
    least: fields.Size = 32
    depth: fields.Size = 1
    reads: fields.Size = 1
    heads: fields.Size = 2
    noise: fields.Size = 64

    def setup(self):
        sizes = pyramid.widths(self.res, self.width, self.least)
        self.text_norm = layers.RMSNorm()
        self.mapping = [layers.Dense(self.width) for _ in range(3)]
        self.text = layers.TextTokens(self.width)
        self.base = layers.Dense(pyramid.BASE * pyramid.BASE * sizes[0])
        self.levels = [
            Level(d, self.depth, self.reads if i < READ else 0, self.heads)
            for i, d in enumerate(sizes)
        ]
        self.grow = [layers.Dense(4 * d) for d in sizes[1:]]
        self.leave_norm = layers.RMSNorm()
        self.leave = unet.Conv(3)

    def style(self, z_BZ, cond: Cond):
        """The style, which modulates the blocks, from noise and pooled caption.   -> BD"""
        enter, *rest = self.mapping
        h_BD = enter(jnp.concatenate([z_BZ, self.text_norm(cond.pooled_BD)], -1))
        for layer in rest:
            h_BD = layer(nn.silu(h_BD))
        return h_BD

    def draw(self, style_BD, cond: Cond):
        """The image of a style and the words of a caption.   -> image_BHWC"""
        tokens_BSD, mask_BS = self.text(cond.seq_BLD, cond.mask_BL)
        c_BD = nn.silu(style_BD)
        x_BHWC = self.base(c_BD).reshape(len(c_BD), pyramid.BASE, pyramid.BASE, -1)
        x_BHWC = self.levels[0](x_BHWC, c_BD, tokens_BSD, mask_BS)
        for grow, level in zip(self.grow, self.levels[1:], strict=True):
            x_BHWC = level(layers.depth_to_space(grow(x_BHWC)), c_BD, tokens_BSD, mask_BS)
        return self.leave(nn.silu(self.leave_norm(x_BHWC)))

    def __call__(self, z_BZ, cond: Cond):
        return self.draw(self.style(z_BZ, cond), cond)

    def mean_style(self, cond: Cond):
        """The mean style of a caption over noise.   -> BD"""
        # A fixed key: the mean must be the same in every batch and in every program.
        z_MZ = jax.random.normal(jax.random.key(0), (MEAN_OF, self.noise))
        b = len(cond.pooled_BD)
        # `style` reads nothing else of a condition. Row m·B + b has noise m and caption b.
        many = cond._replace(pooled_BD=jnp.tile(cond.pooled_BD, (MEAN_OF, 1)))
        return self.style(jnp.repeat(z_MZ, b, 0), many).reshape(MEAN_OF, b, -1).mean(0)

    @staticmethod
    def between(a_BD, b_BD, share):
        """The style at `share` of the way from the first to the second."""
        return (1 - share) * a_BD + share * b_BD

    @property
    def z_shape(self) -> tuple[int, ...]:
        return (self.noise,)


class OneStep(nn.Module):
    """A flow network as a generator: its prediction of the image from pure noise, in one step.

    It has the same parameters as the flow network. So it can start from a trained one, as in
    adversarial post-training (arXiv:2501.08316).

    prediction: the kind of the network's output, see `sampling.prediction`.
    res: pixels a side.
    """

    flow: nn.Module
    res: int
    prediction: str = "v"

    def setup(self):
        nn.share_scope(self, self.flow)

    def style(self, z_BHWC, cond: Cond):
        return z_BHWC

    def mean_style(self, cond: Cond):
        # The style is the noise itself, whose mean is 0 for every caption.
        return jnp.zeros((len(cond.pooled_BD), *self.z_shape))

    def draw(self, z_BHWC, cond: Cond):
        t_B = jnp.ones(len(z_BHWC))  # one Euler step from t = 1 to t = 0
        out_BHWC = self.flow(z_BHWC, t_B, cond)
        return z_BHWC - prediction.velocity(self.prediction, out_BHWC, z_BHWC, t_B)

    def __call__(self, z_BHWC, cond: Cond):
        return self.draw(z_BHWC, cond)

    @staticmethod
    def between(a_BHWC, b_BHWC, share):
        """Noise at `share` of the way from the first to the second, with constant variance."""
        mixed_BHWC = (1 - share) * a_BHWC + share * b_BHWC
        return mixed_BHWC * jax.lax.rsqrt((1 - share) ** 2 + share**2)

    @property
    def z_shape(self) -> tuple[int, ...]:
        return (self.res, self.res, 3)


class Judgement(NamedTuple):
    """The discriminator's output for images with captions.

    logit_B: how real the image is, and how well the caption fits. Larger is better.
    image_BD, regions_BTD: embeddings of the image and of its regions, of length 1.
    text_BD, words_BLD: embeddings of the caption and of its words, of length 1.
    """

    logit_B: jax.Array
    image_BD: jax.Array
    regions_BTD: jax.Array
    text_BD: jax.Array
    words_BLD: jax.Array


class Head(nn.Module):
    """A Judgement from an image's vector h_BD and regions, and a caption's vector and words."""

    width: int
    embedding: int

    @nn.compact
    def __call__(self, h_BD, regions_BHWC, text_BE, words_BLE, mask_BL) -> Judgement:
        h_BD = nn.leaky_relu(h_BD, pyramid.SLOPE)
        regions_BTD = regions_BHWC.reshape(len(h_BD), -1, regions_BHWC.shape[-1])
        embed = lambda x, name: losses.unit(
            layers.Dense(self.embedding, name=f"{name}_embedding")(x)
        )
        image_BD, regions_BTD = embed(h_BD, "image"), embed(regions_BTD, "region")
        text_BD, words_BLD = embed(text_BE, "text"), embed(words_BLE, "word")
        # Projection (arXiv:1802.05637). The root keeps its variance near that of one feature.
        fits_B = (layers.Dense(self.width, name="fits")(text_BE) * h_BD).sum(-1) / self.width**0.5
        weight = self.param("word_weight", nn.initializers.ones, ())
        logit_B = nn.Dense(1, name="real")(h_BD)[:, 0] + fits_B
        logit_B += weight * word_scores(regions_BTD, words_BLD, mask_BL)
        return Judgement(logit_B, image_BD, regions_BTD, text_BD, words_BLD)


class Projected(nn.Module):
    """(maps BHWC of a frozen network, *conds) -> a Judgement for each cond.

    A head on each map reads it, as in projected GANs (arXiv:2111.01007) and latent adversarial
    distillation (arXiv:2403.12015). The fields are those of `Discriminator`.
    """

    width: fields.Size = 128
    embedding: fields.Size = 64

    @nn.compact
    def __call__(self, maps, *conds: Cond) -> tuple[Judgement, ...]:
        text, words = layers.Dense(self.width, name="text"), layers.Dense(self.width, name="words")
        text_norm, words_norm = layers.RMSNorm(), layers.RMSNorm()
        head = Head(self.width, self.embedding, name="Verdict_0")  # its name in checkpoints
        h_BD = 0.0
        for i, map_BHWC in enumerate(maps):
            # The maps of a frozen network differ in scale from layer to layer.
            x = layers.RMSNorm(scale=False)(map_BHWC)
            while x.shape[1] >= 4 * pyramid.BASE and x.shape[1] % 2 == 0:
                x = pyramid.Shrink(self.width, name=f"shrink_{i}_{x.shape[1]}")(x)
            x = pyramid.Plain(name=f"block_{i}")(layers.Dense(self.width, name=f"enter_{i}")(x))
            # Maps of foreign networks may have an odd side, such as 7, which cannot be halved.
            if x.shape[1] % 2 == 0:
                x = nn.leaky_relu(x, pyramid.SLOPE)
                x = pyramid.Shrink(self.width, name=f"shrink_{i}")(x)
            h_BD += pyramid.Flat(self.width, name=f"mix_{i}")(x)
        # The root keeps the variance of the sum near that of one map.
        h_BD, regions_BHWC = h_BD / len(maps) ** 0.5, maps[len(maps) // 2]

        def judgement(cond):
            text_BE, words_BLE = text(text_norm(cond.pooled_BD)), words(words_norm(cond.seq_BLD))
            return head(h_BD, regions_BHWC, text_BE, words_BLE, cond.mask_BL)

        return tuple(judgement(cond) for cond in conds)


class Discriminator(nn.Module):
    """(image_BHWC, *conds) -> a Judgement for each cond.

    One trunk reads the images down to 8 pixels a side, once for all conds. Below, each cond is
    read. The fields are those of `Generator`; `embedding` is the width of a Judgement's embeddings.
    """

    res: fields.Size = 32
    width: fields.Size = 128
    least: fields.Size = 32
    depth: fields.Size = 1
    heads: fields.Size = 2
    embedding: fields.Size = 64

    def setup(self):
        sizes = pyramid.widths(self.res, self.width, self.least)[::-1]
        self.text_norm = layers.RMSNorm()
        self.text = layers.Dense(self.width)
        self.words = layers.TextTokens(self.width)
        self.enter = unet.Conv(sizes[0])
        self.blocks = [pyramid.Plain() for _ in sizes for _ in range(self.depth)]
        self.shrink = [pyramid.Shrink(d) for d in sizes[1:]]
        self.query = layers.Queries(self.width, self.heads)
        self.keys = layers.KeysValues(self.width, self.heads)
        self.out = layers.Dense(self.width)
        self.mix = pyramid.Flat(self.width)
        self.head = Head(self.width, self.embedding, name="verdict")  # its name in checkpoints

    def __call__(self, image_BHWC, *conds: Cond) -> tuple[Judgement, ...]:
        # The trunk does not depend on the captions. So an image with its own caption and one with
        # another caption cost one pass through most of the network.
        x_BHWC, last = self.enter(image_BHWC), len(self.shrink)
        for i in range(last - 1):
            x_BHWC = self.shrink[i](self._level(i, x_BHWC))

        def judgement(cond):
            tokens_BSD, mask_BS = self.words(cond.seq_BLD, cond.mask_BL)
            h = self._level(last - 1, x_BHWC + self._read(x_BHWC, tokens_BSD, mask_BS))
            h_BD = self.mix(self._level(last, self.shrink[-1](h)))
            text_BE = self.text(self.text_norm(cond.pooled_BD))
            # The first token is the null token of `TextTokens`, which is no word.
            return self.head(h_BD, x_BHWC, text_BE, tokens_BSD[:, 1:], cond.mask_BL)

        return tuple(judgement(cond) for cond in conds)

    def _level(self, i, x_BHWC):
        for block in self.blocks[i * self.depth : (i + 1) * self.depth]:
            x_BHWC = block(x_BHWC)
        return x_BHWC

    def _read(self, x_BHWC, tokens_BSD, mask_BS):
        """Attention of the regions to the words.   -> BHWD"""
        b, h, w, d = x_BHWC.shape
        q_BTNH = self.query(x_BHWC.reshape(b, h * w, d))
        k_BSNH, v_BSNH = self.keys(tokens_BSD)
        out_BTNH = attention.attention(q_BTNH, k_BSNH, v_BSNH, mask_BS=mask_BS)
        return self.out(attention.merge_heads(out_BTNH)).reshape(x_BHWC.shape)


def word_scores(regions, words, mask, temperature: float = 0.2):
    """How well the regions of an image match the words of a caption, -1 … 1.

    Each word attends to the regions most like it (XMC-GAN, arXiv:2101.04702). The score is the mean
    cosine of the words with their attended regions. A caption without words scores 0.

    Args:
      regions: (…, T, D) of length 1.   words: (…, L, D) of length 1.   mask: (…, L).
      temperature: of the softmax over regions.
    Returns:
      Scores, in the broadcast shape of the leading axes.
    """
    cosine = jnp.einsum("...td,...ld->...lt", regions, words)
    share = jax.nn.softmax(cosine / temperature, -1)
    attended = jnp.einsum("...lt,...td->...ld", share, regions)
    fit = (attended * words).sum(-1) * jax.lax.rsqrt(jnp.square(attended).sum(-1) + 1e-6)
    return (fit * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def pairs_word_scores(regions_BTD, words_BLD, mask_BL):
    """The word scores of every image with every caption.   -> BB"""
    # Block by block, and computed again in the backward pass. At once these would be several arrays
    # of B²·T·L numbers.

    @jax.checkpoint
    def of_caption(words_LD, mask_L):
        return word_scores(regions_BTD, words_LD[None], mask_L[None])

    # Blocks of captions, not of images: those may be split over devices.
    captions = (words_BLD, mask_BL)
    return jax.lax.map(lambda caption: of_caption(*caption), captions, batch_size=BLOCK).T
