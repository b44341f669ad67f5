"""DINOv2 (arXiv:2304.07193), and with registers (arXiv:2309.16588).

B pictures · H W pixels, or patches of a grid · C channels · R registers · L = 1 + R + H·W tokens ·
D width
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks
from t2i_jax.models.types import Features
from t2i_jax.pretrained import hf, tensors, vit

_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "image_size": "learned",
    "patch_size": "patch",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
}
_REGISTERS = {"num_register_tokens": 4, "patch_size": 16}  # where the config lacks them
KINDS = ("dinov2", "dinov2_with_registers")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def names(config) -> tensors.Names:
    layer = "encoder.layer.{}."
    up, down = ("weights_in", "weights_out") if config.get("use_swiglu_ffn") else ("fc1", "fc2")
    return tensors.Names(
        tensors={
            "class_token": "embeddings.cls_token",
            "register_tokens": "embeddings.register_tokens",
            "patches": "embeddings.patch_embeddings.projection",
            "position": "embeddings.position_embeddings",
            "layer_{}/qkv": tuple(
                f"{layer}attention.attention.{x}" for x in ("query", "key", "value")
            ),
            "layer_{}/out": f"{layer}attention.output.dense",
            "layer_{}/attention_norm": f"{layer}norm1",
            "layer_{}/attention_scale": f"{layer}layer_scale1.lambda1",
            "layer_{}/up": f"{layer}mlp.{up}",
            "layer_{}/down": f"{layer}mlp.{down}",
            "layer_{}/mlp_norm": f"{layer}norm2",
            "layer_{}/mlp_scale": f"{layer}layer_scale2.lambda1",
            "norm": "layernorm",
        },
        prefixes=("dinov2.", "dinov2_with_registers."),
        # The mask token hides patches in pretraining alone.
        ignored=("embeddings.mask_token", "classifier.*"),
    )


class Dino(nn.Module):
    """The image network; `dtype` computes, parameters stay float32.

    res: side of the pictures it is meant for; it also reads any whole number of patches.
    learned: side of those that its position embeddings belong to; they are interpolated for others,
      antialiased where there are registers. What is beyond the last whole patch is not read.
    gated: SwiGLU in place of the activation, in a narrower MLP.
    registers: how many tokens stand for nothing, after the class token.
    mean, std: of RGB in [0, 1], taken off and divided by.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    learned: int = 224
    patch: int = 14
    epsilon: float = 1e-6
    activation: str = "gelu"
    gated: bool = False
    registers: int = 0
    res: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    dtype: str = "float32"

    @property
    def mlp_width(self) -> int:
        """Of a gated MLP two thirds, made a multiple of 8."""
        whole = self.width * self.mlp_ratio
        return 8 * math.ceil(whole * 2 // 3 / 8) if self.gated else whole

    def setup(self):
        side = (self.patch, self.patch)
        self.patches = nn.Conv(self.width, side, strides=side, padding="VALID", dtype=self.dtype)
        self.class_token = blocks.Value((1, 1, self.width))
        self.position = blocks.Value((1, 1 + (self.learned // self.patch) ** 2, self.width))
        if self.registers:
            self.register_tokens = blocks.Value((1, self.registers, self.width))
        sizes = (self.heads, self.mlp_width, self.epsilon, self.activation, self.dtype)
        kind = dict(normed="before", gated=self.gated, scaled=True)
        self.layer = [blocks.Layer(*sizes, **kind) for _ in range(self.depth)]
        self.norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False)

    def states(self, image_BHWC) -> list[jax.Array]:
        """BLD before the layers and after each, not normed but for one more: the last's, normed."""
        # `res` may be no multiple of a patch, where it is the side that the positions belong to.
        if image_BHWC.shape[1:] != (self.res, self.res, 3):
            vit.check_side(image_BHWC, self.patch)
        x_BHWD = self.patches(vit.normalise(image_BHWC, self.mean, self.std))
        position_1LD, learned = self.position(), self.learned // self.patch
        grid_IID = position_1LD[0, 1:].reshape(learned, learned, self.width)
        x_BHWD += vit.resized(grid_IID, x_BHWD.shape[1:3], antialias=self.registers > 0).astype(
            x_BHWD.dtype
        )
        first = [self.class_token() + position_1LD[:, :1]]
        first += [self.register_tokens()] if self.registers else []  # these have no place
        first_1RD = jnp.concatenate(first, axis=1).astype(x_BHWD.dtype)
        first_BRD = jnp.broadcast_to(first_1RD, (len(x_BHWD), *first_1RD.shape[1:]))
        x_BLD = x_BHWD.reshape(len(x_BHWD), -1, self.width)
        found = vit.states(self.layer, jnp.concatenate([first_BRD, x_BLD], axis=1))
        return [*found, self.norm(found[-1])]

    def __call__(self, image_BHWC) -> Features:
        """Features of pictures in [-1, 1].

        pooled_BD: the class token, normed; the Fréchet distance of arXiv:2306.04675 is of it.
        maps: the grid of patches, normed.
        """
        last_BLD = self.states(image_BHWC)[-1]
        height, width = (n // self.patch for n in image_BHWC.shape[1:3])
        grid_BHWD = last_BLD[:, 1 + self.registers :].reshape(-1, height, width, self.width)
        return Features(last_BLD[:, 0], maps=(grid_BHWD,))


def from_config(config: dict, *, dtype: fields.Dtype = "float32", res: int | None = None) -> Dino:
    """The network that a checkpoint's config.json describes.

    Args:
      res: see `Dino`; without, the preprocessor's crop, or the side that positions belong to.
    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    named = dict(_FIELDS)
    if config["model_type"] == "dinov2_with_registers":
        config = _REGISTERS | config
        named["num_register_tokens"] = "registers"
    sizes = hf.fields(config, Dino, named, {"num_channels": 3, "qkv_bias": True})
    sizes["gated"] = hf.flag(config, "use_swiglu_ffn", False)
    if sizes["gated"]:
        sizes["activation"] = "silu"  # whatever hidden_act says
    blocks.check(sizes)
    vit.check_patches(sizes, sizes["learned"])
    crop = config.get("preprocessor", {}).get("crop_size", sizes["learned"])
    # Older preprocessors write one number, newer ones height and width.
    crop = crop.get("height") if isinstance(crop, dict) else crop
    sizes["res"] = crop if res is None else res
    whole = sizes["res"] == sizes["learned"] or (
        type(sizes["res"]) is int
        and 0 < sizes["res"] <= hf.LARGEST["res"]
        and not sizes["res"] % sizes["patch"]
    )
    if not whole:
        raise errors.ConfigError(
            f"res is {sizes['res']!r}",
            where="pretrained.dino",
            fix=f"give a multiple of the {sizes['patch']} pixels of a patch",
        )
    return Dino(**sizes, **vit.statistics(config, MEAN, STD), dtype=dtype)
