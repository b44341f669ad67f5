"""The small autoencoder that previews are drawn with: TAESD, of Stable Diffusion, XL, 3 and Flux.

B pictures · H W pixels, or places of a map · C channels
"""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models.types import Moments
from t2i_jax.pretrained import hf, residual, tensors

KINDS = ("AutoencoderTiny",)
TILE = 512  # pixels of a side
BOUND = 3.0  # of the latents that its decoder reads: others are bent towards it
_FIELDS = {
    "encoder_block_out_channels": "encoder_widths",
    "decoder_block_out_channels": "decoder_widths",
    "num_encoder_blocks": "encoder_depths",
    "num_decoder_blocks": "decoder_depths",
    "latent_channels": "latent_channels",
    "scaling_factor": "scaling_factor",
}
_IMPLEMENTED = {"in_channels": 3, "out_channels": 3, "act_fn": "relu", "upsample_fn": "nearest"}
_IMPLEMENTED |= {"upsampling_scaling_factor": 2}


def names(config) -> tensors.Names:
    table = {}
    for coder in ("encoder", "decoder"):
        table[f"{coder}/layers_{{}}"] = f"{coder}.layers.{{}}"
        table[f"{coder}/layers_{{}}/conv_{{}}"] = f"{coder}.layers.{{}}.conv.{{}}"
    return tensors.Names(tensors=table)


class Block(nn.Module):
    """Three convolutions beside a skip."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC):
        conv = lambda i: residual.conv(self.width, dtype=self.dtype, name=f"conv_{i}")
        y_BHWC = nn.relu(conv(0)(x_BHWC))  # torch numbers the activations, too
        y_BHWC = conv(4)(nn.relu(conv(2)(y_BHWC)))
        return nn.relu(x_BHWC + y_BHWC)


class Coder(nn.Module):
    """An encoder or a decoder.   out: channels;   widths, depths: of the levels"""

    out: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    dtype: str


class Encoder(Coder):
    """Pictures in [0, 1] -> latents."""

    @nn.compact
    def __call__(self, x_BHWC):
        at, dtype = itertools.count(), self.dtype
        name = lambda: f"layers_{next(at)}"
        x_BHWC = residual.conv(self.widths[0], dtype=dtype, name=name())(x_BHWC)
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if i:
                # "SAME" would pad even sides below and to the right alone.
                half = dict(padding=((1, 1), (1, 1)), use_bias=False, dtype=dtype)
                x_BHWC = residual.halving(width, **half, name=name())(x_BHWC)
            for _ in range(depth):
                x_BHWC = Block(width, dtype, name=name())(x_BHWC)
        return residual.conv(self.out, dtype=dtype, name=name())(x_BHWC)


class Decoder(Coder):
    """Latents -> pictures in [0, 1]."""

    @nn.compact
    def __call__(self, x_BHWC):
        at, dtype = itertools.count(), self.dtype
        name = lambda: f"layers_{next(at)}"
        x_BHWC = nn.relu(residual.conv(self.widths[0], dtype=dtype, name=name())(x_BHWC))
        next(at)  # torch numbers the activation, and below the doubling before a convolution
        last = len(self.widths) - 1
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for _ in range(depth):
                x_BHWC = Block(width, dtype, name=name())(x_BHWC)
            if i < last:
                next(at)
                double = dict(use_bias=False, dtype=dtype)
                x_BHWC = residual.doubling(width, **double, name=name())(x_BHWC)
        return residual.conv(self.out, dtype=dtype, name=name())(x_BHWC)


class AutoencoderTiny(nn.Module):
    """Pictures to latents, as denoisers see them, and back; `dtype` computes.

    widths, depths: of the levels, and residual blocks in them. Each level has half the side of the
      one before, in the decoder twice.
    scaling_factor, shift_factor: see `autoencoder.Autoencoder`.
    """

    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    encoder_depths: tuple[int, ...] = (1, 3, 3, 3)
    decoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """Pixels to a place of the latents, along either side."""
        return 2 ** (len(self.encoder_widths) - 1)

    @property
    def tile(self) -> int:
        """Side of the tiles that large latents are decoded in, see `sampling.tiles`."""
        return TILE // self.factor

    def setup(self):
        encoder = (self.latent_channels, self.encoder_widths, self.encoder_depths, self.dtype)
        self.encoder = Encoder(*encoder)
        self.decoder = Decoder(3, self.decoder_widths, self.decoder_depths, self.dtype)

    def __call__(self, image_BHWC) -> Moments:
        """The latents of pictures in [-1, 1], float32, as `mean_BHWC`."""
        latent_BHWC = self.encoder((image_BHWC + 1) / 2).astype(jnp.float32)
        if self.is_initializing():  # so that `init` makes the decoder's parameters, too
            self.decode(latent_BHWC)
        return Moments(latent_BHWC)

    def decode(self, latent_BHWC):
        """Pictures, float32, about in [-1, 1]: nothing is cut off."""
        bent_BHWC = jnp.tanh(latent_BHWC / BOUND) * BOUND
        return self.decoder(bent_BHWC).astype(jnp.float32) * 2 - 1


def from_config(config: dict, *, dtype: fields.Dtype = "float32") -> AutoencoderTiny:
    """The autoencoder that a checkpoint's config.json describes.

    Args:
      dtype: what it computes in.
    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    sizes = hf.fields(config, AutoencoderTiny, _FIELDS, _IMPLEMENTED)
    shift = fields.checked(float, "shift_factor", config.get("shift_factor", 0.0), where=hf.CONFIG)
    levels = {len(value) for value in sizes.values() if isinstance(value, tuple)}
    uneven = [w for w in ("encoder_widths", "decoder_widths") if len(set(sizes[w])) > 1]
    if len(levels) > 1 or uneven:
        raise errors.misfit(
            f"levels of {sizes['encoder_widths']} and {sizes['decoder_widths']} channels, with "
            f"{sizes['encoder_depths']} and {sizes['decoder_depths']} blocks",
            "use a checkpoint with as many levels in encoder and decoder, of one width each",
        )
    return AutoencoderTiny(**sizes, shift_factor=shift, dtype=dtype)
