"""BERT (arXiv:1810.04805), RoBERTa (1907.11692), XLM-R (1911.02116), DistilBERT (1910.01108).

B batch · L text length · D width · N = B·L tokens
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import hf, tensors
from t2i_jax.text import condition

_BERT = {
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
}
_DISTILBERT = {
    **{path: name for path, name in _BERT.items() if "/" not in path},
    "layer_{}/qkv": tuple(f"transformer.layer.{{}}.attention.{x}_lin" for x in "qkv"),
    "layer_{}/out": "transformer.layer.{}.attention.out_lin",
    "layer_{}/attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layer_{}/up": "transformer.layer.{}.ffn.lin1",
    "layer_{}/down": "transformer.layer.{}.ffn.lin2",
    "layer_{}/mlp_norm": "transformer.layer.{}.output_layer_norm",
}
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
_DISTILBERT_FIELDS = {
    "vocab_size": "vocab",
    "dim": "width",
    "n_layers": "depth",
    "n_heads": "heads",
    "hidden_dim": "mlp_width",
    "max_position_embeddings": "max_length",
    "activation": "activation",
}
_IMPLEMENTED = {  # fields of config.json that change the network, and the one value we have
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
ROBERTAS = ("roberta", "xlm-roberta", "camembert")
KINDS = ("bert", "distilbert", *ROBERTAS)


def names(config) -> tensors.Names:
    # `vocab_` begins the parts of DistilBERT's head for hidden words.
    heads = ("cls.*", "classifier.*", "qa_outputs.*", "lm_head.*", "vocab_*")
    return tensors.Names(
        tensors=_DISTILBERT if config["model_type"] == "distilbert" else _BERT,
        prefixes=("bert.", "roberta.", "distilbert."),
        renamed=(  # of the first checkpoints, converted from TensorFlow
            ("LayerNorm.gamma", "LayerNorm.weight"),
            ("LayerNorm.beta", "LayerNorm.bias"),
        ),
        ignored=("embeddings.position_ids", "embeddings.token_type_ids", "pooler.*", *heads),
    )


class Bert(nn.Module):
    """The encoder without pooler and dropout; `dtype` computes, parameters stay float32.

    segments: kinds of segment, of which a caption is the first; 0: no such table.
    padding: RoBERTa's padding token. Its number is also its place in the table of positions, and
      those of other tokens are counted from the next on: a padding token that stands in a caption
      takes no place. None: tokens have the places 0, 1, …
    """

    vocab: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_length: int = 512
    segments: int = 2
    epsilon: float = 1e-12
    activation: str = "gelu"
    padding: int | None = None
    dtype: str = "float32"

    @property
    def positions(self) -> int:
        """The most tokens it reads."""
        return self.max_length - (0 if self.padding is None else self.padding + 1)

    @nn.compact
    def states(self, text_BL, mask_BL) -> list[jax.Array]:
        """BLD after the embeddings and after every layer; only valid tokens mean anything."""
        # Called for RoBERTa, too, as it refuses captions that are too long.
        place_BL = blocks.positions(text_BL, self.positions)[None]
        if self.padding is not None:
            counted_BL = text_BL != self.padding
            place_BL = self.padding + jnp.cumsum(counted_BL, axis=1) * counted_BL
        embed = functools.partial(nn.Embed, features=self.width)
        x_BLD = embed(self.vocab, name="word")(text_BL)
        x_BLD += embed(self.max_length, name="position")(place_BL)
        if self.segments:
            x_BLD += embed(self.segments, name="segment")(jnp.zeros(1, jnp.int32))
        norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name="norm")
        states = [norm(x_BLD.reshape(-1, self.width))]
        sizes = (self.heads, self.mlp_width, self.epsilon, self.activation, self.dtype)
        for i in range(self.depth):
            states.append(blocks.Layer(*sizes, name=f"layer_{i}")(states[-1], mask_BL))
        return [x_ND.reshape(x_BLD.shape) for x_ND in states]

    def __call__(self, text_BL, mask_BL) -> Cond:
        """The last layer's states, zero where the mask is False, and their mean."""
        return condition.of_states(self.states(text_BL, mask_BL)[-1], mask_BL)


def from_config(config: dict, *, dtype: fields.Dtype = "float32") -> Bert:
    """The encoder that a checkpoint's config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    if config["model_type"] == "distilbert":
        # Where a config.json lacks a field, its class's default holds, which is not BERT's.
        config = {"n_layers": 6} | config
        sizes = hf.fields(config, Bert, _DISTILBERT_FIELDS) | {"segments": 0}
    else:
        if config["model_type"] == "roberta":
            config = {"vocab_size": 50265} | config
        sizes = hf.fields(config, Bert, _FIELDS, _IMPLEMENTED)
    if config["model_type"] in ROBERTAS:
        pad = config.get("pad_token_id", 1)
        # The table needs one place at least behind the padding's.
        if type(pad) is not int or not 0 <= pad < sizes["max_length"] - 1:
            raise errors.misfit(f"pad_token_id is {pad!r}", "it should be like 1")
        sizes["padding"] = pad
    blocks.check(sizes)
    return Bert(**sizes, dtype=dtype)
