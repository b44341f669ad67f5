"""The autoencoders of latent diffusion (arXiv:2112.10752): of Stable Diffusion, XL, 3 and Flux,
those with a codebook, and those whose latents are rounded.

B pictures · H W pixels, or places of a map · C channels · T = H·W · K codebook entries
"""

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import attention, quantise
from t2i_jax.models.types import Moments
from t2i_jax.pretrained import hf, residual, tensors

KINDS = ("AutoencoderKL", "VQModel")
# The published networks have it, though no config.json says so.
EPSILON = 1e-6
LOGVAR = (-30.0, 20.0)  # what is beyond is cut off
_FIELDS = {
    "block_out_channels": "widths",
    "layers_per_block": "depth",
    "latent_channels": "channels",
    "norm_num_groups": "groups",
    "sample_size": "res",
    "scaling_factor": "scaling_factor",
    "mid_block_add_attention": "attends",
}
_KL_FIELDS = {"use_quant_conv": "quant", "use_post_quant_conv": "post_quant"}
_VQ_FIELDS = {"num_vq_embeddings": "entries", "vq_embed_dim": "entry_channels"}
_IMPLEMENTED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_type": "group"}
_IMPLEMENTED |= {"latents_mean": None, "latents_std": None}  # moments of each channel
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def names(config) -> tensors.Names:
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    table["codebook"] = "quantize.embedding"
    for coder, way, change in (
        ("encoder", "down", "downsamplers"),
        ("decoder", "up", "upsamplers"),
    ):
        level = f"{coder}.{way}_blocks.{{}}"
        middle = f"{coder}.mid_block"
        attends = f"{middle}.attentions.0"
        table |= residual.names(f"{coder}/{way}_{{}}/resnets_{{}}", f"{level}.resnets.{{}}")
        table |= residual.names(f"{coder}/middle/resnets_{{}}", f"{middle}.resnets.{{}}")
        table |= {f"{coder}/{x}": f"{coder}.{x}" for x in ("conv_in", "conv_norm_out", "conv_out")}
        table |= {
            f"{coder}/{way}_{{}}/resample": f"{level}.{change}.0.conv",
            f"{coder}/middle/attention/norm": f"{attends}.group_norm",
            f"{coder}/middle/attention/qkv": tuple(f"{attends}.to_{x}" for x in "qkv"),
            f"{coder}/middle/attention/out": f"{attends}.to_out.0",
        }
    # Checkpoints of the first versions of diffusers call the attention's products so.
    old = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    renamed = tuple((f"attentions.0.{x}.", f"attentions.0.{y}.") for x, y in old)
    return tensors.Names(tensors=table, renamed=renamed)


class Attention(nn.Module):
    """Attention of all places of a map to each other, in one head."""

    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        b, h, w, c = x_BHWC.shape
        norm = residual.norm(self.groups, EPSILON, dtype=self.dtype, name="norm")
        # Places of all pictures as rows of one matrix: faster on CPUs, see `layers.flat`.
        y_NC = norm(x_BHWC).reshape(-1, c)
        qkv_ND = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(y_NC)
        heads = jnp.split(qkv_ND.reshape(b, h * w, 1, 3 * c), 3, axis=-1)
        y_NC = attention.attention(*heads).reshape(-1, c)
        y_NC = nn.Dense(c, dtype=self.dtype, name="out")(y_NC)
        return x_BHWC + y_NC.reshape(x_BHWC.shape)


class Middle(nn.Module):
    """What lies between encoder or decoder and the latents, at their size."""

    attends: bool
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        sizes = (x_BHWC.shape[-1], self.groups, EPSILON, self.dtype)
        x_BHWC = residual.Block(*sizes, name="resnets_0")(x_BHWC)
        if self.attends:
            x_BHWC = Attention(self.groups, self.dtype, name="attention")(x_BHWC)
        return residual.Block(*sizes, name="resnets_1")(x_BHWC)


class Level(nn.Module):
    """Residual blocks of maps of one size.   resample: then halves or doubles it, where given"""

    width: int
    depth: int
    resample: Any
    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        for i in range(self.depth):
            block = residual.Block(
                self.width, self.groups, EPSILON, self.dtype, name=f"resnets_{i}"
            )
            x_BHWC = block(x_BHWC)
        if self.resample:
            x_BHWC = self.resample(self.width, dtype=self.dtype, name="resample")(x_BHWC)
        return x_BHWC


class Coder(nn.Module):
    """An encoder or a decoder.   out: channels;   widths, depth: of each level and blocks in it"""

    out: int
    widths: tuple[int, ...]
    depth: int
    attends: bool
    groups: int
    dtype: str

    def leave(self, x_BHWC):
        """The last layers, within the compact method."""
        norm = residual.norm(self.groups, EPSILON, dtype=self.dtype, name="conv_norm_out")
        conv = residual.conv(self.out, dtype=self.dtype, name="conv_out")
        return conv(nn.silu(norm(x_BHWC)))


class Encoder(Coder):
    """Pictures -> maps."""

    @nn.compact
    def __call__(self, image_BHWC):
        parts = (self.groups, self.dtype)
        x_BHWC = residual.conv(self.widths[0], dtype=self.dtype, name="conv_in")(image_BHWC)
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            level = Level(width, self.depth, None if last else _halving, *parts, name=f"down_{i}")
            x_BHWC = level(x_BHWC)
        x_BHWC = Middle(self.attends, *parts, name="middle")(x_BHWC)
        return self.leave(x_BHWC)


class Decoder(Coder):
    """Maps -> pictures: the mirrored `Encoder`, one block more at each level."""

    @nn.compact
    def __call__(self, x_BHWC):
        parts = (self.groups, self.dtype)
        x_BHWC = residual.conv(self.widths[-1], dtype=self.dtype, name="conv_in")(x_BHWC)
        x_BHWC = Middle(self.attends, *parts, name="middle")(x_BHWC)
        for i, width in enumerate(reversed(self.widths)):
            last = i == len(self.widths) - 1
            resample = None if last else residual.doubling
            x_BHWC = Level(width, self.depth + 1, resample, *parts, name=f"up_{i}")(x_BHWC)
        return self.leave(x_BHWC)


def _halving(width: int, **options):
    # The one row and column of padding stand below and to the right alone.
    return residual.halving(width, ((0, 1), (0, 1)), **options)


class Autoencoder(nn.Module):
    """Pictures to the moments of their latents and back; `dtype` computes, parameters stay float32.

    widths: of the levels, each with half the side of the one before.
    depth: residual blocks of a level; the decoder's have one more.
    channels: of the latents.
    groups: of the norms.
    res: side of the pictures it learned from.
    scaling_factor, shift_factor: denoisers see (latent − shift_factor)·scaling_factor. The latents
      here are those before.
    attends: whether the smallest maps attend to themselves.
    quant, post_quant: whether a 1 × 1 convolution stands behind the encoder, before the decoder.
    """

    widths: Annotated[tuple[int, ...], fields.at_least(1)] = (64,)
    depth: fields.Size = 1
    channels: fields.Size = 4
    groups: fields.Size = 32
    res: fields.Size = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    attends: bool = True
    quant: bool = True
    post_quant: bool = True
    dtype: fields.Dtype = "float32"

    @property
    def factor(self) -> int:
        """Pixels to a place of the latents, along either side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def latent_channels(self) -> int:
        return self.channels

    @property
    def num_codes(self) -> int:
        """How many codes a place has; 0 where latents are numbers."""
        return 0

    @property
    def tile(self) -> int:
        """Side of the tiles that large latents are decoded in, see `sampling.tiles`."""
        # Tiles of one place could not overlap: they would step by 0.
        return max(self.res // self.factor, 2)

    @property
    def encoded(self) -> int:
        """Channels behind the encoder."""
        return 2 * self.channels

    @property
    def quantised(self) -> int:
        """Channels behind its 1 × 1 convolution."""
        return 2 * self.channels

    def setup(self):
        sizes = (self.widths, self.depth, self.attends, self.groups, self.dtype)
        self.encoder = Encoder(self.encoded, *sizes)
        self.decoder = Decoder(3, *sizes)
        if self.quant:
            self.quant_conv = nn.Conv(self.quantised, (1, 1), dtype=self.dtype)
        if self.post_quant:
            self.post_quant_conv = nn.Conv(self.channels, (1, 1), dtype=self.dtype)

    def _encode(self, image_BHWC):
        x_BHWC = self.encoder(image_BHWC)
        x_BHWC = self.quant_conv(x_BHWC) if self.quant else x_BHWC
        x_BHWC = x_BHWC.astype(jnp.float32)
        if self.is_initializing():  # so that `init` makes the decoder's parameters, too
            self.decode(x_BHWC[..., : self.latent_channels])
        return x_BHWC

    def __call__(self, image_BHWC) -> Moments:
        """The normal of the latents, float32, of pictures in [-1, 1]."""
        mean_BHWC, logvar_BHWC = jnp.split(self._encode(image_BHWC), 2, axis=-1)
        return Moments(mean_BHWC, jnp.clip(logvar_BHWC, *LOGVAR))

    def decode(self, latent_BHWC):
        """Pictures, float32, about in [-1, 1]: nothing is cut off."""
        x_BHWC = self.post_quant_conv(latent_BHWC) if self.post_quant else latent_BHWC
        return self.decoder(x_BHWC).astype(jnp.float32)


class Discrete(Autoencoder):
    """An autoencoder whose places are one of `num_codes` codes each. Its latents are those before
    they are quantised, which `decode` does.
    """

    @property
    def encoded(self) -> int:
        return self.channels

    @property
    def quantised(self) -> int:
        return self.latent_channels

    def __call__(self, image_BHWC) -> Moments:
        """The latents of pictures in [-1, 1], float32, as `mean_BHWC`."""
        return Moments(self._encode(image_BHWC))

    def decode(self, latent_BHWC):
        """Pictures of the nearest codes, float32, about in [-1, 1].

        The gradient goes past the choice of codes, as if the latents had been theirs.
        """
        latent_BHWC = latent_BHWC.astype(jnp.float32)
        nearest_BHWC = self.quantise(latent_BHWC)
        return super().decode(quantise.straight_through(latent_BHWC, nearest_BHWC))

    def quantise(self, latent_BHWC):
        """The values of the nearest codes.   -> float32 BHWC"""
        return self.values(self.nearest(latent_BHWC))

    def codes(self, image_BHWC):
        """The codes of pictures in [-1, 1].   -> int32 BHW, 0 … num_codes − 1"""
        return self.nearest(self(image_BHWC).mean_BHWC)

    def of_codes(self, code_BHW):
        """The pictures of codes, float32, about in [-1, 1].   -> image_BHWC"""
        return super().decode(self.values(code_BHW))


class Quantised(Discrete):
    """An autoencoder with a codebook (arXiv:2012.09841).

    entries: of the codebook.
    entry_channels: of an entry, and of the latents.
    """

    entries: fields.Size = 256
    entry_channels: fields.Size = 4

    @property
    def latent_channels(self) -> int:
        return self.entry_channels

    @property
    def num_codes(self) -> int:
        return self.entries

    def setup(self):
        super().setup()
        self.codebook = nn.Embed(self.entries, self.latent_channels)

    def nearest(self, latent_BHWC):
        """The codes of the nearest entries.   -> int32 BHW"""
        # Distances of half precision would choose other entries.
        entry_KC = jnp.asarray(self.codebook.embedding, jnp.float32)
        latent_NC = latent_BHWC.reshape(-1, self.latent_channels)
        nearest_N = jnp.argmin(quantise.distances(latent_NC, entry_KC), axis=-1)
        return nearest_N.reshape(latent_BHWC.shape[:-1]).astype(jnp.int32)

    def values(self, code_BHW):
        """The entries of codes.   -> float32 BHWC"""
        return jnp.asarray(self.codebook.embedding, jnp.float32)[code_BHW]


class FiniteScalar(Discrete):
    """An autoencoder whose latents' channels are rounded to levels; it needs no codebook (finite
    scalar quantisation, arXiv:2309.15505).

    levels: of each channel of the latents, which lie between −1 and 1.
    """

    levels: Annotated[tuple[int, ...], fields.at_least(2)] = (8, 5, 5, 5)

    @property
    def latent_channels(self) -> int:
        return len(self.levels)

    @property
    def num_codes(self) -> int:
        return quantise.count(self.levels)

    def __call__(self, image_BHWC) -> Moments:
        """The latents of pictures in [-1, 1], float32, between −1 and 1, as `mean_BHWC`."""
        return Moments(jnp.tanh(self._encode(image_BHWC)))

    def nearest(self, latent_BHWC):
        """The codes of the nearest levels.   -> int32 BHW"""
        return quantise.number_of(quantise.digits(latent_BHWC, self.levels), self.levels)

    def values(self, code_BHW):
        """The values of codes' levels.   -> float32 BHWC"""
        return quantise.value_of(quantise.digits_of(code_BHW, self.levels), self.levels)


def to_config(net: Autoencoder) -> dict:
    """The config.json by which diffusers opens a network, and `from_config` here.

    Raises:
      ConfigError: diffusers has no network of this kind.
    """
    kind, fields_of = _kind(net)
    config = {theirs: getattr(net, ours) for theirs, ours in fields_of.items()}
    levels = len(net.widths)
    config |= {field: [block] * levels for field, block in _BLOCKS.items()}
    config |= {k: v for k, v in _IMPLEMENTED.items() if k != "norm_type" and v is not None}
    if kind == "AutoencoderKL":  # the other has no such field
        config["shift_factor"] = net.shift_factor
    return {"_class_name": kind, **config, "force_upcast": False}


def _kind(net) -> tuple[str, dict[str, str]]:
    """Of a network, diffusers' class, and the class' fields -> ours."""
    if type(net) is Autoencoder:
        return "AutoencoderKL", _FIELDS | _KL_FIELDS
    if type(net) is Quantised and net.quant and net.post_quant and not net.shift_factor:
        return "VQModel", _FIELDS | _VQ_FIELDS
    raise errors.ConfigError(
        "diffusers has no autoencoder with such latents",
        where="config.model.autoencoder",
        fix="train kind kl, or kind vq with both 1 × 1 convolutions and shift_factor 0",
    )


def from_config(config: dict, *, dtype: fields.Dtype = "float32") -> Autoencoder | Quantised:
    """The autoencoder that a checkpoint's config.json describes.

    Args:
      dtype: what it computes in. Where config.json says `force_upcast` it is float32 in any case,
        since activations of such a checkpoint overflow in half precision.
    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    # A null stands for the default, as a missing field does.
    config = {field: value for field, value in config.items() if value is not None}
    if config["model_type"] == "VQModel":
        config = {"latent_channels": 3} | config  # by default, and an entry has as many
        config = {"vq_embed_dim": config["latent_channels"]} | config
        sizes = hf.fields(config, Quantised, _FIELDS | _VQ_FIELDS, _IMPLEMENTED)
    else:
        sizes = hf.fields(config, Autoencoder, _FIELDS | _KL_FIELDS, _IMPLEMENTED)
    for field, block in _BLOCKS.items():
        wanted = [block] * len(sizes["widths"])
        given = config.get(field, wanted)
        if not isinstance(given, list | tuple) or list(given) != wanted:
            raise errors.misfit(
                f"{field} {config[field]!r:.100} is not implemented",
                f"use a checkpoint with one {block} for each of block_out_channels",
            )
    if uneven := [width for width in sizes["widths"] if width % sizes["groups"]]:
        raise errors.misfit(
            f"block_out_channels of {uneven} do not divide by norm_num_groups {sizes['groups']}"
        )
    shift = fields.checked(float, "shift_factor", config.get("shift_factor", 0.0), where=hf.CONFIG)
    dtype = "float32" if hf.flag(config, "force_upcast", False) else dtype
    kind = Quantised if config["model_type"] == "VQModel" else Autoencoder
    return kind(**sizes, shift_factor=shift, dtype=dtype)
