"""Encoders of T5 (arXiv:1910.10683), T5 1.1 and Flan, mT5 (2010.11934) and UMT5 (2304.09151).

B batch · L text length · N = B·L tokens · D width · H head width · K heads
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, fields
from t2i_jax.models import attention, blocks
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import hf, tensors
from t2i_jax.text import condition

_FIELDS = {
    "vocab_size": "vocab",
    "d_model": "width",
    "num_layers": "depth",
    "num_heads": "heads",
    "d_kv": "head_width",
    "d_ff": "mlp_width",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "epsilon",
}
KINDS = ("t5", "mt5", "umt5")
_MT5 = {  # where the config lacks them
    **{"vocab_size": 250112, "num_layers": 8, "num_heads": 6, "d_ff": 1024},
    "feed_forward_proj": "gated-gelu",
}
PROJECTIONS = {
    "relu": (False, "relu"),
    # transformers reads this name as the tanh form, and so T5 1.1 learned.
    "gated-gelu": (True, "gelu_new"),
    "gated-silu": (True, "silu"),
}


def names(config) -> tensors.Names:
    block = "encoder.block.{}.layer."
    gated, _ = PROJECTIONS[_complete(config).get("feed_forward_proj", "relu")]
    bias = "SelfAttention.relative_attention_bias"
    return tensors.Names(
        tensors={
            "word": "encoder.embed_tokens",
            # The file has the table that all layers share in the first one.
            "bias/table": f"encoder.block.0.layer.0.{bias}",
            "layer_bias_{}/table": f"{block}0.{bias}",
            "layer_{}/qkv": tuple(f"{block}0.SelfAttention.{x}" for x in "qkv"),
            "layer_{}/out": f"{block}0.SelfAttention.o",
            "layer_{}/attention_norm": f"{block}0.layer_norm",
            "layer_{}/gate": f"{block}1.DenseReluDense.wi_0",
            "layer_{}/up": f"{block}1.DenseReluDense.{'wi_1' if gated else 'wi'}",
            "layer_{}/down": f"{block}1.DenseReluDense.wo",
            "layer_{}/mlp_norm": f"{block}1.layer_norm",
            "norm": "encoder.final_layer_norm",
        },
        prefixes=("transformer.",),
        tied=(("encoder.embed_tokens.weight", "shared.weight"),),
        ignored=("shared.weight", "decoder.*", "lm_head.*", "qa_outputs.*"),
    )


class Bias(nn.Module):
    """What a head adds to the score of two tokens by their distance (T5, section 2.1).   -> KLL"""

    heads: int
    buckets: int
    max_distance: int

    @nn.compact
    def __call__(self, length: int):
        place = np.arange(length)
        bucket_LL = _bucket(place[None] - place[:, None], self.buckets, self.max_distance)
        return nn.Embed(self.buckets, self.heads, name="table")(bucket_LL).transpose(2, 0, 1)


class Layer(nn.Module):
    """Attention and MLP, each on normed input, on flattened tokens; no bias in any product."""

    heads: int
    head_width: int
    mlp_width: int
    epsilon: float
    gated: bool
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, x_ND, mask_BL, bias_KLL):
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.RMSNorm, self.epsilon, dtype=self.dtype)
        h_ND = norm(name="attention_norm")(x_ND)
        qkv = dense(3 * self.heads * self.head_width, name="qkv")(h_ND)
        qkv = qkv.reshape(*mask_BL.shape, 3, self.heads, self.head_width)
        q_BLKH, k_BLKH, v_BLKH = (qkv[:, :, i] for i in range(3))
        # T5 does not divide by √H: its initial weights make up for it.
        seen_BLKH = attention.attention(
            q_BLKH, k_BLKH, v_BLKH, mask_BS=mask_BL, bias_NTS=bias_KLL, scale=1.0
        )
        out_ND = dense(x_ND.shape[-1], name="out")(seen_BLKH.reshape(x_ND.shape[0], -1))
        x_ND = x_ND + out_ND
        h_ND = norm(name="mlp_norm")(x_ND)
        up_NM = dense(self.mlp_width, name="up")(h_ND)
        act = blocks.ACTIVATIONS[self.activation]
        if self.gated:
            up_NM = act(dense(self.mlp_width, name="gate")(h_ND)) * up_NM
        else:
            up_NM = act(up_NM)
        return x_ND + dense(x_ND.shape[-1], name="down")(up_NM)


class T5(nn.Module):
    """The encoder half; `dtype` computes, parameters stay float32.

    own_bias: every layer has its own table of distances (UMT5), instead of one for all.
    """

    vocab: int = 32128
    width: int = 512
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    mlp_width: int = 2048
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    gated: bool = False
    activation: str = "relu"
    own_bias: bool = False
    dtype: str = "float32"

    @nn.compact
    def states(self, text_BL, mask_BL) -> list[jax.Array]:
        """BLD after the embeddings and after every layer, the last one normed."""
        bias = functools.partial(Bias, self.heads, self.buckets, self.max_distance)
        length = text_BL.shape[1]
        shared_KLL = None if self.own_bias else bias(name="bias")(length)
        x_BLD = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="word")(text_BL)
        states = [x_BLD.reshape(-1, self.width)]
        sizes = (self.heads, self.head_width, self.mlp_width, self.epsilon)
        for i in range(self.depth):
            bias_KLL = bias(name=f"layer_bias_{i}")(length) if self.own_bias else shared_KLL
            layer = Layer(*sizes, self.gated, self.activation, self.dtype, name=f"layer_{i}")
            states.append(layer(states[-1], mask_BL, bias_KLL))
        states[-1] = nn.RMSNorm(self.epsilon, dtype=self.dtype, name="norm")(states[-1])
        return [x_ND.reshape(x_BLD.shape) for x_ND in states]

    def __call__(self, text_BL, mask_BL) -> Cond:
        """The last layer's states, zero where the mask is False, and their mean."""
        return condition.of_states(self.states(text_BL, mask_BL)[-1], mask_BL)


def from_config(config: dict, *, dtype: fields.Dtype = "float32") -> T5:
    """The encoder that a checkpoint's config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    config = _complete(config)
    projection = config.get("feed_forward_proj", "relu")
    errors.check_known("feed_forward_proj", projection, PROJECTIONS, where=hf.CONFIG)
    gated, activation = PROJECTIONS[projection]
    own_bias = config["model_type"] == "umt5"
    sizes = hf.fields(config, T5, _FIELDS)
    # `_bucket` divides by buckets // 4 and by the logarithm of max_distance over it.
    if sizes["buckets"] < 4 or sizes["max_distance"] <= sizes["buckets"] // 4:
        raise errors.misfit(
            f"{sizes['buckets']} buckets for distances up to {sizes['max_distance']}",
            "it should be like 32 and 128",
        )
    return T5(**sizes, gated=gated, activation=activation, own_bias=own_bias, dtype=dtype)


def _complete(config):
    return config if config["model_type"] == "t5" else _MT5 | config


def _bucket(offset_LL, buckets: int, max_distance: int):
    """Number of the bucket for key place − query place: half of them for either direction, half of
    these for single distances, the others in logarithmic steps up to max_distance.
    """
    half = buckets // 2
    exact, far = half // 2, np.abs(offset_LL)
    # np.where computes both sides: the maximum keeps the logarithm finite where it is not taken.
    steps = np.log(np.maximum(far, 1) / exact) / math.log(max_distance / exact) * (half - exact)
    large = np.minimum(exact + steps.astype(np.int32), half - 1)
    return jnp.asarray(np.where(far < exact, far, large) + half * (offset_LL > 0), jnp.int32)
