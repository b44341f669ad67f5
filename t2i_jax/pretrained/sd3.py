"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5 (arXiv:2403.03206).

B batch · T image tokens · S text tokens · D width
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks, layers
from t2i_jax.models.layers import flat
from t2i_jax.models.types import Cond, Output
from t2i_jax.pretrained import dit, hf, pixart, tensors

KINDS = ("SD3Transformer2DModel",)
_FIELDS = {
    "in_channels": "channels",
    "num_layers": "depth",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_width",
    "patch_size": "patch",
    "pos_embed_max_size": "places",
    "caption_projection_dim": "width",
}


def names(config) -> tensors.Names:
    block = "transformer_blocks_{}"
    paths = ["pos_embed/proj", "context_embedder", "norm_out/linear", "proj_out"]
    paths += [f"{block}/norm1/linear", f"{block}/norm1_context/linear"]
    table = tensors.alike(paths) | dit.joint_names(block)
    for name in ("ff", "ff_context"):
        table |= dit.feed_forward_names(f"{block}/{name}")
    table["place"] = "pos_embed.pos_embed"
    for name in ("timestep_embedder", "text_embedder"):
        table[f"time_text_embed/{name}/linear_{{}}"] = f"time_text_embed.{name}.linear_{{}}"
    return tensors.Names(table)


class SD3(nn.Module):
    """(z_BHWC, t_B, cond) -> velocity BHWC. t is σ·1000; the text's padding is attended to.

    places: side of the grid of stored places, whose middle smaller pictures take.
    normed: queries and keys are normed by head (3.5).
    dual: blocks in which the image also attends to itself alone (3.5 medium).
    dtype: of the products inside the blocks.
    """

    channels: int = 16
    depth: int = 18
    heads: int = 18
    head_width: int = 64
    width: int = 1152
    patch: int = 2
    places: int = 96
    out_channels: int = 16
    normed: bool = False
    dual: tuple[int, ...] = ()
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False

    @property
    def unit(self) -> int:
        """Height and width of z must be multiples of it."""
        return self.patch

    def setup(self):
        self.pos_embed = pixart.Patches(self.width, self.patch)
        self.place = blocks.Value((1, self.places**2, self.width))
        self.time_text_embed = dit.Condition(self.width)
        self.context_embedder = nn.Dense(self.width, dtype="float32")
        sizes = dict(width=self.width, heads=self.heads, head_width=self.head_width)
        sizes |= dict(normed=self.normed, dtype=self.dtype)
        kinds = [sizes | dict(dual=i in self.dual) for i in range(self.depth)]
        kinds[-1]["last"] = True
        self.transformer_blocks = layers.stacked(
            dit.JointBlock,
            kinds,
            **dict(remat_policy=self.remat, scan=self.scan),
            __call__=(nn.broadcast,),
        )
        self.norm_out = dit.Modulation(self.width, 2)
        self.proj_out = nn.Dense(self.patch**2 * self.out_channels, dtype="float32")

    def prepare(self, cond: Cond):
        """The text's tokens at the network's width, and the embedding of its pooled vector."""
        text_BSD = flat(self.context_embedder, cond.seq_BLD.astype(jnp.float32))
        return text_BSD, self.time_text_embed.of_text(cond.pooled_BD)

    def __call__(self, z_BHWC, t_B, cond: Cond, prepared=None) -> Output:
        text_BSD, of_text_BD = self.prepare(cond) if prepared is None else prepared
        c_BD = self.time_text_embed(t_B, of_text_BD)
        rows, columns = (n // self.patch for n in z_BHWC.shape[1:3])
        x_BTD = self.pos_embed(z_BHWC) + self._places(rows, columns)
        for block in self.transformer_blocks.values():
            (x_BTD, text_BSD), _ = block((x_BTD, text_BSD), c_BD)
        scale_BD, shift_BD = self.norm_out(c_BD)  # in this order here alone
        x_BTD = flat(self.proj_out, dit.entered(x_BTD, shift_BD, scale_BD))
        return layers.depth_to_space(x_BTD.reshape(len(z_BHWC), rows, columns, -1), self.patch)

    def _places(self, rows: int, columns: int):
        """The middle of the stored grid, which does not learn.   -> TD"""
        if max(rows, columns) > self.places:
            raise errors.ConfigError(
                f"{rows} × {columns} patches of at most {self.places} a side",
                where="the picture's size",
                fix="draw a smaller picture",
            )
        # In torch the table is a buffer. Only a parameter is read from the file and written back.
        whole = jax.lax.stop_gradient(self.place()).reshape(self.places, self.places, -1)
        top, left = ((self.places - n) // 2 for n in (rows, columns))
        middle = whole[top : top + rows, left : left + columns]
        return middle.reshape(rows * columns, -1).astype(jnp.float32)


def from_config(
    config: dict, *, dtype: fields.Dtype = "float32", remat: str = "none", scan: bool = False
) -> SD3:
    """The transformer that a config.json describes.

    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    sizes = hf.fields(config, SD3, _FIELDS)
    norm = config.get("qk_norm")
    errors.check_known("qk_norm", norm, (None, "rms_norm"), where=hf.CONFIG)
    if sizes["width"] != sizes["heads"] * sizes["head_width"]:
        raise errors.ConfigError(
            f"width {sizes['width']} of {sizes['heads']} heads of {sizes['head_width']}",
            where=hf.CONFIG,
            fix="use the config.json that was saved with the weights",
        )
    dual = config.get("dual_attention_layers") or ()
    if not isinstance(dual, list | tuple) or not all(type(n) is int for n in dual):
        raise errors.ConfigError(
            f"dual_attention_layers is {dual!r:.50}", where=hf.CONFIG, fix="give a list of numbers"
        )
    return SD3(
        **sizes,
        out_channels=hf.number(config, "out_channels", sizes["channels"]),
        normed=norm is not None,
        dual=tuple(dual),
        **dict(dtype=dtype, remat=remat, scan=scan),
    )
