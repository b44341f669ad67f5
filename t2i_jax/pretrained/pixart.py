"""PixArtTransformer2DModel: PixArt-α (arXiv:2310.00426) and -Σ (2403.04692).

B batch · T image tokens · S text tokens · D width · K numbers
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from t2i_jax import fields
from t2i_jax.models import blocks, layers
from t2i_jax.models.layers import flat
from t2i_jax.models.types import Cond, Output
from t2i_jax.pretrained import dit, hf, residual, tensors
from t2i_jax.pretrained.embedding import Embedding, waves

KINDS = ("PixArtTransformer2DModel",)
_FIELDS = {
    "in_channels": "channels",
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_width",
    "patch_size": "patch",
    "sample_size": "side",
}
_IMPLEMENTED = {
    **{"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single"},
    **{"norm_elementwise_affine": False, "attention_bias": True, "norm_eps": 1e-6},
    **{"attention_type": "default", "double_self_attention": False},
    **{"only_cross_attention": False, "upcast_attention": False, "num_vector_embeds": None},
}


def names(config) -> tensors.Names:
    block = "transformer_blocks_{}"
    table = tensors.alike(["pos_embed/proj", "adaln_single/linear", "proj_out"])
    for name in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder"):
        table[f"adaln_single/{name}/linear_{{}}"] = f"adaln_single.emb.{name}.linear_{{}}"
    table["caption_projection/linear_{}"] = "caption_projection.linear_{}"
    table["table"] = "scale_shift_table"
    table[f"{block}/table"] = "transformer_blocks.{}.scale_shift_table"
    for n in (1, 2):
        table |= {f"{block}/attn{n}/{x}": f"transformer_blocks.{{}}.attn{n}.to_{x}" for x in "qkv"}
        table[f"{block}/attn{n}/out"] = f"transformer_blocks.{{}}.attn{n}.to_out.0"
    return tensors.Names(table | dit.feed_forward_names(f"{block}/ff"))


class Patches(nn.Module):
    """Squares of pixels as tokens.   BHWC -> BTD"""

    width: int
    patch: int

    def setup(self):
        side = dict(strides=(self.patch,) * 2, padding="VALID")
        self.proj = residual.conv(self.width, self.patch, dtype="float32", **side)

    def __call__(self, x_BHWC):
        x_BHWD = self.proj(x_BHWC.astype(jnp.float32))
        return x_BHWD.reshape(len(x_BHWD), -1, self.width)


class Times(nn.Module):
    """Six vectors for all blocks, and the embedding that they are made of (adaLN-single, section
    2.3).

    sized: the embedding is also of the picture's height, width and their ratio.
    """

    width: int
    sized: bool

    def setup(self):
        self.timestep_embedder = Embedding(self.width)
        self.linear = nn.Dense(6 * self.width, dtype="float32")
        if self.sized:
            # Height, width and their ratio take a third each. Both sides share one embedding.
            third = self.width // 3
            self.resolution_embedder, self.aspect_ratio_embedder = (
                Embedding(third) for _ in range(2)
            )

    def of_numbers(self, numbers_BK):
        """What does not depend on the time, for height, width and height / width."""
        waves_BKE = waves(numbers_BK, dit.SINUSOIDS)
        size_BE = self.resolution_embedder(waves_BKE[:, :2]).reshape(len(numbers_BK), -1)
        return jnp.concatenate([size_BE, self.aspect_ratio_embedder(waves_BKE[:, 2])], -1)

    def __call__(self, t_B, more_BD):
        c_BD = self.timestep_embedder(waves(t_B, dit.SINUSOIDS))
        c_BD = c_BD if more_BD is None else c_BD + more_BD
        return self.linear(nn.silu(c_BD)), c_BD


class Caption(nn.Module):
    """Text tokens at the network's width."""

    width: int

    def setup(self):
        self.linear_1, self.linear_2 = (nn.Dense(self.width, dtype="float32") for _ in range(2))

    def __call__(self, seq_BSD):
        return flat(self.linear_2, nn.gelu(flat(self.linear_1, seq_BSD.astype(jnp.float32))))


class Block(nn.Module):
    """Self-attention, attention to the text and MLP; the first and last are modulated."""

    width: int
    heads: int
    dtype: str

    def setup(self):
        self.table = blocks.Value((6, self.width))
        sizes = (self.width, self.heads, self.dtype)
        self.attn1 = blocks.Attention(*sizes, bias=True)
        self.attn2 = blocks.Attention(*sizes, bias=True)
        self.ff = dit.FeedForward(self.width, self.dtype)

    def keys_values(self, carry, text_BSD):
        return carry, self.attn2.keys_values(text_BSD)

    def __call__(self, x_BTD, text_kv, mask_BS, mods_B6D):
        mods = jnp.moveaxis(self.table() + mods_B6D.reshape(-1, 6, self.width), 1, 0)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mods
        x_BTD = x_BTD + layers.gate(self.attn1(dit.entered(x_BTD, shift, scale)), gate)
        # PixArt has neither norm nor gate here.
        x_BTD = x_BTD + self.attn2(x_BTD, text_kv, mask_BS)
        h = self.ff(dit.entered(x_BTD, shift_mlp, scale_mlp).astype(self.dtype))
        return x_BTD + layers.gate(h, gate_mlp), None


class PixArt(nn.Module):
    """(z_BHWC, t_B, cond) -> out_BHWC. t is 0 … 999; `cond.mask_BL` hides padding.

    side: of the latents that it was made for; others have places scaled to these.
    interpolation: places are divided by it.
    sized: it reads height, width and height / width in pixels, `cond.numbers_BK`.
    dtype: of the products inside the blocks.
    """

    channels: int = 4
    depth: int = 28
    heads: int = 16
    head_width: int = 72
    patch: int = 2
    side: int = 128
    out_channels: int = 8
    interpolation: float = 1.0
    sized: bool = False
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False

    @property
    def unit(self) -> int:
        """Height and width of z must be multiples of it."""
        return self.patch

    def setup(self):
        width = self.heads * self.head_width
        self.pos_embed = Patches(width, self.patch)
        self.adaln_single = Times(width, self.sized)
        self.caption_projection = Caption(width)
        self.transformer_blocks = layers.stacked(
            Block,
            [dict(width=width, heads=self.heads, dtype=self.dtype)] * self.depth,
            **dict(remat_policy=self.remat, scan=self.scan),
            __call__=(0, nn.broadcast, nn.broadcast),
            keys_values=(nn.broadcast,),
        )
        self.table = blocks.Value((2, width))
        self.proj_out = nn.Dense(self.patch**2 * self.out_channels, dtype="float32")

    def prepare(self, cond: Cond):
        """Keys and values of the text for every block, and the embedding of the numbers."""
        text_BSD = self.caption_projection(cond.seq_BLD).astype(self.dtype)
        kvs = [b.keys_values(None, text_BSD)[1] for b in self.transformer_blocks.values()]
        return kvs, self.adaln_single.of_numbers(cond.numbers_BK) if self.sized else None

    def __call__(self, z_BHWC, t_B, cond: Cond, prepared=None) -> Output:
        kvs, more_BD = self.prepare(cond) if prepared is None else prepared
        mods_B6D, c_BD = self.adaln_single(t_B, more_BD)
        rows, columns = (n // self.patch for n in z_BHWC.shape[1:3])
        x_BTD = self.pos_embed(z_BHWC)
        base = self.side // self.patch
        places = [np.arange(n) * base / n / self.interpolation for n in (rows, columns)]
        x_BTD += dit.sincos_2d(*places, x_BTD.shape[-1])
        for block, text_kv in zip(self.transformer_blocks.values(), kvs, strict=True):
            x_BTD, _ = block(x_BTD, text_kv, cond.mask_BL, mods_B6D)
        # The last modulation is of the embedding itself, not of the six vectors made of it.
        shift_BD, scale_BD = jnp.moveaxis(self.table() + c_BD[:, None], 1, 0)
        x_BTD = flat(self.proj_out, dit.entered(x_BTD, shift_BD, scale_BD))
        x_BHWC = layers.depth_to_space(x_BTD.reshape(len(z_BHWC), rows, columns, -1), self.patch)
        return x_BHWC[..., : self.channels]  # what is left is a variance, which nothing reads


def from_config(
    config: dict, *, dtype: fields.Dtype = "float32", remat: str = "none", scan: bool = False
) -> PixArt:
    """The transformer that a config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    sizes = hf.fields(config, PixArt, _FIELDS, _IMPLEMENTED)
    # What a config leaves out, diffusers takes from the side: 1024 pixels are 128 places.
    sized = config.get("use_additional_conditions")
    return PixArt(
        **sizes,
        # Where it is missing it is 8, where it is null as many as come in.
        out_channels=hf.number({"out_channels": 8} | config, "out_channels", sizes["channels"]),
        interpolation=hf.number(
            config, "interpolation_scale", max(sizes["side"] // 64, 1.0), float
        ),
        sized=sizes["side"] == 128 if sized is None else bool(sized),
        **dict(dtype=dtype, remat=remat, scan=scan),
    )
