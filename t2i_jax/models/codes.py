"""Transformers over the codes of pictures, which a frozen tokenizer reads and draws.

B batch · N codes of a picture · T of them in a call · K kinds of codes · S text tokens · D width
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import attention, blocks, layers
from t2i_jax.models.types import Cond

INIT = nn.initializers.normal(0.02)  # of embeddings, as GPT-2's


class Codes(nn.Module):
    """Embeddings of codes and of their places, and logits of codes.

    One code more than there are, number K, stands for a code that is not there: the one before the
    first, or a hidden one.

    sides: height and width of a picture in codes. Places are read row by row.
    """

    num_codes: int
    sides: tuple[int, int]
    width: int
    dtype: str = "float32"

    def setup(self):
        self.code = nn.Embed(self.num_codes + 1, self.width, dtype=self.dtype, embedding_init=INIT)
        # Neighbours are alike from the first step: places begin as waves of row and column.
        waves = lambda key, shape: 0.02 * layers.positions_2d(*self.sides, self.width)
        self.place = blocks.Value((self.sides[0] * self.sides[1], self.width), waves)
        self.leave = layers.Dense(self.num_codes, dtype=self.dtype)

    def __call__(self, code_BT):
        return self.logits(self.embed(code_BT))

    def embed(self, code_BT, place=0):
        """What a transformer reads of codes, the first of them at `place`.   -> BTD"""
        place_TD = jax.lax.dynamic_slice_in_dim(self.place(), place, code_BT.shape[1])
        return self.code(code_BT) + place_TD.astype(self.dtype)

    def logits(self, h_BTD):
        """Of normed states.   -> BTK, float32"""
        return self.leave(h_BTD).astype(jnp.float32)


class Cross(nn.Module):
    """Tokens with what they find in a caption's keys and values.   BTD -> BTD"""

    width: int
    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BTD, text_kv, mask_BS):
        h_BTD = layers.RMSNorm(name="norm")(x_BTD)
        q_BTNH = layers.Queries(self.width, self.heads, self.dtype, name="query")(h_BTD)
        h_BTNH = attention.attention(q_BTNH, *text_kv, mask_BS=mask_BS)
        out = layers.Dense(self.width, use_bias=False, dtype=self.dtype, name="out")
        return x_BTD + out(attention.merge_heads(h_BTNH))


class Network(nn.Module):
    """(code_BT, cond) -> logits_BTK, by cross-attention to the caption before every layer.

    causal: whether a token sees those before it alone. Then it gives the logits of the code at its
      place, and what it reads there is the code before.
    """

    num_codes: int
    sides: tuple[int, int]
    causal: bool
    width: fields.Size = 192
    depth: fields.Size = 6
    heads: fields.Size = 6
    mlp_ratio: Annotated[float, fields.above(0)] = 8 / 3  # SwiGLU of the size of a four-fold MLP
    dtype: fields.Dtype = "float32"

    def setup(self):
        d, each, own = self.width, range(self.depth), (self.heads, self.dtype)
        self.codes = Codes(self.num_codes, self.sides, d, self.dtype)
        self.text = layers.TextTokens(d, self.dtype)
        self.kvs = [layers.KeysValues(d, *own) for _ in each]
        self.attentions = [Cross(d, *own) for _ in each]
        sizes = (self.heads, int(d * self.mlp_ratio), 1e-6, "silu", self.dtype)
        how = dict(normed="before", causal=self.causal, gated=True, qk_norm=True)
        self.layer = [blocks.Layer(*sizes, **how) for _ in each]
        self.norm = layers.RMSNorm()

    def prepare(self, cond: Cond):
        """Keys and values of the caption for every layer, and their mask."""
        tokens_BSD, mask_BS = self.text(cond.seq_BLD, cond.mask_BL)
        return tuple(kv(tokens_BSD) for kv in self.kvs), mask_BS

    def __call__(self, code_BT, cond: Cond, prepared=None):
        """prepared: what `prepare` gave of the condition, where that has been computed before."""
        prepared = self.prepare(cond) if prepared is None else prepared
        return self._through(code_BT, prepared)[0]

    def extend(self, code_BT, place, prepared, cache):
        """Logits after each token, BTK, and the cache with these tokens from `place` on.

        cache: keys and values of every layer, see `blocks.empty_cache`.
        """
        return self._through(code_BT, prepared, cache, place)

    def _through(self, code_BT, prepared, cache=None, place=0):
        kvs, text_mask_BS = prepared
        x_BTD = self.codes.embed(code_BT, place)
        mask = jnp.ones(code_BT.shape, bool) if cache is None else blocks.all_places(cache)
        grown = []
        for i, (cross, layer) in enumerate(zip(self.attentions, self.layer, strict=True)):
            x_ND = cross(x_BTD, kvs[i], text_mask_BS).reshape(-1, self.width)
            if cache is None:
                x_ND = layer(x_ND, mask)
            else:
                x_ND, new = layer(x_ND, mask, cache[i], place)
                grown.append(new)
            x_BTD = x_ND.reshape(x_BTD.shape)
        return self.codes.logits(self.norm(x_BTD)), tuple(grown)
