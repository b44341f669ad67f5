"""AutoencoderKL: the autoencoder of Stable Diffusion 1 to 3 and FLUX.1 (arXiv:2112.10752).

B batch · H W pixels · h w C latents
"""

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models.types import Moments
from t2i_jax.pretrained import hf, residual, tensors

KINDS = ("AutoencoderKL",)
LOG_VARIANCE = (-30.0, 20.0)  # limits of it
_FIELDS = {
    "in_channels": "channels",
    "layers_per_block": "layers",
    "latent_channels": "latent_channels",
    "norm_num_groups": "groups",
    "scaling_factor": "scaling_factor",
}
_IMPLEMENTED = {"act_fn": "silu", "out_channels": 3, "latents_mean": None, "latents_std": None}


def names(config) -> tensors.Names:
    paths = ["quant_conv", "post_quant_conv"]
    for half, way in (("encoder", "down"), ("decoder", "up")):
        paths += [f"{half}/{x}" for x in ("conv_in", "conv_norm_out", "conv_out")]
        for block in (f"{half}/{way}_blocks_{{}}", f"{half}/mid_block"):
            paths += [f"{block}/resnets_{{}}/{part}" for part in residual.PARTS]
        paths.append(f"{half}/{way}_blocks_{{}}/{way}samplers_{{}}/conv")
        paths.append(f"{half}/mid_block/attentions_{{}}/group_norm")
    table = tensors.alike(paths)
    for half in ("encoder", "decoder"):
        attend = f"{half}.mid_block.attentions.{{}}."
        path = f"{half}/mid_block/attentions_{{}}"
        table[f"{path}/qkv"] = tuple(f"{attend}to_{x}" for x in "qkv")
        table[f"{path}/out"] = f"{attend}to_out.0"
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return tensors.Names(table, renamed=tuple((f".{a}.", f".{b}.") for a, b in older.items()))


class Block(nn.Module):
    """Residual blocks, then perhaps a change of size: the encoder's halves it, the decoder's
    doubles it.
    """

    features: int
    layers: int
    groups: int
    dtype: str
    widens: bool
    smaller: bool = False
    larger: bool = False

    def setup(self):
        block = lambda i: residual.Residual(
            *(self.features, self.groups, 1e-6, self.dtype), widens=self.widens and i == 0
        )
        self.resnets = [block(i) for i in range(self.layers)]
        if self.smaller:
            self.downsamplers = [residual.Smaller(self.features, self.dtype, residual.FAR)]
        if self.larger:
            self.upsamplers = [residual.Larger(self.features, self.dtype)]

    def __call__(self, x_BHWC):
        for block in self.resnets:
            x_BHWC = block(x_BHWC)
        if self.smaller:
            x_BHWC = self.downsamplers[0](x_BHWC)
        return self.upsamplers[0](x_BHWC) if self.larger else x_BHWC


class Middle(nn.Module):
    """Two residual blocks, and attention of all pixels between them."""

    features: int
    groups: int
    dtype: str
    attends: bool

    def setup(self):
        sizes = (self.features, self.groups, 1e-6, self.dtype)
        self.resnets = [residual.Residual(*sizes) for _ in range(2)]
        if self.attends:
            self.attentions = [residual.PixelAttention(self.groups, self.dtype)]

    def __call__(self, x_BHWC):
        x_BHWC = self.resnets[0](x_BHWC)
        x_BHWC = self.attentions[0](x_BHWC) if self.attends else x_BHWC
        return self.resnets[1](x_BHWC)


class Half(nn.Module):
    """The encoder, or the decoder, whose blocks stand in the other order."""

    blocks: tuple[int, ...]
    out: int
    layers: int
    groups: int
    attends: bool
    dtype: str
    up: bool

    def setup(self):
        order = self.blocks[::-1] if self.up else self.blocks
        middle = self.blocks[-1]
        before = (order[0], *order[:-1])
        made = [
            Block(
                *(n, self.layers + self.up, self.groups, self.dtype),
                widens=n != before[i],
                smaller=not self.up and i < len(order) - 1,
                larger=self.up and i < len(order) - 1,
            )
            for i, n in enumerate(order)
        ]
        if self.up:
            self.up_blocks = made
        else:
            self.down_blocks = made
        self.conv_in = residual.conv(order[0], self.dtype)
        self.mid_block = Middle(middle, self.groups, self.dtype, self.attends)
        self.conv_norm_out = residual.GroupNorm(self.groups)
        self.conv_out = residual.conv(self.out, self.dtype)

    def __call__(self, x_BHWC):
        x_BHWC = self.conv_in(x_BHWC)
        x_BHWC = self.mid_block(x_BHWC) if self.up else x_BHWC
        for block in self.up_blocks if self.up else self.down_blocks:
            x_BHWC = block(x_BHWC)
        x_BHWC = x_BHWC if self.up else self.mid_block(x_BHWC)
        return self.conv_out(nn.silu(self.conv_norm_out(x_BHWC)))


class AutoencoderKL(nn.Module):
    """Images to a normal for each number of the latents, and latents to images.

    dtype: of the products. Norms are float32.
    scaling_factor, shift_factor: what the latents that denoisers learn are, (latent − shift)·scale.
    """

    blocks: tuple[int, ...]
    channels: int = 3
    layers: int = 1
    latent_channels: int = 4
    groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    quant: bool = True
    post_quant: bool = True
    attends: bool = True
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """Pixels of an image's side for one of the latents'."""
        return 2 ** (len(self.blocks) - 1)

    def setup(self):
        sizes = (self.groups, self.attends, self.dtype)
        c, n = self.latent_channels, self.layers
        self.encoder = Half(self.blocks, 2 * c, n, *sizes, up=False)
        self.decoder = Half(self.blocks, self.channels, n, *sizes, up=True)
        if self.quant:
            self.quant_conv = residual.conv(2 * c, self.dtype, size=1)
        if self.post_quant:
            self.post_quant_conv = residual.conv(c, self.dtype, size=1)

    def __call__(self, image_BHWC) -> Moments:
        """The latents' means and log-variances, BhwC, for images in [-1, 1] whose sides `factor`
        divides.
        """
        h_BhwC = self.encoder(image_BHWC.astype(self.dtype))
        h_BhwC = self.quant_conv(h_BhwC) if self.quant else h_BhwC
        mean_BhwC, logvar_BhwC = jnp.split(h_BhwC.astype(jnp.float32), 2, -1)
        if self.is_initializing():
            self.decode(mean_BhwC)
        return Moments(mean_BhwC, jnp.clip(logvar_BhwC, *LOG_VARIANCE))

    def decode(self, latent_BhwC):
        """Images of latents, float32 BHWC; values may lie beyond [-1, 1]."""
        latent_BhwC = latent_BhwC.astype(self.dtype)
        if self.post_quant:
            latent_BhwC = self.post_quant_conv(latent_BhwC)
        return self.decoder(latent_BhwC).astype(jnp.float32)


def from_config(config: dict, *, dtype: fields.Dtype = "float32") -> AutoencoderKL:
    """The autoencoder that a config.json describes. Where it says `force_upcast`, as SDXL's, whose
    numbers overflow float16, it computes in float32 instead of float16.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    blocks = residual.sizes(config, "block_out_channels", (64,))
    for field, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        types = config.get(f"{field}_block_types", [kind] * len(blocks))
        if list(types) != [kind] * len(blocks):
            raise errors.ConfigError(
                f"{field}_block_types {types} is not implemented",
                where=hf.CONFIG,
                fix=f"use an autoencoder of {len(blocks)} {kind}",
            )
    sizes = hf.fields(config, AutoencoderKL, _FIELDS, _IMPLEMENTED)
    residual.check_groups(sizes["groups"], blocks)
    if config.get("force_upcast", True) and dtype == "float16":
        dtype = "float32"
    return AutoencoderKL(
        blocks,
        **sizes,
        shift_factor=float(config.get("shift_factor") or 0.0),
        quant=config.get("use_quant_conv", True),
        post_quant=config.get("use_post_quant_conv", True),
        attends=config.get("mid_block_add_attention", True),
        dtype=dtype,
    )
