"""A diffusion transformer with cross-attention to the caption: the backbone that scales.

AdaLN-zero from time and pooled text (DiT, arXiv:2212.09748), qk-norm, SwiGLU, fixed 2-D positions.

B batch · H W pixels · C channels · T image tokens · S text tokens · D width · N heads
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import attention, layers
from t2i_jax.models.types import Cond


class Block(nn.Module):
    """Self-attention, cross-attention to the text and SwiGLU, each modulated by time and text.

    The stream x_BTD and its modulation are float32. `dtype` is that of the products alone. It
    returns (x_BTD, None), the form that a scan over layers needs.
    """

    width: int
    heads: int
    hidden: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD, text_kv, c_BD, mask_BS):
        d, kind = self.width, dict(dtype=self.dtype)
        # Shift, scale and gate of three parts. They start at zero, so each block starts as the
        # identity (adaLN-zero).
        mod_B9D = layers.Dense(9 * d, zero=True, name="modulation")(c_BD)
        mods = jnp.split(mod_B9D, 9, -1)

        def enter(x_BTD, i):
            return layers.modulate(layers.RMSNorm(scale=False)(x_BTD), mods[i], mods[i + 1])

        h = enter(x_BTD, 0)
        q_BTNH = layers.Queries(d, self.heads, name="query", **kind)(h)
        k_BTNH, v_BTNH = layers.KeysValues(d, self.heads, name="picture", **kind)(h)
        h = attention.merge_heads(attention.attention(q_BTNH, k_BTNH, v_BTNH))
        x_BTD = x_BTD + layers.gate(layers.Dense(d, use_bias=False, name="out", **kind)(h), mods[2])

        q_BTNH = layers.Queries(d, self.heads, name="cross_query", **kind)(enter(x_BTD, 3))
        h = attention.merge_heads(attention.attention(q_BTNH, *text_kv, mask_BS=mask_BS))
        x_BTD = x_BTD + layers.gate(
            layers.Dense(d, use_bias=False, name="cross_out", **kind)(h), mods[5]
        )

        h = enter(x_BTD, 6)
        # Two products: the halves of a single one would lie on different devices (ADR 7).
        a = layers.Dense(self.hidden, use_bias=False, name="mlp_gate", **kind)(h)
        b = layers.Dense(self.hidden, use_bias=False, name="mlp_up", **kind)(h)
        h = layers.Dense(d, use_bias=False, name="mlp_leave", **kind)(nn.silu(a) * b)
        return x_BTD + layers.gate(h, mods[8]), None


class Backbone(nn.Module):
    """(x_BHWC, t_B, cond) -> C channels of the same size. `patch` divides H and W.

    dtype: of the products inside the blocks. The sum over blocks, their modulation, and the first
      and last layer are float32. This halves the error of bfloat16.
    remat: what the backward pass of a block computes again, see `layers.remat`.
    scan: runs one compiled block `depth` times, with stacked parameters. Deep networks compile
      faster.
    """

    channels: fields.Size = 3
    patch: fields.Size = 4
    width: fields.Size = 192
    depth: fields.Size = 6
    heads: fields.Size = 6
    mlp_ratio: Annotated[float, fields.above(0)] = 8 / 3  # SwiGLU of the size of a four-fold MLP
    dtype: fields.Dtype = "float32"
    remat: str = "none"
    scan: bool = False

    @property
    def unit(self) -> int:
        """H and W must be multiples of it."""
        return self.patch

    def setup(self):
        d, kind = self.width, dict(dtype=self.dtype)
        hidden = int(d * self.mlp_ratio)
        self.condition = layers.TimeText(d)
        self.text = layers.TextTokens(d, **kind)
        self.embed = layers.Dense(d)
        keys_values, block = layers.KeysValues, layers.remat(Block, self.remat, scanned=self.scan)
        # Keys and values of all blocks are computed before the scan, which then gets one block's at
        # each turn. So a sampler can compute them once.
        if self.scan:
            keys_values = nn.vmap(keys_values, in_axes=None, axis_size=self.depth, **layers.STACK)
            # Each block reads its own keys and values. The condition and the mask serve all.
            axes = (0, nn.broadcast, nn.broadcast)
            block = nn.scan(block, in_axes=axes, length=self.depth, **layers.STACK)
        copies = 1 if self.scan else self.depth
        self.kvs = [keys_values(d, self.heads, **kind) for _ in range(copies)]
        self.blocks = [block(d, self.heads, hidden, **kind) for _ in range(copies)]
        self.leave_modulation = layers.Dense(2 * d, zero=True)
        self.leave_norm = layers.RMSNorm()
        self.leave = layers.Dense(self.patch**2 * self.channels, zero=True)

    def prepare(self, cond: Cond):
        """Keys and values of the text for every block, and their mask.

        They do not depend on time, so a sampler computes them once for all its steps.
        """
        tokens_BSD, mask_BS = self.text(cond.seq_BLD, cond.mask_BL)
        return tuple(kv(tokens_BSD) for kv in self.kvs), mask_BS

    def __call__(self, x_BHWC, t_B, cond: Cond, prepared=None):
        kvs, mask_BS = self.prepare(cond) if prepared is None else prepared
        c_BD = nn.silu(self.condition(t_B, cond.pooled_BD))
        patches = layers.space_to_depth(x_BHWC, self.patch)
        b, rows, columns, _ = patches.shape
        x_BTD = self.embed(patches).reshape(b, rows * columns, self.width)
        x_BTD = x_BTD + layers.positions_2d(rows, columns, self.width)
        for block, text_kv in zip(self.blocks, kvs, strict=True):
            x_BTD, _ = block(x_BTD, text_kv, c_BD, mask_BS)
        shift_BD, scale_BD = jnp.split(self.leave_modulation(c_BD), 2, -1)
        x_BTD = layers.modulate(self.leave_norm(x_BTD), shift_BD, scale_BD)
        x_BHWC = self.leave(x_BTD).reshape(b, rows, columns, -1)
        return layers.depth_to_space(x_BHWC, self.patch)
