"""BERT's encoder (arXiv:1810.04805) in plain Linen, and the names its checkpoints use.

B batch · L text length · D width · N heads · H head width
"""

import flax.linen as nn
import numpy as np
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models import attention
from t2i_jax.text import hf
from t2i_jax.text.condition import Cond, masked_mean

_ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Layer(nn.Module):
    """One block, norms after the sums, on flattened tokens."""

    heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x_ND, mask_BL):
        d, kind = x_ND.shape[-1], dict(dtype=self.dtype)
        qkv_N3D = nn.Dense(3 * d, name="qkv", **kind)(x_ND)
        qkv = qkv_N3D.reshape(*mask_BL.shape, 3, self.heads, d // self.heads)
        out_BLNH = attention.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask_BS=mask_BL)
        out_ND = nn.Dense(d, name="out", **kind)(out_BLNH.reshape(-1, d))
        x_ND = nn.LayerNorm(self.epsilon, name="norm_attention", **kind)(x_ND + out_ND)
        h = _ACTIVATIONS[self.activation](nn.Dense(self.hidden, name="enter", **kind)(x_ND))
        h = nn.Dense(d, name="leave", **kind)(h)
        return nn.LayerNorm(self.epsilon, name="norm_mlp", **kind)(x_ND + h)


class Bert(nn.Module):
    """Token ids and mask -> Cond: last hidden states, the mask, their masked mean.

    A row without a valid token gives finite states and a zero pooled vector.
    """

    vocab: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1536
    positions: int = 512
    types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    dtype: str = "float32"

    @nn.compact
    def __call__(self, text_BL, mask_BL) -> Cond:
        b, length = text_BL.shape
        if length > self.positions:
            raise errors.ConfigError(
                f"captions of {length} tokens, the encoder has {self.positions} positions",
                where="config.text_length",
                fix=f"use at most {self.positions}",
            )
        kind = dict(dtype=self.dtype, embedding_init=nn.initializers.normal(0.02))
        x_BLD = nn.Embed(self.vocab, self.width, name="word", **kind)(text_BL)
        x_BLD = x_BLD + nn.Embed(self.positions, self.width, name="position", **kind)(
            jnp.arange(length)
        )
        x_BLD = x_BLD + nn.Embed(self.types, self.width, name="type", **kind)(jnp.int32(0))
        x_ND = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(
            x_BLD.reshape(b * length, self.width)
        )
        for i in range(self.depth):
            if not self.is_initializing():  # kept only where apply(…, mutable="hidden") asks
                self.sow("hidden", "states", x_ND.reshape(b, length, -1))
            layer = Layer(
                self.heads,
                self.hidden,
                self.activation,
                self.epsilon,
                self.dtype,
                name=f"layer_{i}",
            )
            x_ND = layer(x_ND, mask_BL)
        seq_BLD = x_ND.reshape(b, length, -1).astype(jnp.float32)
        return Cond(seq_BLD, mask_BL, masked_mean(seq_BLD, mask_BL))


_IGNORED_FIELDS = {  # fields that do not change what the encoder computes
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("gradient_checkpointing", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("initializer_range", "pad_token_id", "classifier_dropout", "_name_or_path", "id2label"),
    *("label2id", "bos_token_id", "eos_token_id", "directionality", "problem_type"),
    *("return_dict", "output_attentions", "output_hidden_states", "tie_word_embeddings"),
    *("chunk_size_feed_forward", "pooler_fc_size", "pooler_num_attention_heads"),
    *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
}
_FIXED_FIELDS = {  # fields of which we implement one value
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
}
_SIZES = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "positions",
    "type_vocab_size": "types",
    "hidden_act": "activation",
    "layer_norm_eps": "epsilon",
}


def from_config(config: dict, *, dtype: str = "float32") -> Bert:
    """The module that a checkpoint's config.json describes.

    Raises:
      ConfigError: a field, or a field's value, that is not implemented.
    """
    for field, value in config.items():
        known = field in _IGNORED_FIELDS or field in _SIZES
        if not known and not (field in _FIXED_FIELDS and value == _FIXED_FIELDS[field]):
            raise errors.ConfigError(
                f"BERT with {field} = {value!r} is not implemented",
                where="the checkpoint's config.json",
                fix=f"use a checkpoint with {field} = {_FIXED_FIELDS.get(field, 'unset')!r}",
            )
    if config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        raise errors.ConfigError(
            f"BERT with hidden_act = {config['hidden_act']!r} is not implemented",
            where="the checkpoint's config.json",
            fix=f"use one of {sorted(_ACTIVATIONS)}",
        )
    return Bert(
        **{ours: config[field] for field, ours in _SIZES.items() if field in config}, dtype=dtype
    )


def _kernel(*weights):
    """torch keeps (out, in); several are joined along out."""
    return np.concatenate([w.T for w in weights], 1)


def _joined(*biases):
    return np.concatenate(biases)


_LAYER = "encoder.layer.{}."
_QKV = [f"{_LAYER}attention.self.{part}" for part in ("query", "key", "value")]


def _dense(ours, theirs):
    return [
        hf.Name(f"params/{ours}/kernel", f"{theirs}.weight", _kernel),
        hf.Name(f"params/{ours}/bias", f"{theirs}.bias"),
    ]


def _norm(ours, theirs):
    return [
        hf.Name(f"params/{ours}/scale", f"{theirs}.weight"),
        hf.Name(f"params/{ours}/bias", f"{theirs}.bias"),
    ]


NAMES = hf.Names(
    prefixes=("bert.",),
    rules=[
        hf.Name("params/word/embedding", "embeddings.word_embeddings.weight"),
        hf.Name("params/position/embedding", "embeddings.position_embeddings.weight"),
        hf.Name("params/type/embedding", "embeddings.token_type_embeddings.weight"),
        *_norm("norm", "embeddings.LayerNorm"),
        hf.Name("params/layer_{}/qkv/kernel", [f"{name}.weight" for name in _QKV], _kernel),
        hf.Name("params/layer_{}/qkv/bias", [f"{name}.bias" for name in _QKV], _joined),
        *_dense("layer_{}/out", f"{_LAYER}attention.output.dense"),
        *_norm("layer_{}/norm_attention", f"{_LAYER}attention.output.LayerNorm"),
        *_dense("layer_{}/enter", f"{_LAYER}intermediate.dense"),
        *_dense("layer_{}/leave", f"{_LAYER}output.dense"),
        *_norm("layer_{}/norm_mlp", f"{_LAYER}output.LayerNorm"),
    ],
    ignored=(r"pooler\..*", r"cls\..*", r"embeddings\.position_ids"),
)
