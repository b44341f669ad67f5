"""A ladder of latents: a picture is drawn from coarse to fine, and each size has latents.

The form is that of ladder VAEs (arXiv:1602.02282) and of the very deep VAE (arXiv:2011.10650): the
path downward serves prior and posterior alike. Maps have 4, 8, … places a side, up to half of the
picture's pixels. All but the largest have latents: there, these would be grain. The caption
modulates every block, and at 4 and 8 places its words are read by attention.

B batch · H W pixels · C channels · S text tokens · D width · Z latents of a place · G groups
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import blocks, gan, layers, pyramid, unet
from t2i_jax.models.types import Cond


class Drawn(NamedTuple):
    """A picture's distribution, given its latents, and what these cost.

    mean_BHWC, log_scale_C: of a logistic of each value, see `losses.log_logistic`.
    rate_BG: the divergence of each group's posterior from its prior, in nats; 0 without a picture.
    """

    mean_BHWC: jax.Array
    log_scale_C: jax.Array
    rate_BG: jax.Array


class Group(nn.Module):
    """A group of latents at each place of a map, which they are added to.   -> (h_BHWD, rate_B)

    The prior is N(m, s²) with m and s read from the map. The posterior is N(m + s·a, (s·b)²), where
    a and log b are read from the map and from the picture's features (NVAE, arXiv:2007.03898,
    section 3.2). So the divergence is that of N(a, b²) from N(0, 1). Both begin equal.
    """

    latents: int

    @nn.compact
    def __call__(self, h_BHWD, noise_BHWZ, seen_BHWD=None, guidance=None):
        h = nn.silu(layers.RMSNorm()(h_BHWD))
        mean, log_std = jnp.split(unet.Conv(2 * self.latents, zero=True, name="prior")(h), 2, -1)
        if guidance is not None:
            mean, log_std = guided(mean, log_std, guidance)
        rate_B = jnp.zeros(len(h))
        if seen_BHWD is not None:
            both = layers.Dense(h.shape[-1], name="both")(jnp.concatenate([h, seen_BHWD], -1))
            found = unet.Conv(2 * self.latents, zero=True, name="posterior")(nn.silu(both))
            a, log_b = jnp.split(found, 2, -1)
            rate_B = divergence(a, log_b)
            noise_BHWZ = a + jnp.exp(log_b) * noise_BHWZ
        z_BHWZ = mean + jnp.exp(log_std) * noise_BHWZ
        return h_BHWD + layers.Dense(h.shape[-1], name="add")(z_BHWZ), rate_B


def divergence(a_BHWZ, log_b_BHWZ):
    """KL(N(a, b²) ‖ N(0, 1)) of each example, summed, in nats (arXiv:1312.6114, B).   -> B"""
    value = 0.5 * (jnp.square(a_BHWZ) + jnp.expm1(2 * log_b_BHWZ)) - log_b_BHWZ
    return value.sum(axis=(1, 2, 3))


def guided(mean_2BHWZ, log_std_2BHWZ, scale):
    """Rows that come in pairs, with a caption and without: its mean beyond that without it.

    Both rows of a pair go on with the same, so that they are of one picture.
    """
    pairs = lambda x: x.reshape(-1, 2, *x.shape[1:])
    (with_, without), log_std = jnp.moveaxis(pairs(mean_2BHWZ), 1, 0), pairs(log_std_2BHWZ)[:, 0]
    mean = without + scale * (with_ - without)
    return tuple(jnp.repeat(x, 2, axis=0) for x in (mean, log_std))


class Ladder(nn.Module):
    """(noise, cond, image_BHWC) -> Drawn; without an image the latents are those of the prior.

    res: pixels a side, a power of two from 16 on.
    width: channels at 8 places a side. Each doubling of the side halves them.
    least: the smallest number of channels.
    depth: groups of latents at each size, each after a block.
    heads: of the attention to the words.
    latents: of each place in a group.
    """

    res: fields.Size = 32
    width: fields.Size = 96
    least: fields.Size = 32
    depth: fields.Size = 2
    heads: fields.Size = 2
    latents: fields.Size = 8

    def setup(self):
        sizes = pyramid.widths(self.res // 2, self.width, self.least)
        self.enter = unet.Conv(sizes[-1])
        self.upward = [pyramid.Plain() for _ in sizes]
        self.shrink = [pyramid.Shrink(d) for d in sizes[:-1]]
        self.text = layers.TextTokens(self.width)
        self.pooled_norm, self.pooled = layers.RMSNorm(), layers.Dense(self.width)
        self.base = blocks.Value((pyramid.BASE, pyramid.BASE, sizes[0]))
        self.levels = [
            gan.Level(d, 1, int(i < gan.READ), self.heads)
            for i, d in enumerate(sizes)
            for _ in range(self.depth)
        ]
        self.groups = [Group(self.latents) for _ in self.noise_shapes]
        self.grow = [layers.Dense(4 * d) for d in sizes[1:]]
        self.leave_norm, self.leave = layers.RMSNorm(), unet.Conv(12)
        self.log_scale = blocks.Value((3,), nn.initializers.constant(-1.0))

    @property
    def noise_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Of the noise of an example, group by group, from coarse to fine."""
        sides = [pyramid.BASE * 2**i for i in range((self.res // pyramid.BASE).bit_length() - 2)]
        return tuple((side, side, self.latents) for side in sides for _ in range(self.depth))

    def see(self, image_BHWC):
        """Features of a picture at each size with latents, from coarse to fine: BHWD each."""
        x, maps = self.upward[-1](self.enter(layers.space_to_depth(image_BHWC))), []
        for shrink, block in zip(self.shrink[::-1], self.upward[-2::-1], strict=True):
            x = block(shrink(x))
            maps.append(x)
        return maps[::-1]

    def __call__(self, noise, cond: Cond, image_BHWC=None, guidance=None) -> Drawn:
        """A picture drawn from coarse to fine.

        Args:
          noise: standard normals of each group, B and `noise_shapes`.
          guidance: a scale, where rows of `cond` come in pairs, see `guided`. None: there are none.
        """
        tokens_BSD, mask_BS = self.text(cond.seq_BLD, cond.mask_BL)
        c_BD = nn.silu(self.pooled(self.pooled_norm(cond.pooled_BD)))
        seen = None if image_BHWC is None else self.see(image_BHWC)
        h, rates = jnp.broadcast_to(self.base(), (len(c_BD), *self.base.shape)), []
        for i, level in enumerate(self.levels):
            size, first = i // self.depth, i % self.depth == 0
            if size and first:
                h = layers.depth_to_space(self.grow[size - 1](h))
            h = level(h, c_BD, tokens_BSD, mask_BS)
            if i < len(self.groups):
                own = None if seen is None else seen[size]
                h, rate_B = self.groups[i](h, noise[i], own, guidance)
                rates.append(rate_B)
        mean_BHWC = layers.depth_to_space(self.leave(nn.silu(self.leave_norm(h))))
        return Drawn(mean_BHWC, self.log_scale(), jnp.stack(rates, 1))
