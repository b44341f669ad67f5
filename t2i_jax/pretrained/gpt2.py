"""GPT-2 (Radford et al. 2019): its states as a condition.   B batch · L text length · D width"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import hf, tensors
from t2i_jax.text import condition

_FIELDS = {
    "vocab_size": "vocab",
    "n_embd": "width",
    "n_layer": "depth",
    "n_head": "heads",
    "n_inner": "mlp_width",
    "n_positions": "max_length",
    "layer_norm_epsilon": "epsilon",
    "activation_function": "activation",
}
KINDS = ("gpt2",)
_IMPLEMENTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def names(config) -> tensors.Names:
    return tensors.Names(
        tensors={
            "word": "wte",
            "position": "wpe",
            "layer_{}/qkv": "h.{}.attn.c_attn",
            "layer_{}/out": "h.{}.attn.c_proj",
            "layer_{}/attention_norm": "h.{}.ln_1",
            "layer_{}/up": "h.{}.mlp.c_fc",
            "layer_{}/down": "h.{}.mlp.c_proj",
            "layer_{}/mlp_norm": "h.{}.ln_2",
            "norm": "ln_f",
            "head": "lm_head",
        },
        prefixes=("transformer.",),
        # `attn.bias` is the causal mask, which torch saves as a buffer.
        ignored=("h.*.attn.bias", "h.*.attn.masked_bias", "lm_head.*"),
        untransposed=True,
    )


class Gpt2(blocks.Causal):
    """The decoder; `dtype` computes, parameters stay float32.

    logits: what makes them of states: "word", the embeddings; "head", a matrix of the checkpoint;
      "none": the checkpoint has neither, and `generate` refuses it.
    """

    vocab: int = 50257
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_length: int = 1024
    epsilon: float = 1e-5
    activation: str = "gelu_new"
    dtype: str = "float32"
    logits: str = "word"

    def setup(self):
        super().setup()
        if self.logits == "head":
            # The file's matrix is (vocab, width), an embedding's shape, whose `attend` makes
            # logits.
            self.head = nn.Embed(self.vocab, self.width, dtype=self.dtype)

    def states(self, text_BL, mask_BL) -> list[jax.Array]:
        """BLD after the embeddings and after every layer, the last one normed."""
        *states, _, normed = super().states(text_BL, mask_BL)
        return [*states, normed]

    def extend(self, text_BL, place_BL, cache):
        """Logits after each token (BLV, float32) and the cache with these tokens at their places.

        cache: keys and values of every layer, see `empty_cache`.
        """
        x_BLD = self.word(text_BL) + self.position(place_BL)
        x_ND, grown = x_BLD.reshape(-1, self.width), []
        for layer, old in zip(self.layer, cache, strict=True):
            # With a cache a layer reads of the mask only its shape.
            x_ND, new = layer(x_ND, jnp.ones(text_BL.shape, bool), old, place_BL)
            grown.append(new)
        words = self.head if self.logits == "head" else self.word
        logits = words.attend(self.norm(x_ND)).astype(jnp.float32)
        return logits.reshape(*text_BL.shape, -1), tuple(grown)

    def empty_cache(self, batch: int, length: int):
        """Keys and values of `length` tokens, for `extend`."""
        shape = (batch, length, self.heads, self.width // self.heads)
        return tuple((jnp.zeros(shape, self.dtype),) * 2 for _ in range(self.depth))

    def __call__(self, text_BL, mask_BL) -> Cond:
        """The last layer's states, zero where the mask is False, and their mean."""
        last_BLD = self.states(text_BL, mask_BL)[-1]
        if self.logits == "head" and self.is_initializing():
            self.head.attend(last_BLD)  # so that it is loaded
        return condition.of_states(last_BLD, mask_BL)


def generate(
    net: Gpt2,
    variables,
    text_BL,
    mask_BL,
    key,
    *,
    new: int,
    end: int = 50256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
):
    """Goes on with each row by at most `new` tokens.   -> (text BN int32, mask BN), N = new

    A row that has put out `end` puts out nothing more: its mask is False from there on. Rows of
    unequal length, padded on either side, go on from their own last token, each as it would alone.

    Args:
      key: one for the batch; rows draw by their number.
      temperature: of the softmax; 0 takes the likeliest token.
      top_k: only the k likeliest tokens are drawn; 0: all.
      top_p: only the likeliest that together reach this probability (arXiv:1904.09751).
    Raises:
      ConfigError: prompts and new tokens are longer than the network's positions, or the checkpoint
        has no head.
    """
    if net.logits == "none":
        raise errors.ConfigError(
            "the checkpoint has no head that makes words of states",
            where="generate",
            fix="use one that GPT2LMHeadModel saved",
        )
    b, length = text_BL.shape
    if length + new > net.max_length:
        raise errors.ConfigError(
            f"{length} tokens and {new} new ones are more than the {net.max_length} positions",
            where="generate",
            fix=f"ask for at most {net.max_length - length} new tokens",
        )
    order_BL = jnp.argsort(~mask_BL, axis=1, stable=True)  # padding to the end
    text_BL = jnp.take_along_axis(text_BL, order_BL, axis=1)
    extend = functools.partial(net.apply, variables, method="extend")
    # Padding is written to the cache behind its row, where new tokens replace it before any look.
    place_BL = jnp.broadcast_to(jnp.arange(length), text_BL.shape)
    logits_BLV, cache = extend(text_BL, place_BL, net.empty_cache(b, length + new))
    last_B = mask_BL.sum(1) - 1
    logits_BV = jnp.take_along_axis(logits_BLV, last_B[:, None, None], axis=1)[:, 0]
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b))

    def step(carry, i):
        logits_BV, cache, alive_B = carry
        if temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            logits_BV = _keep(logits_BV / temperature, top_k, top_p)
            draw = lambda k, logits: jax.random.categorical(jax.random.fold_in(k, i), logits)
            token_B = jax.vmap(draw)(keys_B, logits_BV)
        alive_B &= token_B != end
        token_B = jnp.where(alive_B, token_B, end).astype(jnp.int32)
        logits_B1V, cache = extend(token_B[:, None], (last_B + 1 + i)[:, None], cache)
        return (logits_B1V[:, 0], cache, alive_B), (token_B, alive_B)

    # A row without a prompt has no last token to go on from, so it has ended.
    start = (logits_BV, cache, mask_BL.any(1))
    _, (text_NB, mask_NB) = jax.lax.scan(step, start, jnp.arange(new))
    return text_NB.T, mask_NB.T


def _keep(logits_BV, top_k: int, top_p: float):
    """The logits of tokens that may be drawn, −∞ for all others."""
    sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
    floor_B1 = jnp.full((logits_BV.shape[0], 1), -jnp.inf)
    if top_k:
        last = min(top_k, sorted_BV.shape[1])
        floor_B1 = sorted_BV[:, last - 1 : last]
    probability_BV = jax.nn.softmax(jnp.where(sorted_BV >= floor_B1, sorted_BV, -jnp.inf))
    before_BV = jnp.cumsum(probability_BV, -1) - probability_BV
    # A token is kept while those before it fall short of top_p, the likeliest even at 0.
    kept_B1 = jnp.maximum((before_BV < top_p).sum(-1, keepdims=True), 1)
    nucleus_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    return jnp.where(logits_BV >= jnp.maximum(floor_B1, nucleus_B1), logits_BV, -jnp.inf)


def from_config(config: dict, *, dtype: fields.Dtype = "float32") -> Gpt2:
    """The network that a checkpoint's config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    if config.get("n_inner") is None:
        config = config | {"n_inner": 4 * config.get("n_embd", Gpt2.width)}
    sizes = hf.fields(config, Gpt2, _FIELDS, _IMPLEMENTED)
    blocks.check(sizes)
    if not config.get("tie_word_embeddings", True):
        # The file has an untied head only if the class that saved it has one.
        saved_as = str(config.get("architectures"))
        sizes["logits"] = "head" if re.search("LMHead|DoubleHeads", saved_as) else "none"
    return Gpt2(**sizes, dtype=dtype)
