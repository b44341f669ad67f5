"""GPT-2 (Radford et al. 2019): its states as a condition.   B batch · L text length · D width"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks, layers
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import hf, tensors
from t2i_jax.sampling import tokens
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

        cache: keys and values of every layer, see `blocks.empty_cache`.
        """
        mask_BS, x_BLD = blocks.all_places(cache), self.embed(text_BL, place_BL)
        h_BLD, cache = self.through(x_BLD, mask_BS, cache, place_BL)
        return self.speak(h_BLD), cache

    def speak(self, h_BLD):
        """Logits of the words behind each token, of its normed state.   -> BLV, float32"""
        words = self.head if self.logits == "head" else self.word
        return layers.flat(words.attend, h_BLD).astype(jnp.float32)

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
    logits_BLV, cache = extend(text_BL, place_BL, blocks.empty_cache(net, b, length + new))
    last_B = mask_BL.sum(1) - 1
    logits_BV = jnp.take_along_axis(logits_BLV, last_B[:, None, None], axis=1)[:, 0]
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b))

    def step(carry, i):
        logits_BV, cache, alive_B = carry
        step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B)
        token_B = tokens.draw(logits_BV, step_keys_B, temperature, top_k, top_p)
        alive_B &= token_B != end
        token_B = jnp.where(alive_B, token_B, end)
        logits_B1V, cache = extend(token_B[:, None], (last_B + 1 + i)[:, None], cache)
        return (logits_B1V[:, 0], cache, alive_B), (token_B, alive_B)

    # A row without a prompt has no last token to go on from, so it has ended.
    start = (logits_BV, cache, mask_BL.any(1))
    _, (text_NB, mask_NB) = jax.lax.scan(step, start, jnp.arange(new))
    return text_NB.T, mask_NB.T


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
