"""What BERT, CLIP and GPT-2 are made of.

B batch · L text length · N = B·L tokens · D width · H head width
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models import attention

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # of CLIP's first weights
    "relu": nn.relu,
    "silu": nn.silu,
}


class Layer(nn.Module):
    """Attention and MLP on flattened tokens: products of ND are faster than those of BLD.

    normed: "after" each sum, as in BERT, or "before" attention and MLP, as in GPT-2.
    """

    heads: int
    mlp_width: int
    epsilon: float
    activation: str
    dtype: str
    normed: str = "after"
    causal: bool = False

    @nn.compact
    def __call__(self, x_ND, mask_BL, cache=None, place_BL=None):
        """Tokens after the block; with a cache of keys and values (each BSNH), what it became, too.

        With a cache the tokens come to stand at place_BL, and see what stands at no later place.
        """
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        attention_norm, mlp_norm = (
            nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)
            for name in ("attention_norm", "mlp_norm")
        )
        before = self.normed == "before"
        width = x_ND.shape[-1]
        h_ND = attention_norm(x_ND) if before else x_ND
        qkv = dense(3 * width, name="qkv")(h_ND).reshape(*mask_BL.shape, 3, self.heads, -1)
        q_BLNH, k_BLNH, v_BLNH = (qkv[:, :, i] for i in range(3))
        if cache is None:
            seen_BLNH = attention.attention(
                *(q_BLNH, k_BLNH, v_BLNH), mask_BS=mask_BL, causal=self.causal
            )
        else:
            row_B1 = jnp.arange(mask_BL.shape[0])[:, None]
            cache = tuple(
                old.at[row_B1, place_BL].set(new)
                for old, new in zip(cache, (k_BLNH, v_BLNH), strict=True)
            )
            seen_BLS = jnp.arange(cache[0].shape[1]) <= place_BL[..., None]
            seen_BLNH = attention.attention(q_BLNH, *cache, mask_BTS=seen_BLS)
        x_ND = x_ND + dense(width, name="out")(seen_BLNH.reshape(x_ND.shape))
        x_ND = x_ND if before else attention_norm(x_ND)
        h_ND = mlp_norm(x_ND) if before else x_ND
        up_NM = ACTIVATIONS[self.activation](dense(self.mlp_width, name="up")(h_ND))
        x_ND = x_ND + dense(width, name="down")(up_NM)
        x_ND = x_ND if before else mlp_norm(x_ND)
        return x_ND if cache is None else (x_ND, cache)


class Causal(nn.Module):
    """A stack of layers in which a token sees those before it: CLIP's text tower and GPT-2.

    `dtype` computes, parameters stay float32.
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
        """BLD after the embeddings and after every layer, not normed but for one more: the last
        layer's, normed.
        """
        place_L = positions(text_BL, self.max_length)
        x_BLD = self.word(text_BL) + self.position(place_L)
        states = [x_BLD.reshape(-1, self.width)]
        for layer in self.layer:
            states.append(layer(states[-1], mask_BL))
        states.append(self.norm(states[-1]))
        return [x_ND.reshape(x_BLD.shape) for x_ND in states]


def positions(text_BL, max_length: int):
    """0 … L − 1. Raises ConfigError where the encoder has fewer positions."""
    length = text_BL.shape[1]
    if length > max_length:
        raise errors.ConfigError(
            f"captions have {length} tokens, the encoder {max_length} positions",
            where="config.text_length",
            fix=f"set it to {max_length} or less",
        )
    return jnp.arange(length)


def check(sizes: dict) -> None:
    """Raises ConfigError where a family's sizes, as `hf.fields` found them, do not go together."""
    if sizes["activation"] not in ACTIVATIONS:
        raise errors.ConfigError(
            f"activation {sizes['activation']!r} is not implemented",
            where="config.json",
            fix=errors.nearest(sizes["activation"], ACTIVATIONS),
        )
    if sizes["width"] % sizes["heads"]:
        raise errors.ConfigError(
            f"width {sizes['width']} is no multiple of its {sizes['heads']} heads",
            where="config.json",
            fix="use the config.json that was saved with the weights",
        )
