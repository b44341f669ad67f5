"""CLIP's two towers (arXiv:2103.00020), of OpenAI's and OpenCLIP's converted checkpoints.

B captions or pictures · H W pixels, or patches of a grid · C channels · L text length, or
1 + H·W tokens of a picture · D width · P projected width
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks
from t2i_jax.models.types import Cond, Features
from t2i_jax.pretrained import hf, tensors, vit

KINDS = ("clip", "clip_text_model", "clip_vision_model")
_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
    "projection_dim": "projected",
}
_TEXT_FIELDS = {
    **_FIELDS,
    "vocab_size": "vocab",
    "max_position_embeddings": "max_length",
    "eos_token_id": "end",
}
_IMAGE_FIELDS = {**_FIELDS, "image_size": "res", "patch_size": "patch"}
FIRST_END = 2  # what config.json of the first checkpoints wrongly calls the end's number
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that OpenAI's learned from
STD = (0.26862954, 0.26130258, 0.27577711)


def towers(config: dict) -> dict[type, dict]:
    """What a tower gives, a condition or features -> its config; of a checkpoint of both, two.

    Raises:
      ConfigError: what should describe a tower is no object.
    """
    if config["model_type"] != "clip":
        return {Cond if config["model_type"] == "clip_text_model" else Features: config}
    configs = {}
    for gives, name in ((Cond, "text"), (Features, "vision")):
        own = config.get(f"{name}_config", config)
        if not isinstance(own, dict):
            raise errors.misfit(f"{name}_config is {own!r}", "give an object of sizes")
        # What the checkpoint says as a whole holds for either tower.
        shared = ("architectures", "projection_dim", "preprocessor")
        configs[gives] = own | {key: config[key] for key in shared if key in config}
        configs[gives] |= {"model_type": f"clip_{name}_model", "alone": own is config}
    return configs


def names(config) -> tensors.Names:
    layer = "encoder.layers.{}."
    both = {
        "position": "embeddings.position_embedding",
        "layer_{}/qkv": tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"),
        "layer_{}/out": f"{layer}self_attn.out_proj",
        "layer_{}/attention_norm": f"{layer}layer_norm1",
        "layer_{}/up": f"{layer}mlp.fc1",
        "layer_{}/down": f"{layer}mlp.fc2",
        "layer_{}/mlp_norm": f"{layer}layer_norm2",
    }
    if config["model_type"] == "clip_text_model":
        return tensors.Names(
            tensors=both
            | {
                "word": "embeddings.token_embedding",
                "norm": "final_layer_norm",
                "projection": "text_projection",
            },
            renamed=(("text_model.", ""),),
            ignored=("vision_model.*", "visual_projection.*", "logit_scale", "*.position_ids"),
        )
    return tensors.Names(
        tensors=both
        | {
            "class_token": "embeddings.class_embedding",
            "patches": "embeddings.patch_embedding",
            "pre_norm": "pre_layrnorm",  # theirs
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
        # The first place counts: padding often has the end's number, too, and is not always masked.
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


def from_config(
    config: dict, *, dtype: fields.Dtype = "float32", skip: Annotated[int, fields.at_least(0)] = 0
) -> ClipText | ClipImage:
    """The tower that a config.json describes, or one of `towers`.

    Args:
      skip: see `ClipText`.
    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    saved_as = str(config.get("architectures"))
    # A tower that was saved alone has a projection only if its class says so.
    projects = not config.get("alone", True) or "WithProjection" in saved_as
    if config["model_type"] == "clip_text_model":
        sizes = hf.fields(config, ClipText, _TEXT_FIELDS)
        blocks.check(sizes)
        if skip >= sizes["depth"]:
            raise errors.ConfigError(
                f"skip is {skip}",
                where="config.text.clip.skip",
                fix=f"use 0 to {sizes['depth'] - 1}",
            )
        if not projects:
            sizes["projected"] = 0
        return ClipText(**sizes, dtype=dtype, skip=skip)
    sizes = hf.fields(config, ClipImage, _IMAGE_FIELDS, {"num_channels": 3})
    blocks.check(sizes)
    vit.check_patches(sizes, sizes["res"])
    if not projects or "ForImageClassification" in saved_as:
        sizes["projected"] = 0
    return ClipImage(**sizes, **vit.statistics(config, MEAN, STD), dtype=dtype)
