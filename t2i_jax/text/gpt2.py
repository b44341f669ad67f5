"""GPT-2 (Radford et al. 2019): its states as a condition.   B batch · L text length · D width"""

import functools

import flax.linen as nn
import jax

from t2i_jax.text import blocks, condition, hf

_FIELDS = {
    "vocab_size": "vocab",
    "n_embd": "width",
    "n_layer": "depth",
    "n_head": "heads",
    "n_positions": "max_length",
    "layer_norm_epsilon": "epsilon",
    "activation_function": "activation",
}
MODEL_TYPES = ("gpt2",)
_IMPLEMENTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def names(config) -> hf.Names:
    return hf.Names(
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
        },
        prefixes=("transformer.",),
        ignored=("h.*.attn.bias", "h.*.attn.masked_bias", "lm_head.*"),
        untransposed=True,
    )


class Gpt2(nn.Module):
    """The decoder without its head; `dtype` computes, parameters stay float32."""

    vocab: int = 50257
    width: int = 768
    depth: int = 12
    heads: int = 12
    max_length: int = 1024
    epsilon: float = 1e-5
    activation: str = "gelu_new"
    mlp_width: int = 3072
    dtype: str = "float32"

    @nn.compact
    def states(self, text_BL, mask_BL) -> list[jax.Array]:
        """BLD after the embeddings and after every layer, the last one normed."""
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        place_L = blocks.positions(text_BL, self.max_length)
        x_BLD = embed(self.vocab, name="word")(text_BL)
        x_BLD += embed(self.max_length, name="position")(place_L)
        states = [x_BLD.reshape(-1, self.width)]
        sizes = (self.heads, self.mlp_width, self.epsilon, self.activation, self.dtype)
        for i in range(self.depth):
            layer = blocks.Layer(*sizes, "before", True, name=f"layer_{i}")
            states.append(layer(states[-1], mask_BL))
        norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name="norm")
        states[-1] = norm(states[-1])
        return [x_ND.reshape(x_BLD.shape) for x_ND in states]

    def __call__(self, text_BL, mask_BL) -> condition.Cond:
        """The last layer's states, zero where the mask is False, and their mean."""
        return condition.of_states(self.states(text_BL, mask_BL)[-1], mask_BL)


def from_config(config: dict, *, dtype: str = "float32") -> Gpt2:
    """The network that a checkpoint's config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    sizes = hf.fields(config, Gpt2, _FIELDS, _IMPLEMENTED)
    blocks.check(sizes)
    return Gpt2(**sizes, mlp_width=config.get("n_inner") or 4 * sizes["width"], dtype=dtype)
