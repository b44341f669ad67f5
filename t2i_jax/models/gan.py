"""A generator that draws in one pass, and a discriminator that reads the caption, too.

Residual nets without batch statistics: the generator's blocks are modulated by a mapping of noise
and caption (StyleGAN, arXiv:1812.04948), the discriminator has no normalisation (R3GAN,
arXiv:2501.05441); words are seen by attention (GigaGAN, arXiv:2303.05511) at the generator's first
two sizes and one of the discriminator, which reads the caption by projection (arXiv:1802.05637)
and word by word (AttnGAN, arXiv:1711.10485), too.

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

MEAN_OF = 64  # noises
READ = 2  # sizes at which the generator reads words, the smallest
BLOCK = 16  # captions that all pictures are compared with at once


class Level(nn.Module):
    """The generator at one size: `depth` residual blocks, then, `reads` times, a look at the words,
    before each further one as many blocks again.
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
    """(z_BZ, cond) -> image_BHWC, which is not bounded: pictures are its values in [-1, 1].

    Fields: `res` pixels a side, 4 times a power of two; `width` channels at 8 pixels and fewer
    beyond, `least` at the end; `depth` blocks at each size; `reads`: how often words are read at 4
    and at 8 pixels, after `depth` blocks each time; `heads` of that attention; `noise` numbers in
    z.
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
        """What the blocks are modulated by: a function of the noise and the caption.   -> BD"""
        enter, *rest = self.mapping
        h_BD = enter(jnp.concatenate([z_BZ, self.text_norm(cond.pooled_BD)], -1))
        for layer in rest:
            h_BD = layer(nn.silu(h_BD))
        return h_BD

    def draw(self, style_BD, cond: Cond):
        """The picture of a style.   -> image_BHWC"""
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
        z_MZ = jax.random.normal(jax.random.key(0), (MEAN_OF, self.noise))
        b = len(cond.pooled_BD)
        many = cond._replace(pooled_BD=jnp.tile(cond.pooled_BD, (MEAN_OF, 1)))
        return self.style(jnp.repeat(z_MZ, b, 0), many).reshape(MEAN_OF, b, -1).mean(0)

    @staticmethod
    def between(a_BD, b_BD, share):
        """A style on the way from one to another."""
        return (1 - share) * a_BD + share * b_BD

    @property
    def z_shape(self) -> tuple[int, ...]:
        return (self.noise,)


class OneStep(nn.Module):
    """A flow network as a generator: the picture that it sees in pure noise.

    Its parameters are the flow network's own, so that it can begin with trained ones, as in
    adversarial post-training (arXiv:2501.08316).

    Fields: `prediction`: what the network puts out, see `sampling.prediction`; `res`.
    """

    flow: nn.Module
    res: int
    prediction: str = "v"

    def setup(self):
        nn.share_scope(self, self.flow)

    def style(self, z_BHWC, cond: Cond):
        return z_BHWC

    def mean_style(self, cond: Cond):
        return jnp.zeros((len(cond.pooled_BD), *self.z_shape))

    def draw(self, z_BHWC, cond: Cond):
        t_B = jnp.ones(len(z_BHWC))
        out_BHWC = self.flow(z_BHWC, t_B, cond)
        return z_BHWC - prediction.velocity(self.prediction, out_BHWC, z_BHWC, t_B)

    def __call__(self, z_BHWC, cond: Cond):
        return self.draw(z_BHWC, cond)

    @staticmethod
    def between(a_BHWC, b_BHWC, share):
        """Noise on the way from one to another, of the same variance all along."""
        mixed_BHWC = (1 - share) * a_BHWC + share * b_BHWC
        return mixed_BHWC * jax.lax.rsqrt((1 - share) ** 2 + share**2)

    @property
    def z_shape(self) -> tuple[int, ...]:
        return (self.res, self.res, 3)


class Judgement(NamedTuple):
    """What the discriminator makes of pictures and captions.

    logit_B: how real the picture is, and how well the caption fits.
    image_BD, regions_BTD: of the picture, of length 1; text_BD, words_BLD: of the caption.
    """

    logit_B: jax.Array
    image_BD: jax.Array
    regions_BTD: jax.Array
    text_BD: jax.Array
    words_BLD: jax.Array


class Head(nn.Module):
    """What comes of a picture's vector h_BD and regions, and the caption's vector and words."""

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
        fits_B = (layers.Dense(self.width, name="fits")(text_BE) * h_BD).sum(-1) / self.width**0.5
        weight = self.param("word_weight", nn.initializers.ones, ())
        logit_B = nn.Dense(1, name="real")(h_BD)[:, 0] + fits_B
        logit_B += weight * word_scores(regions_BTD, words_BLD, mask_BL)
        return Judgement(logit_B, image_BD, regions_BTD, text_BD, words_BLD)


class Projected(nn.Module):
    """(maps BHWC of a frozen network, *conds) -> a Judgement each: a head on each map, as in
    projected GANs (arXiv:2111.01007) and latent adversarial distillation (arXiv:2403.12015).

    Fields as of `Discriminator`.
    """

    width: fields.Size = 128
    embedding: fields.Size = 64

    @nn.compact
    def __call__(self, maps, *conds: Cond) -> tuple[Judgement, ...]:
        text, words = layers.Dense(self.width, name="text"), layers.Dense(self.width, name="words")
        text_norm, words_norm = layers.RMSNorm(), layers.RMSNorm()
        head = Head(self.width, self.embedding, name="Verdict_0")  # as in saved files
        h_BD = 0.0
        for i, map_BHWC in enumerate(maps):
            x = layers.RMSNorm(scale=False)(map_BHWC)
            while x.shape[1] >= 4 * pyramid.BASE and x.shape[1] % 2 == 0:
                x = pyramid.Shrink(self.width, name=f"shrink_{i}_{x.shape[1]}")(x)
            x = pyramid.Plain(name=f"block_{i}")(layers.Dense(self.width, name=f"enter_{i}")(x))
            if x.shape[1] % 2 == 0:
                x = nn.leaky_relu(x, pyramid.SLOPE)
                x = pyramid.Shrink(self.width, name=f"shrink_{i}")(x)
            h_BD += pyramid.Flat(self.width, name=f"mix_{i}")(x)
        h_BD, regions_BHWC = h_BD / len(maps) ** 0.5, maps[len(maps) // 2]

        def beside(cond):
            text_BE, words_BLE = text(text_norm(cond.pooled_BD)), words(words_norm(cond.seq_BLD))
            return head(h_BD, regions_BHWC, text_BE, words_BLE, cond.mask_BL)

        return tuple(beside(cond) for cond in conds)


class Discriminator(nn.Module):
    """(image_BHWC, *conds) -> a Judgement each: one trunk sees the pictures down to 8 pixels a
    side, where each condition is read.

    Fields as of `Generator`; `embedding`: width of Judgement's.
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
        self.head = Head(self.width, self.embedding, name="verdict")  # as in saved files

    def __call__(self, image_BHWC, *conds: Cond) -> tuple[Judgement, ...]:
        x_BHWC, last = self.enter(image_BHWC), len(self.shrink)
        for i in range(last - 1):
            x_BHWC = self.shrink[i](self._level(i, x_BHWC))

        def beside(cond):
            tokens_BSD, mask_BS = self.words(cond.seq_BLD, cond.mask_BL)
            h = self._level(last - 1, x_BHWC + self._read(x_BHWC, tokens_BSD, mask_BS))
            h_BD = self.mix(self._level(last, self.shrink[-1](h)))
            text_BE = self.text(self.text_norm(cond.pooled_BD))
            return self.head(h_BD, x_BHWC, text_BE, tokens_BSD[:, 1:], cond.mask_BL)

        return tuple(beside(cond) for cond in conds)

    def _level(self, i, x_BHWC):
        for block in self.blocks[i * self.depth : (i + 1) * self.depth]:
            x_BHWC = block(x_BHWC)
        return x_BHWC

    def _read(self, x_BHWC, tokens_BSD, mask_BS):
        """What regions learn from the words."""
        b, h, w, d = x_BHWC.shape
        q_BTNH = self.query(x_BHWC.reshape(b, h * w, d))
        k_BSNH, v_BSNH = self.keys(tokens_BSD)
        out_BTNH = attention.attention(q_BTNH, k_BSNH, v_BSNH, mask_BS=mask_BS)
        return self.out(attention.merge_heads(out_BTNH)).reshape(x_BHWC.shape)


def word_scores(regions, words, mask, temperature: float = 0.2):
    """How well the regions of a picture answer the words of a caption, -1 … 1.

    Each word looks at the regions most like it (as in XMC-GAN, arXiv:2101.04702); the score is the
    mean of the words' cosines with what they found. A caption without words scores 0.

    Args:
      regions: (…, T, D) of length 1.   words: (…, L, D) of length 1.   mask: (…, L).
    Returns:
      Scores of the shape that the leading axes have together.
    """
    cosine = jnp.einsum("...td,...ld->...lt", regions, words)
    share = jax.nn.softmax(cosine / temperature, -1)
    found = jnp.einsum("...lt,...td->...ld", share, regions)
    fit = (found * words).sum(-1) * jax.lax.rsqrt(jnp.square(found).sum(-1) + 1e-6)
    return (fit * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def pairs_word_scores(regions_BTD, words_BLD, mask_BL):
    """The word scores of every picture with every caption.   -> BB

    Block by block, and again in the backward pass: all at once are some arrays of B²·T·L numbers.
    """

    @jax.checkpoint
    def of_caption(words_LD, mask_L):
        return word_scores(regions_BTD, words_LD[None], mask_L[None])

    # Blocks of captions, not of pictures, which may be split over devices.
    captions = (words_BLD, mask_BL)
    return jax.lax.map(lambda caption: of_caption(*caption), captions, batch_size=BLOCK).T
