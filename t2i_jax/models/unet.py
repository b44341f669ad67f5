"""A U-shaped hybrid: convolutions at two scales, attention over image and text at the lower one.

B batch · H W pixels · C channels · T image tokens · S text tokens · D width · N heads
"""

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import attention, convolution, layers
from t2i_jax.models.types import Cond


class Conv(nn.Module):
    """A convolution of NHWC, 3 × 3 or 1 × 1, with stride 1. XLA:CPU is fast at these alone."""

    features: int
    size: fields.Size = 3
    zero: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        size, options = (self.size, self.size), dict(dtype=self.dtype, kernel_init=init)
        # Another program for the same numbers: its kernel gradients are faster on CPUs (ADR 12).
        conv = nn.Conv(self.features, size, conv_general_dilated=convolution.conv, **options)
        return conv(x_BHWC)


class Residual(nn.Module):
    """A residual block of two convolutions, modulated by time and text."""

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC, c_BD):
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = layers.Dense(self.width, name="skip")(x_BHWC)
        # No `dtype` here: modulations stay float32, see `Backbone`.
        mod = layers.Dense(2 * self.width, zero=True, name="modulation")(c_BD)
        shift_BD, scale_BD = jnp.split(mod, 2, -1)
        h = Conv(self.width, dtype=self.dtype, name="conv1")(nn.silu(layers.RMSNorm()(x_BHWC)))
        h = layers.modulate(layers.RMSNorm(scale=False)(h), shift_BD, scale_BD)
        # The last kernel starts at zero, so a new block adds nothing.
        return x_BHWC + Conv(self.width, zero=True, dtype=self.dtype, name="conv2")(nn.silu(h))


class Attention(nn.Module):
    """Attention of image tokens to image and text tokens in one softmax, with qk-norm.

    The keys and values of the text are arguments, so that a sampler computes them once.
    """

    width: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BHWC, c_BD, text_kv, mask_BS):
        b, h, w, d = x_BHWC.shape
        mod = layers.Dense(2 * d, zero=True, name="modulation")(c_BD)
        shift_BD, scale_BD = jnp.split(mod, 2, -1)
        x_BTD = layers.modulate(layers.RMSNorm(scale=False)(x_BHWC), shift_BD, scale_BD)
        x_BTD = x_BTD.reshape(b, h * w, d)
        q_BTNH = layers.Queries(d, self.heads, dtype=self.dtype, name="query")(x_BTD)
        k_BTNH, v_BTNH = layers.KeysValues(d, self.heads, dtype=self.dtype, name="picture")(x_BTD)
        k_BSNH, v_BSNH = text_kv
        mask = jnp.concatenate([jnp.ones((b, h * w), bool), mask_BS], 1)
        out_BTNH = attention.attention(
            q_BTNH,
            jnp.concatenate([k_BTNH, k_BSNH], 1),
            jnp.concatenate([v_BTNH, v_BSNH], 1),
            mask_BS=mask,
        )
        out = layers.Dense(d, zero=True, dtype=self.dtype, name="out")(
            attention.merge_heads(out_BTNH)
        )
        return x_BHWC + out.reshape(x_BHWC.shape)


class Backbone(nn.Module):
    """(x_BHWC, t_B, cond) -> C channels of the same size. 4 divides H and W.

    stem: channels at half size.
    width: channels at quarter size.
    depth: blocks on the way down and on the way up, at each size.
    dtype: of the products inside the blocks. All else is float32, see `transformer.Backbone`.
    """

    channels: fields.Size = 3
    stem: fields.Size = 32
    width: fields.Size = 128
    depth: fields.Size = 2
    heads: fields.Size = 2
    dtype: fields.Dtype = "float32"

    @property
    def unit(self) -> int:
        """H and W must be multiples of it."""
        return 4

    def setup(self):
        d, n, kind = self.width, self.depth, dict(dtype=self.dtype)
        self.condition = layers.TimeText(d)
        self.text = layers.TextTokens(d, **kind)
        self.kvs = [layers.KeysValues(d, self.heads, **kind) for _ in range(2 * n)]
        self.enter = Conv(self.stem)
        self.down = [Residual(self.stem, **kind) for _ in range(n)]
        self.shrink = layers.Dense(d)
        self.blocks = [Residual(d, **kind) for _ in range(2 * n)]
        self.attentions = [Attention(d, self.heads, **kind) for _ in range(2 * n)]
        self.grow = layers.Dense(4 * self.stem)
        self.up = [Residual(self.stem, **kind) for _ in range(n)]
        self.leave_norm = layers.RMSNorm()
        self.leave = Conv(4 * self.channels, zero=True)

    def prepare(self, cond: Cond):
        """Keys and values of the text for every attention, and their mask."""
        tokens_BSD, mask_BS = self.text(cond.seq_BLD, cond.mask_BL)
        return tuple(kv(tokens_BSD) for kv in self.kvs), mask_BS

    def __call__(self, x_BHWC, t_B, cond: Cond, prepared=None):
        kvs, mask_BS = self.prepare(cond) if prepared is None else prepared
        c_BD = nn.silu(self.condition(t_B, cond.pooled_BD))
        # Blocks of pixels become channels in place of strided convolutions: XLA:CPU is slow at
        # strides.
        h = self.enter(layers.space_to_depth(x_BHWC))
        outer = []
        for block in self.down:
            h = block(h, c_BD)
            outer.append(h)
        h = self.shrink(layers.space_to_depth(h))
        _, rows, columns, d = h.shape
        h = h + layers.positions_2d(rows, columns, d).reshape(rows, columns, d)
        inner = []
        for i, (block, attend) in enumerate(zip(self.blocks, self.attentions, strict=True)):
            # These skips are added, so that all blocks at this size keep one width.
            if i >= self.depth:
                h = h + inner.pop()
            h = attend(block(h, c_BD), c_BD, kvs[i], mask_BS)
            if i < self.depth:
                inner.append(h)
        h = layers.depth_to_space(self.grow(h))
        for block in self.up:
            h = block(jnp.concatenate([h, outer.pop()], -1), c_BD)
        h = self.leave(nn.silu(self.leave_norm(h)))
        return layers.depth_to_space(h)
