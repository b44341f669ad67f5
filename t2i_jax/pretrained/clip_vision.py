"""CLIP's image tower (arXiv:2103.00020), of OpenAI's and OpenCLIP's converted checkpoints.

B pictures · H W pixels, or patches of a grid · C channels · L = 1 + H·W tokens · D width · P
projected width
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks
from t2i_jax.models.types import Features
from t2i_jax.pretrained import hf, vit

_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "image_size": "res",
    "patch_size": "patch",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
    "projection_dim": "projected",
}
MODEL_TYPES = ("clip", "clip_vision_model")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that OpenAI's learned from
STD = (0.26862954, 0.26130258, 0.27577711)


def names(config) -> hf.Names:
    layer = "encoder.layers.{}."
    return hf.Names(
        tensors={
            "class_token": "embeddings.class_embedding",
            "patches": "embeddings.patch_embedding",
            "position": "embeddings.position_embedding",
            "pre_norm": "pre_layrnorm",  # theirs
            "layer_{}/qkv": tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"),
            "layer_{}/out": f"{layer}self_attn.out_proj",
            "layer_{}/attention_norm": f"{layer}layer_norm1",
            "layer_{}/up": f"{layer}mlp.fc1",
            "layer_{}/down": f"{layer}mlp.fc2",
            "layer_{}/mlp_norm": f"{layer}layer_norm2",
            "norm": "post_layernorm",
            "projection": "visual_projection",
            "logit_scale": "logit_scale",  # of `models.clip.Image`
        },
        renamed=(("vision_model.", ""),),
        ignored=(
            *("text_model.*", "text_projection.*", "logit_scale", "*.position_ids"),
            "classifier.*",
        ),
    )


class ClipImage(nn.Module):
    """The image tower; `dtype` computes, parameters stay float32.

    res: side of the pictures it reads.
    projected: width of the embedding that texts share; 0: the checkpoint has none.
    mean, std: of RGB in [0, 1], taken off and divided by.
    """

    width: fields.Size = 768
    depth: fields.Size = 12
    heads: fields.Size = 12
    mlp_width: fields.Size = 3072
    res: fields.Size = 224
    patch: fields.Size = 32
    epsilon: float = 1e-5
    activation: str = "quick_gelu"
    projected: fields.Size = 512
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    dtype: str = "float32"

    def setup(self):
        side = (self.patch, self.patch)
        norm = lambda: nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False)
        self.patches = nn.Conv(
            self.width, side, strides=side, padding="VALID", use_bias=False, dtype=self.dtype
        )
        self.class_token = blocks.Value((self.width,))
        self.position = nn.Embed(1 + (self.res // self.patch) ** 2, self.width, dtype=self.dtype)
        self.pre_norm, self.norm = norm(), norm()
        sizes = (self.heads, self.mlp_width, self.epsilon, self.activation, self.dtype)
        self.layer = [blocks.Layer(*sizes, normed="before") for _ in range(self.depth)]
        if self.projected:
            self.projection = nn.Dense(self.projected, use_bias=False, dtype=self.dtype)

    def states(self, image_BHWC) -> list[jax.Array]:
        """BLD before the layers and after each, the class token first; only the first is normed."""
        vit.check_side(image_BHWC, self.patch, self.res)
        x_BHWD = self.patches(vit.normalise(image_BHWC, self.mean, self.std))
        x_BLD = x_BHWD.reshape(len(x_BHWD), -1, self.width)
        class_B1D = jnp.broadcast_to(self.class_token().astype(x_BLD.dtype), x_BLD[:, :1].shape)
        x_BLD = jnp.concatenate([class_B1D, x_BLD], axis=1)
        x_BLD += self.position(jnp.arange(x_BLD.shape[1]))
        return vit.states(self.layer, self.pre_norm(x_BLD))

    def __call__(self, image_BHWC) -> Features:
        """Features of pictures in [-1, 1] of `res` pixels a side.

        pooled_BP: the class token, normed and projected to where texts are, of any length: divide
          by it for cosines. Without a projection the normed token, BD.
        maps: the grid of patches after the last layer, as it is.
        """
        last_BLD = self.states(image_BHWC)[-1]
        pooled_BP = self.norm(last_BLD[:, 0])
        if self.projected:
            pooled_BP = self.projection(pooled_BP)
        side = self.res // self.patch
        grid_BHWD = last_BLD[:, 1:].reshape(-1, side, side, self.width)
        return Features(pooled_BP, maps=(grid_BHWD,))


def from_config(config: dict, *, dtype: str = "float32") -> ClipImage:
    """The image tower that a checkpoint's config.json describes, alone or beside its text tower.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    image = config.get("vision_config", config)
    if not isinstance(image, dict):
        raise errors.ConfigError(
            f"vision_config is {image!r}", where=hf.CONFIG, fix="give an object of sizes"
        )
    if "projection_dim" in config:
        image = image | {"projection_dim": config["projection_dim"]}
    sizes = hf.fields(image, ClipImage, _FIELDS, {"num_channels": 3})
    blocks.check(sizes)
    vit.check_patches(sizes, sizes["res"])
    saved_as = str(config.get("architectures"))
    both = "vision_config" in config and "ForImageClassification" not in saved_as
    if not (both or "WithProjection" in saved_as):
        sizes["projected"] = 0
    return ClipImage(**sizes, **vit.statistics(config, MEAN, STD), dtype=dtype)


def logit_scale(source: str) -> float:
    """By what cosines of pictures and texts are multiplied for the logits of a checkpoint of both
    towers, 1/temperature: about 100 once it has learned.

    Raises:
      DataError: a checkpoint without it.
    """
    return math.exp(hf.number(hf.locate(source), "logit_scale"))
