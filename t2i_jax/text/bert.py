"""BERT, arXiv:1810.04805.   B batch · L text length · D width · N = B·L tokens · H head width"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models import attention
from t2i_jax.text import condition, hf

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}

NAMES = hf.Names(
    tensors={
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "segment": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
        "layer_{}/qkv": (
            "encoder.layer.{}.attention.self.query",
            "encoder.layer.{}.attention.self.key",
            "encoder.layer.{}.attention.self.value",
        ),
        "layer_{}/out": "encoder.layer.{}.attention.output.dense",
        "layer_{}/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "layer_{}/up": "encoder.layer.{}.intermediate.dense",
        "layer_{}/down": "encoder.layer.{}.output.dense",
        "layer_{}/mlp_norm": "encoder.layer.{}.output.LayerNorm",
    },
    prefix="bert.",
    ignored=("embeddings.position_ids", "pooler.*", "cls.*", "classifier.*", "qa_outputs.*"),
)

_FIELDS = {  # config.json -> ours
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "type_vocab_size": "segments",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
}
_IMPLEMENTED = {  # fields of config.json that change the network, and the one value we have
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class Layer(nn.Module):
    """One block, norms after the sums, on flattened tokens: products of ND are faster than BLD."""

    heads: int
    mlp_width: int
    epsilon: float
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, x_ND, mask_BL):
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False
        )
        width = x_ND.shape[-1]
        qkv = dense(3 * width, name="qkv")(x_ND).reshape(*mask_BL.shape, 3, self.heads, -1)
        q_BLNH, k_BLNH, v_BLNH = (qkv[:, :, i] for i in range(3))
        seen_BLNH = attention.attention(q_BLNH, k_BLNH, v_BLNH, mask_BS=mask_BL)
        out_ND = dense(width, name="out")(seen_BLNH.reshape(x_ND.shape))
        x_ND = norm(name="attention_norm")(x_ND + out_ND)
        up_NM = ACTIVATIONS[self.activation](dense(self.mlp_width, name="up")(x_ND))
        return norm(name="mlp_norm")(x_ND + dense(width, name="down")(up_NM))


class Bert(nn.Module):
    """A BERT encoder without pooler and dropout; `dtype` computes, parameters stay float32."""

    vocab: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_length: int = 512
    segments: int = 2
    epsilon: float = 1e-12
    activation: str = "gelu"
    dtype: str = "float32"

    @nn.compact
    def states(self, text_BL, mask_BL) -> list[jax.Array]:
        """BLD after the embeddings and after every layer; only valid tokens mean anything."""
        if text_BL.shape[1] > self.max_length:
            raise errors.ConfigError(
                f"captions have {text_BL.shape[1]} tokens, the encoder {self.max_length} positions",
                where="config.text_length",
                fix=f"set it to {self.max_length} or less",
            )
        embed = functools.partial(nn.Embed, features=self.width)
        position_LD = embed(self.max_length, name="position")(jnp.arange(text_BL.shape[1]))
        segment_1D = embed(self.segments, name="segment")(jnp.zeros(1, jnp.int32))
        x_BLD = embed(self.vocab, name="word")(text_BL) + position_LD + segment_1D
        norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name="norm")
        states = [norm(x_BLD.reshape(-1, self.width))]
        sizes = (self.heads, self.mlp_width, self.epsilon, self.activation, self.dtype)
        for i in range(self.depth):
            states.append(Layer(*sizes, name=f"layer_{i}")(states[-1], mask_BL))
        return [x_ND.reshape(x_BLD.shape) for x_ND in states]

    def __call__(self, text_BL, mask_BL) -> condition.Cond:
        """The last layer's states, zero where the mask is False, and their mean."""
        seq_BLD = self.states(text_BL, mask_BL)[-1] * mask_BL[..., None]
        return condition.Cond(seq_BLD, mask_BL, condition.masked_mean(seq_BLD, mask_BL))


def from_config(config: dict, *, dtype: str = "float32") -> Bert:
    """The encoder that a checkpoint's config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    for field, value in _IMPLEMENTED.items():
        if config.get(field, value) != value:
            raise errors.ConfigError(
                f"{field} {config[field]!r} is not implemented",
                where=hf.CONFIG,
                fix=f"use a checkpoint with {field} {value!r}",
            )
    fields = {}
    for theirs, ours in _FIELDS.items():
        default = getattr(Bert, ours)
        value = fields[ours] = config.get(theirs, default)
        if type(value) is not type(default) or (not isinstance(value, str) and value <= 0):
            raise errors.ConfigError(
                f"{theirs} is {value!r}", where=hf.CONFIG, fix=f"it should be like {default!r}"
            )
    if fields["activation"] not in ACTIVATIONS:
        raise errors.ConfigError(
            f"hidden_act {fields['activation']!r} is not implemented",
            where=hf.CONFIG,
            fix=errors.nearest(fields["activation"], ACTIVATIONS),
        )
    if fields["width"] % fields["heads"]:
        raise errors.ConfigError(
            f"hidden_size {fields['width']} is no multiple of num_attention_heads "
            f"{fields['heads']}",
            where=hf.CONFIG,
            fix="use the config.json that was saved with the weights",
        )
    return Bert(**fields, dtype=dtype)
