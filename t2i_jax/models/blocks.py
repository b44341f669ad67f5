"""Layers of pretrained transformers, for text and for images.

B batch · L length · N = B·L tokens · D width · H head width · M width within the MLP
T image tokens · S text tokens
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models import attention, layers

ACTIVATIONS = {
    # In published configs "gelu" is the exact function. By default Flax approximates it.
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # of CLIP's first weights
    "relu": nn.relu,
    "silu": nn.silu,
}


class Value(nn.Module):
    """A single parameter that is no kernel, such as a token or a scale."""

    shape: tuple[int, ...]
    init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("value", self.init, self.shape)


class Layer(nn.Module):
    """A transformer layer: attention and MLP.

    It works on flattened tokens ND, as XLA:CPU is faster at their products than at those of BLD.

    normed: "after" each sum, as in BERT, or "before" attention and MLP, as in GPT-2.
    gated: `up` makes two halves. The activated first one multiplies the second, as in SwiGLU
      (arXiv:2002.05202).
    scaled: the outputs of attention and MLP have a learned scale per channel (arXiv:2103.17239).
    qk_norm: queries and keys are normalised (arXiv:2302.05442).
    """

    heads: int
    mlp_width: int
    epsilon: float
    activation: str
    dtype: str
    normed: str = "after"
    causal: bool = False
    gated: bool = False
    scaled: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x_ND, mask_BL, cache=None, place=None):
        """The tokens after the layer; with a cache also the new cache.

        Args:
          mask_BL: True for real tokens; with a cache BS, for all its places.
          cache: keys and values of earlier tokens, each BNSH, S places.
          place: where these tokens lie in the cache: BL, or the first one's place in all rows. A
            token sees no later place.
        """
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        # Flax's fast variance, mean of squares minus squared mean, loses digits where the mean is
        # large. The published implementations do not use it.
        attention_norm, mlp_norm = (
            nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)
            for name in ("attention_norm", "mlp_norm")
        )
        before = self.normed == "before"
        width = x_ND.shape[-1]
        h_ND = attention_norm(x_ND) if before else x_ND
        split = (len(mask_BL), -1, 3, self.heads, width // self.heads)
        qkv = dense(3 * width, name="qkv")(h_ND).reshape(split)
        q_BLNH, k_BLNH, v_BLNH = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q_BLNH = layers.RMSNorm(name="q_norm")(q_BLNH)
            k_BLNH = layers.RMSNorm(name="k_norm")(k_BLNH)
        if cache is None:
            seen_BLNH = attention.attention(
                *(q_BLNH, k_BLNH, v_BLNH), mask_BS=mask_BL, causal=self.causal
            )
        else:
            cache, seen_BLS = _written(cache, (k_BLNH, v_BLNH), place)
            mask_BLS = seen_BLS & mask_BL[:, None]
            # Heads come first in a cache, as products want them: no step copies all of it.
            kv_BSNH = (x_BNSH.swapaxes(1, 2) for x_BNSH in cache)
            seen_BLNH = attention.attention(q_BLNH, *kv_BSNH, mask_BTS=mask_BLS)
        out_ND = dense(width, name="out")(seen_BLNH.reshape(x_ND.shape))
        x_ND = x_ND + self._scale(out_ND, "attention_scale")
        x_ND = x_ND if before else attention_norm(x_ND)
        h_ND = mlp_norm(x_ND) if before else x_ND
        act = ACTIVATIONS[self.activation]
        up_NM = dense((1 + self.gated) * self.mlp_width, name="up")(h_ND)
        if self.gated:
            gate_NM, up_NM = jnp.split(up_NM, 2, axis=-1)
            up_NM = act(gate_NM) * up_NM
        else:
            up_NM = act(up_NM)
        down_ND = dense(width, name="down")(up_NM)
        x_ND = x_ND + self._scale(down_ND, "mlp_scale")
        x_ND = x_ND if before else mlp_norm(x_ND)
        return x_ND if cache is None else (x_ND, cache)

    def _scale(self, x_ND, name: str):
        if not self.scaled:
            return x_ND
        # The parameter is float32 and would widen tokens of half precision.
        return x_ND * Value(x_ND.shape[-1:], nn.initializers.ones, name=name)().astype(x_ND.dtype)


def empty_cache(net, batch: int, length: int):
    """Keys and values of `length` tokens for each layer, BNSH both, of a network with `depth`,
    `heads`, `width` and `dtype`.
    """
    shape = (batch, net.heads, length, net.width // net.heads)
    return tuple((jnp.zeros(shape, net.dtype),) * 2 for _ in range(net.depth))


def all_places(cache):
    """The mask of a cache in which no token that was written is hidden.   -> bool BS"""
    b, _, places, _ = cache[0][0].shape
    return jnp.ones((b, places), bool)


def _written(cache, new, place):
    """A layer's cache with new keys and values, BLNH, and which places their tokens see, BLS.

    The cache has room for all places from the start. So its shape never changes, and one program
    serves every token. Places that are not written yet are not seen.
    """
    (b, length), places = new[0].shape[:2], cache[0].shape[2]
    if jnp.ndim(place):
        place_BL, row_B1 = place, jnp.arange(b)[:, None]
        write = lambda old, new: old.at[row_B1, :, place].set(new)
    else:
        place_BL = jnp.broadcast_to(place + jnp.arange(length), (b, length))
        # Next to each other in all rows, they are one piece, which is written much faster.
        piece = jax.lax.dynamic_update_slice_in_dim
        write = lambda old, new: piece(old, new.swapaxes(1, 2), place, axis=2)
    cache = tuple(write(*pair) for pair in zip(cache, new, strict=True))
    return cache, jnp.arange(places) <= place_BL[..., None]


class Attention(nn.Module):
    """Attention of image tokens to themselves, or to keys and values of a text.   BTD -> BTD

    The products are of `dtype`, and so is the result.

    bias: of queries, keys and values. The last product always has one.
    """

    width: int
    heads: int
    dtype: str
    bias: bool = False

    def setup(self):
        # Three products, so that a tensor axis splits the heads of each (ADR 26).
        dense = lambda bias: nn.Dense(self.width, use_bias=bias, dtype=self.dtype)
        self.q, self.k, self.v = (dense(self.bias) for _ in range(3))
        self.out = dense(True)

    def keys_values(self, x_BSD):
        """Keys and values of tokens, BSNH both. A text's are the same at every solver step."""
        x_BSD = x_BSD.astype(self.dtype)
        return tuple(
            attention.split_heads(layers.flat(fn, x_BSD), self.heads) for fn in (self.k, self.v)
        )

    def __call__(self, x_BTD, text_kv=None, mask_BS=None):
        """text_kv: what `keys_values` gave of a text.   mask_BS: False hides one of its tokens."""
        kv = self.keys_values(x_BTD) if text_kv is None else text_kv
        q_BTNH = attention.split_heads(layers.flat(self.q, x_BTD.astype(self.dtype)), self.heads)
        seen_BTNH = attention.attention(q_BTNH, *kv, mask_BS=mask_BS)
        return layers.flat(self.out, attention.merge_heads(seen_BTNH))


class Causal(nn.Module):
    """A stack of causal layers: CLIP's text tower and GPT-2.

    `dtype` is the type of computation. Parameters stay float32.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_length: int
    epsilon: float
    activation: str
    dtype: str

    @property
    def positions(self) -> int:
        """The most tokens it reads."""
        return self.max_length

    def setup(self):
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        self.word, self.position = embed(self.vocab), embed(self.max_length)
        sizes = (self.heads, self.mlp_width, self.epsilon, self.activation, self.dtype)
        self.layer = [Layer(*sizes, "before", True) for _ in range(self.depth)]
        self.norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False)

    def states(self, text_BL, mask_BL) -> list[jax.Array]:
        """The hidden states BLD after the embeddings and after every layer.

        These are not normed. One more entry at the end is the last of them, normed.
        """
        x_BLD = self.embed(text_BL, positions(text_BL, self.max_length))
        states = [x_BLD.reshape(-1, self.width)]
        for layer in self.layer:
            states.append(layer(states[-1], mask_BL))
        states.append(self.norm(states[-1]))
        return [x_ND.reshape(x_BLD.shape) for x_ND in states]

    def embed(self, text_BL, place):
        """Words and their places, as the first layer reads them.   -> BLD"""
        return self.word(text_BL) + self.position(place)

    def through(self, x_BLD, mask_BL, cache=None, place=None):
        """Embedded tokens, perhaps others than words, after all layers, normed.   -> BLD, cache

        Args: as of `Layer`, with a cache for each of them; None remains None.
        """
        x_ND, grown = x_BLD.reshape(-1, self.width), []
        for layer, old in zip(self.layer, cache or [None] * self.depth, strict=True):
            x_ND = layer(x_ND, mask_BL, old, place)
            if cache is not None:
                x_ND, new = x_ND
                grown.append(new)
        return self.norm(x_ND).reshape(x_BLD.shape), cache and tuple(grown)


def positions(text_BL, max_length: int):
    """The positions 0 … L − 1. Raises ConfigError where the encoder has fewer."""
    length = text_BL.shape[1]
    if length > max_length:
        raise errors.ConfigError(
            f"captions have {length} tokens, the encoder {max_length} positions",
            where="config.text_length",
            fix=f"set it to {max_length} or less",
        )
    return jnp.arange(length)


def check(sizes: dict) -> None:
    """Raises ConfigError where a family's sizes, as read by `hf.fields`, do not fit together."""
    if sizes["activation"] not in ACTIVATIONS:
        raise errors.misfit(
            f"activation {sizes['activation']!r} is not implemented",
            errors.nearest(sizes["activation"], ACTIVATIONS),
        )
    if sizes["width"] % sizes["heads"]:
        raise errors.misfit(f"width {sizes['width']} is no multiple of its {sizes['heads']} heads")
