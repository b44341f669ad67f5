"""FluxTransformer2DModel: FLUX.1 schnell and dev (Black Forest Labs 2024).

B batch · T image tokens · S text tokens · D width · N heads · H head width
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, fields
from t2i_jax.models import attention, layers
from t2i_jax.models.layers import flat
from t2i_jax.models.types import Cond, Output
from t2i_jax.pretrained import dit, hf, residual, tensors
from t2i_jax.pretrained.embedding import PERIOD

KINDS = ("FluxTransformer2DModel",)
PACK = 2  # pixels a side of a token
GUIDANCE = 1000.0  # what a guidance scale is multiplied by
_FIELDS = {
    "in_channels": "packed",
    "num_layers": "depth",
    "num_single_layers": "single_depth",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_width",
}


def names(config) -> tensors.Names:
    double, single = "transformer_blocks_{}", "single_transformer_blocks_{}"
    paths = ["x_embedder", "context_embedder", "norm_out/linear", "proj_out"]
    paths += [f"{double}/norm1/linear", f"{double}/norm1_context/linear"]
    paths += [f"{single}/{x}" for x in ("norm/linear", "proj_mlp", "proj_out")]
    table = tensors.alike(paths) | dit.joint_names(double)
    for name in ("ff", "ff_context"):
        table |= dit.feed_forward_names(f"{double}/{name}")
    theirs = "single_transformer_blocks.{}.attn"
    table |= {f"{single}/attn/{x}": f"{theirs}.to_{x}" for x in "qkv"}
    table |= {f"{single}/attn/norm_{x}": f"{theirs}.norm_{x}" for x in "qk"}
    for name in ("timestep_embedder", "guidance_embedder", "text_embedder"):
        table[f"time_text_embed/{name}/linear_{{}}"] = f"time_text_embed.{name}.linear_{{}}"
    return tensors.Names(table)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, on image and text tokens in one row."""

    width: int
    heads: int
    head_width: int
    dtype: str

    def setup(self):
        dense = lambda n: nn.Dense(n * self.width, dtype=self.dtype)
        self.norm = dit.Modulation(self.width, 3)
        self.attn = dit.Heads(self.heads, self.head_width, True, self.dtype)
        self.proj_mlp, self.proj_out = dense(4), dense(1)

    def __call__(self, x_BTD, c_BD, turn):
        shift, scale, gate = self.norm(c_BD)
        h_BTD = dit.entered(x_BTD, shift, scale).astype(self.dtype)
        q, k, v = self.attn(h_BTD)
        seen_BTD = attention.merge_heads(attention.attention(turn(q), turn(k), v))
        # The kernel's rows are in this order. Linen's GELU is the tanh form, as theirs here.
        both = jnp.concatenate([seen_BTD, nn.gelu(flat(self.proj_mlp, h_BTD))], -1)
        return x_BTD + layers.gate(flat(self.proj_out, both), gate), None


class Flux(nn.Module):
    """(z_BHWC, t_B, cond) -> velocity BHWC. t is σ·1000; the text's padding is attended to.

    packed: channels of a token, which are four pixels'.
    axes: widths of the parts of a head that turn by a place's three coordinates, of which the first
      is 0 for all.
    guided: it reads a guidance scale, `cond.numbers_BK` (dev).
    dtype: of the products inside the blocks.
    """

    packed: int = 64
    depth: int = 19
    single_depth: int = 38
    heads: int = 24
    head_width: int = 128
    axes: tuple[int, ...] = (16, 56, 56)
    guided: bool = False
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False

    @property
    def channels(self) -> int:
        """Of z."""
        return self.packed // PACK**2

    @property
    def unit(self) -> int:
        """Height and width of z must be multiples of it."""
        return PACK

    def setup(self):
        width = self.heads * self.head_width
        self.x_embedder, self.context_embedder = (
            nn.Dense(width, dtype="float32") for _ in range(2)
        )
        self.time_text_embed = dit.Condition(width, self.guided)
        sizes = dict(width=width, heads=self.heads, head_width=self.head_width, dtype=self.dtype)
        how = dict(remat_policy=self.remat, scan=self.scan, __call__=(nn.broadcast, nn.broadcast))
        double = [sizes | dict(normed=True)] * self.depth
        self.transformer_blocks = layers.stacked(dit.JointBlock, double, **how)
        self.single_transformer_blocks = layers.stacked(
            SingleBlock, [sizes] * self.single_depth, **how
        )
        self.norm_out = dit.Modulation(width, 2)
        self.proj_out = nn.Dense(self.packed, dtype="float32")

    def prepare(self, cond: Cond):
        """The text's tokens at the network's width, and the embedding of its pooled vector and of
        the guidance scale.
        """
        text_BSD = flat(self.context_embedder, cond.seq_BLD.astype(jnp.float32))
        scale_B = cond.numbers_BK[:, 0] * GUIDANCE if self.guided else None
        return text_BSD, self.time_text_embed.of_text(cond.pooled_BD, scale_B)

    def __call__(self, z_BHWC, t_B, cond: Cond, prepared=None) -> Output:
        text_BSD, of_text_BD = self.prepare(cond) if prepared is None else prepared
        c_BD = self.time_text_embed(t_B, of_text_BD)
        b, height, width, c = z_BHWC.shape
        rows, columns = height // PACK, width // PACK
        # A token lists its four pixels channel by channel, as the pipeline of diffusers packs them.
        grid = z_BHWC.reshape(b, rows, PACK, columns, PACK, c).transpose(0, 1, 3, 5, 2, 4)
        x_BTD = flat(self.x_embedder, grid.reshape(b, rows * columns, -1).astype(jnp.float32))
        turn = turned(rows, columns, self.axes)
        for block in self.transformer_blocks.values():
            (x_BTD, text_BSD), _ = block((x_BTD, text_BSD), c_BD, turn)
        # Diffusers has the text first. Attention sees no order, and `turn` wants the image first.
        x_BTD = jnp.concatenate([x_BTD, text_BSD], 1)
        for block in self.single_transformer_blocks.values():
            x_BTD, _ = block(x_BTD, c_BD, turn)
        scale_BD, shift_BD = self.norm_out(c_BD)  # in this order here alone
        x_BTD = dit.entered(x_BTD[:, : rows * columns], shift_BD, scale_BD)
        grid = flat(self.proj_out, x_BTD).reshape(b, rows, columns, c, PACK, PACK)
        return grid.transpose(0, 1, 4, 2, 5, 3).reshape(z_BHWC.shape)


def turned(rows: int, columns: int, axes):
    """A function that turns the first rows · columns tokens' pairs of numbers by their places
    (RoPE, arXiv:2104.09864), x_BTNH -> the same. Text, behind them, has place 0 and stays.
    """
    # The sizes are static: angles are made in float64 on the host, and are constants of the
    # program.
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    places = np.concatenate([np.zeros((rows * columns, 1)), places.reshape(-1, 2)], 1)
    rates = [PERIOD ** -(np.arange(0, width, 2) / width) for width in axes]
    angle_TF = np.concatenate([np.outer(places[:, i], r) for i, r in enumerate(rates)], 1)
    waves = (fn(angle_TF).astype(np.float32) for fn in (np.cos, np.sin))
    # A loop over blocks takes arrays alone, and Partial is a tree of these two.
    return jax.tree_util.Partial(_turn, *waves)


def _turn(cos_TF, sin_TF, x_BTNH):
    count = len(cos_TF)
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    pairs = x_BTNH[:, :count].astype(jnp.float32)
    pairs = pairs.reshape(*pairs.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    moved = jnp.stack([a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F], -1)
    moved = moved.reshape(*moved.shape[:-2], -1).astype(x_BTNH.dtype)
    return jnp.concatenate([moved, x_BTNH[:, count:]], 1)


def from_config(
    config: dict, *, dtype: fields.Dtype = "float32", remat: str = "none", scan: bool = False
) -> Flux:
    """The transformer that a config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    # In diffusers the pipeline packs pixels, so the network's own patch is 1.
    implemented = {"patch_size": 1, "out_channels": None}
    sizes = hf.fields(config, Flux, _FIELDS, implemented)
    axes = residual.sizes(config, "axes_dims_rope", (16, 56, 56), 3)
    odd = any(width % 2 for width in axes)  # numbers turn in pairs
    if odd or sum(axes) != sizes["head_width"] or sizes["packed"] % PACK**2:
        raise errors.ConfigError(
            f"axes_dims_rope {axes} of heads of {sizes['head_width']}, {sizes['packed']} channels",
            where=hf.CONFIG,
            fix="use the config.json that was saved with the weights",
        )
    guided = bool(config.get("guidance_embeds", False))
    return Flux(**sizes, axes=axes, guided=guided, dtype=dtype, remat=remat, scan=scan)
