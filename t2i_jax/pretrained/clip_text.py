"""CLIP's text tower (arXiv:2103.00020), of OpenAI's and OpenCLIP's converted checkpoints.

B batch · L text length · D width · P projected width
"""

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models import blocks
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import hf

_FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
    "projection_dim": "projected",
    "eos_token_id": "end",
}
MODEL_TYPES = ("clip", "clip_text_model")
FIRST_END = 2  # what config.json of the first checkpoints wrongly calls the end's number


def names(config) -> hf.Names:
    layer = "encoder.layers.{}."
    return hf.Names(
        tensors={
            "word": "embeddings.token_embedding",
            "position": "embeddings.position_embedding",
            "layer_{}/qkv": tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"),
            "layer_{}/out": f"{layer}self_attn.out_proj",
            "layer_{}/attention_norm": f"{layer}layer_norm1",
            "layer_{}/up": f"{layer}mlp.fc1",
            "layer_{}/down": f"{layer}mlp.fc2",
            "layer_{}/mlp_norm": f"{layer}layer_norm2",
            "norm": "final_layer_norm",
            "projection": "text_projection",
        },
        renamed=(("text_model.", ""),),
        ignored=("vision_model.*", "visual_projection.*", "logit_scale", "*.position_ids"),
    )


class ClipText(blocks.Causal):
    """The text tower; `dtype` computes, parameters stay float32.

    projected: width of the pooled vector's projection; 0: the checkpoint has none.
    end: the end token's number. Where it is FIRST_END, the end is the largest number in a row.
    skip: how many of the last layers the token states leave out: 0 is the last layer, normed; 1 the
      penultimate, as it is, which Stable Diffusion XL and 3 read. The pooled vector is the last's.
    """

    vocab: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_width: int = 2048
    max_length: int = 77
    epsilon: float = 1e-5
    activation: str = "quick_gelu"
    dtype: str = "float32"
    projected: int = 512
    end: int = 49407
    skip: int = 0

    @nn.compact
    def __call__(self, text_BL, mask_BL) -> Cond:
        """Token states, zero where the mask is False, and the end token's last, projected."""
        *states, last_BLD = self.states(text_BL, mask_BL)
        seq_BLD = states[-1 - self.skip] if self.skip else last_BLD
        if self.end == FIRST_END:
            end_B = jnp.argmax(jnp.where(mask_BL, text_BL, -1), axis=1)
        else:
            end_B = jnp.argmax((text_BL == self.end) & mask_BL, axis=1)
        pooled_BP = jnp.take_along_axis(last_BLD, end_B[:, None, None], axis=1)[:, 0]
        if self.projected:
            project = nn.Dense(self.projected, use_bias=False, dtype=self.dtype, name="projection")
            pooled_BP = project(pooled_BP)
        pooled_BP *= mask_BL.any(1)[:, None]  # an empty caption has no end
        return Cond(seq_BLD * mask_BL[..., None], mask_BL, pooled_BP)


def from_config(config: dict, *, dtype: str = "float32", skip: int = 0) -> ClipText:
    """The text tower that a checkpoint's config.json describes, alone or beside its image tower.

    Args:
      skip: see `ClipText`.
    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise errors.ConfigError(
            f"text_config is {text!r}", where=hf.CONFIG, fix="give an object of sizes"
        )
    if "projection_dim" in config:
        text = text | {"projection_dim": config["projection_dim"]}
    sizes = hf.fields(text, ClipText, _FIELDS)
    blocks.check(sizes)
    if not ("text_config" in config or "WithProjection" in str(config.get("architectures"))):
        sizes["projected"] = 0
    if type(skip) is not int or not 0 <= skip < sizes["depth"]:
        raise errors.ConfigError(
            f"skip is {skip}", where="config.text.clip.skip", fix=f"use 0 to {sizes['depth'] - 1}"
        )
    return ClipText(**sizes, dtype=dtype, skip=skip)
