"""UNet2DConditionModel: the U-net of Stable Diffusion 1, 2 (arXiv:2112.10752) and XL (2307.01952).

B batch · H W latents · C channels · T pixels as tokens · S text tokens · D width
E width of the time's embedding · K numbers
"""

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models import blocks, layers
from t2i_jax.models.layers import flat
from t2i_jax.models.types import Cond, Output
from t2i_jax.pretrained import hf, residual, tensors
from t2i_jax.pretrained.embedding import Embedding, waves

KINDS = ("UNet2DConditionModel",)
_FIELDS = {
    "in_channels": "channels",
    "out_channels": "out_channels",
    "layers_per_block": "layers",
    "norm_num_groups": "groups",
    "norm_eps": "epsilon",
}
_IMPLEMENTED = {
    **{"act_fn": "silu", "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1},
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"), None),
    **dict.fromkeys(("encoder_hid_dim", "time_cond_proj_dim", "time_embedding_act_fn"), None),
    **dict.fromkeys(("timestep_post_act", "cross_attention_norm", "time_embedding_dim"), None),
    **dict.fromkeys(("mid_block_only_cross_attention", "num_attention_heads"), None),
    "reverse_transformer_layers_per_block": None,
    **dict.fromkeys(("dual_cross_attention", "only_cross_attention"), False),
    **dict.fromkeys(("resnet_skip_time_act", "center_input_sample"), False),
    **dict.fromkeys(("class_embeddings_concat", "use_attentions"), False),
    **{"resnet_time_scale_shift": "default", "time_embedding_type": "positional"},
    **{"attention_type": "default", "mid_block_type": "UNetMidBlock2DCrossAttn"},
    **{"resnet_out_scale_factor": 1.0, "mid_block_scale_factor": 1},
}
_KINDS_OF_BLOCKS = {  # block's type -> whether it attends to the text
    **{"CrossAttnDownBlock2D": True, "DownBlock2D": False},
    **{"CrossAttnUpBlock2D": True, "UpBlock2D": False},
}


def names(config) -> tensors.Names:
    paths = ["conv_in", "conv_norm_out", "conv_out"]
    blocks = ("down_blocks_{}", "mid_block", "up_blocks_{}")
    for block in blocks:
        paths += [f"{block}/resnets_{{}}/{part}" for part in residual.PARTS]
        paths += [f"{block}/{way}samplers_{{}}/conv" for way in ("down", "up")]
        paths += [f"{block}/attentions_{{}}/{part}" for part in ("norm", "proj_in", "proj_out")]
        layer = f"{block}/attentions_{{}}/transformer_blocks_{{}}"
        paths += [f"{layer}/norm{n}" for n in (1, 2, 3)]
    table = tensors.alike(paths)
    for block in blocks:
        path = f"{block}/attentions_{{}}/transformer_blocks_{{}}"
        layer = path.replace("_{}", ".{}").replace("/", ".")
        for n in (1, 2):
            table |= {f"{path}/attn{n}/{x}": f"{layer}.attn{n}.to_{x}" for x in "qkv"}
            table[f"{path}/attn{n}/out"] = f"{layer}.attn{n}.to_out.0"
        table[f"{path}/ff/up"] = f"{layer}.ff.net.0.proj"
        table[f"{path}/ff/down"] = f"{layer}.ff.net.2"
    # The number of "linear_1" is no index, but a part of the name.
    for name in ("time_embedding", "add_embedding"):
        table[f"{name}/linear_{{}}"] = f"{name}.linear_{{}}"
    return tensors.Names(table)


class FeedForward(nn.Module):
    """GEGLU (arXiv:2002.05202): one half of a layer times the GELU of the other, then a layer."""

    width: int
    dtype: str

    def setup(self):
        # Four times the width for each half.
        self.up = nn.Dense(8 * self.width, dtype=self.dtype)
        self.down = nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x_BTD):
        # The exact GELU is meant, not Linen's default, which is the tanh form.
        up, gate = jnp.split(flat(self.up, x_BTD), 2, -1)
        return flat(self.down, up * nn.gelu(gate, approximate=False))


class Layer(nn.Module):
    """Self-attention, attention to the text and MLP, each after a norm."""

    width: int
    heads: int
    dtype: str

    def setup(self):
        norm = lambda: nn.LayerNorm(1e-5, dtype="float32", use_fast_variance=False)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = blocks.Attention(self.width, self.heads, self.dtype)
        self.attn2 = blocks.Attention(self.width, self.heads, self.dtype)
        self.ff = FeedForward(self.width, self.dtype)

    def keys_values(self, carry, text_BSD):
        return carry, self.attn2.keys_values(text_BSD)

    def __call__(self, x_BTD, text_kv, mask_BS):
        x_BTD += self.attn1(self.norm1(x_BTD))
        x_BTD += self.attn2(self.norm2(x_BTD), text_kv, mask_BS)
        return x_BTD + self.ff(self.norm3(x_BTD).astype(self.dtype)), None


class Transformer(nn.Module):
    """Layers on the pixels of a grid as tokens, beside the input.

    linear: pixels enter and leave by dense layers, else by 1 × 1 convolutions: equal products.
    """

    width: int
    heads: int
    depth: int
    groups: int
    linear: bool
    dtype: str
    remat: str = "none"
    scan: bool = False

    def setup(self):
        dense = lambda: nn.Dense(self.width, dtype=self.dtype)
        project = dense if self.linear else lambda: residual.conv(self.width, 1, dtype=self.dtype)
        # norm_eps of config.json is for the residual blocks alone.
        self.norm = residual.norm(self.groups, 1e-6, dtype=self.dtype)
        self.proj_in, self.proj_out = project(), project()
        sizes = dict(width=self.width, heads=self.heads, dtype=self.dtype)
        self.transformer_blocks = layers.stacked(
            Layer,
            [sizes] * self.depth,
            **dict(remat_policy=self.remat, scan=self.scan),
            __call__=(0, nn.broadcast),
            keys_values=(nn.broadcast,),
        )

    def keys_values(self, text_BSD):
        return [b.keys_values(None, text_BSD)[1] for b in self.transformer_blocks.values()]

    def __call__(self, x_BHWC, text_kvs, mask_BS):
        shape = x_BHWC.shape
        h = self.norm(x_BHWC)
        if self.linear:
            h = flat(self.proj_in, h.reshape(shape[0], -1, shape[-1]))
        else:
            h = self.proj_in(h).reshape(shape[0], -1, shape[-1])
        for block, text_kv in zip(self.transformer_blocks.values(), text_kvs, strict=True):
            h, _ = block(h, text_kv, mask_BS)
        h = (
            flat(self.proj_out, h).reshape(shape)
            if self.linear
            else self.proj_out(h.reshape(shape))
        )
        return x_BHWC + h


class Block(nn.Module):
    """Residual blocks, each perhaps followed by a transformer, then perhaps a change of size.

    blocks: residual blocks.
    heads, depth: of the transformers; depth 0: there are none.
    """

    features: int
    blocks: int
    heads: int
    depth: int
    groups: int
    epsilon: float
    linear: bool
    dtype: str
    remat: str
    scan: bool
    smaller: bool = False
    larger: bool = False
    middle: bool = False

    def setup(self):
        sizes = (self.features, self.groups, self.epsilon, self.dtype)
        self.resnets = [residual.Block(*sizes) for _ in range(self.blocks)]
        if self.depth:
            of = (self.features, self.heads, self.depth, self.groups, self.linear, self.dtype)
            count = self.blocks - self.middle
            self.attentions = [Transformer(*of, self.remat, self.scan) for _ in range(count)]
        if self.smaller:
            self.downsamplers = [residual.Smaller(self.features, self.dtype)]
        if self.larger:
            self.upsamplers = [residual.Larger(self.features, self.dtype)]

    def keys_values(self, text_BSD):
        return [t.keys_values(text_BSD) for t in self.attentions] if self.depth else []

    def down(self, x_BHWC, time_BE, text_kvs, mask_BS):
        """The states after each residual block, and after the change of size."""
        states = []
        for i, block in enumerate(self.resnets):
            x_BHWC = block(x_BHWC, time_BE)
            x_BHWC = self.attentions[i](x_BHWC, text_kvs[i], mask_BS) if self.depth else x_BHWC
            states.append(x_BHWC)
        return [*states, self.downsamplers[0](x_BHWC)] if self.smaller else states

    def mid(self, x_BHWC, time_BE, text_kvs, mask_BS):
        """A transformer between two residual blocks."""
        x_BHWC = self.resnets[0](x_BHWC, time_BE)
        x_BHWC = self.attentions[0](x_BHWC, text_kvs[0], mask_BS)
        return self.resnets[1](x_BHWC, time_BE)

    def up(self, x_BHWC, before, time_BE, text_kvs, mask_BS):
        """Takes its states from the end of `before`, and the size from what is left there."""
        for i, block in enumerate(self.resnets):
            x_BHWC = block(jnp.concatenate([x_BHWC, before.pop()], -1), time_BE)
            x_BHWC = self.attentions[i](x_BHWC, text_kvs[i], mask_BS) if self.depth else x_BHWC
        return self.upsamplers[0](x_BHWC, before[-1].shape[1:3]) if self.larger else x_BHWC


class UNet(nn.Module):
    """(z_BHWC, t_B, cond) -> out_BHWC, of latents of any size.

    z may have further channels, such as a mask and what it hides. t is 0 … 999. The text's padding
    is attended to unless `cond.mask_BL` hides it.

    heads, depths: of the transformers of each size.
    downs, ups: whether each block on the way down and up has any.
    numbers: width of the sinusoids of each of `cond.numbers_BK`; 0: it reads none.
    dtype: of products and of the stream. Norms, softmax and embeddings of the time are float32.
    """

    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    downs: tuple[bool, ...]
    ups: tuple[bool, ...]
    channels: int = 4
    out_channels: int = 4
    layers: int = 2
    groups: int = 32
    epsilon: float = 1e-5
    linear: bool = False
    cosine_first: bool = True
    shift: float = 0.0
    numbers: int = 0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False

    @property
    def unit(self) -> int:
        """Height and width of z must be multiples of it: any size will do."""
        return 1

    def setup(self):
        shared = dict(groups=self.groups, epsilon=self.epsilon, linear=self.linear)
        shared |= dict(dtype=self.dtype, remat=self.remat, scan=self.scan)
        n, last = self.layers, len(self.blocks) - 1
        width = 4 * self.blocks[0]
        self.time_embedding = Embedding(width)
        if self.numbers:
            self.add_embedding = Embedding(width)
        self.conv_in = residual.conv(self.blocks[0], dtype=self.dtype)
        down, up = [], []
        for i, c in enumerate(self.blocks):
            # Depth 0 where the block does not attend.
            of = (self.heads[i], self.depths[i] * self.downs[i])
            down.append(Block(c, n, *of, smaller=i < last, **shared))
        for i, c in enumerate(self.blocks[::-1]):
            of = (self.heads[::-1][i], self.depths[::-1][i] * self.ups[i])
            # On the way down a level leaves n + 1 states: n blocks', and the first convolution's or
            # that of the halving before.
            up.append(Block(c, n + 1, *of, larger=i < last, **shared))
        self.down_blocks, self.up_blocks = down, up
        c = self.blocks[-1]
        # The middle attends even where the blocks of its size do not.
        of = (self.heads[-1], self.depths[-1])
        self.mid_block = Block(c, 2, *of, middle=True, **shared)
        self.conv_norm_out = residual.norm(self.groups, self.epsilon, dtype=self.dtype)
        self.conv_out = residual.conv(self.out_channels, dtype=self.dtype)

    def prepare(self, cond: Cond):
        """Keys and values of the text for every layer, and the embedding of the numbers."""
        text_BSD = cond.seq_BLD.astype(self.dtype)
        ways = (self.down_blocks, (self.mid_block,), self.up_blocks)
        kvs = [[block.keys_values(text_BSD) for block in way] for way in ways]
        if not self.numbers:
            return kvs, None
        waves_BKE = waves(cond.numbers_BK, self.numbers, **self._waves)
        pooled_BD = cond.pooled_BD.astype(jnp.float32)
        # The learned kernel's rows are in this order.
        joined_BE = jnp.concatenate([pooled_BD, waves_BKE.reshape(len(pooled_BD), -1)], -1)
        return kvs, self.add_embedding(joined_BE)

    def __call__(self, z_BHWC, t_B, cond: Cond, prepared=None) -> Output:
        (down, mid, up), more_BE = self.prepare(cond) if prepared is None else prepared
        time_BE = self.time_embedding(waves(t_B, self.blocks[0], **self._waves))
        time_BE = time_BE if more_BE is None else time_BE + more_BE
        mask_BS, x_BHWC = cond.mask_BL, self.conv_in(z_BHWC.astype(self.dtype))
        states = [x_BHWC]
        for block, kvs in zip(self.down_blocks, down, strict=True):
            states += block.down(states[-1], time_BE, kvs, mask_BS)
        x_BHWC = self.mid_block.mid(states[-1], time_BE, mid[0], mask_BS)
        for block, kvs in zip(self.up_blocks, up, strict=True):
            x_BHWC = block.up(x_BHWC, states, time_BE, kvs, mask_BS)
        x_BHWC = self.conv_out(nn.silu(self.conv_norm_out(x_BHWC)))
        return x_BHWC.astype(jnp.float32)

    @property
    def _waves(self) -> dict:
        return dict(cosine_first=self.cosine_first, shift=self.shift)


def from_config(
    config: dict, *, dtype: fields.Dtype = "float32", remat: str = "none", scan: bool = False
) -> UNet:
    """The U-net that a config.json describes.

    Args:
      remat: what the backward pass of a transformer's layer computes again, see `layers.remat`.
      scan: equal layers of a transformer are compiled once, see `layers.stacked`.
    Raises:
      ConfigError: a field asks for something not implemented, or is no sensible size.
    """
    blocks = residual.sizes(config, "block_out_channels", (320, 640, 1280, 1280))
    n = len(blocks)
    sizes = hf.fields(config, UNet, _FIELDS, _IMPLEMENTED)
    residual.check_groups(sizes["groups"], blocks)
    down = _attending(config, "down", ["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D"])
    up = _attending(config, "up", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1))
    # What the field calls a width is the number of heads: a mistake that checkpoints keep.
    heads = residual.sizes(config, "attention_head_dim", 8, n)
    depths = residual.sizes(config, "transformer_layers_per_block", 1, n)
    for width, count in zip(blocks, heads, strict=True):
        if width % count:
            raise errors.ConfigError(
                f"{width} channels for {count} heads",
                where=hf.CONFIG,
                fix="use the config.json that was saved with the weights",
            )
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise errors.ConfigError(
            f"addition_embed_type {added!r} is not implemented",
            where=hf.CONFIG,
            fix="use a checkpoint with 'text_time' or none",
        )
    numbers = hf.number(config, "addition_time_embed_dim", 0) if added else 0
    if added and not numbers:
        raise errors.ConfigError(
            "addition_embed_type 'text_time' without addition_time_embed_dim",
            where=hf.CONFIG,
            fix="use the config.json that was saved with the weights",
        )
    return UNet(
        **(sizes | dict(blocks=blocks, heads=heads, depths=depths, downs=down, ups=up)),
        linear=hf.flag(config, "use_linear_projection", False),
        cosine_first=hf.flag(config, "flip_sin_to_cos", True),
        shift=hf.number(config, "freq_shift", 0.0, float) if config.get("freq_shift") else 0.0,
        numbers=numbers,
        **dict(dtype=dtype, remat=remat, scan=scan),
    )


def _attending(config, way: str, default) -> tuple[bool, ...]:
    """Whether each block attends to the text."""
    kinds = config.get(f"{way}_block_types") or default
    known = [kind for kind in _KINDS_OF_BLOCKS if way.title() in kind]
    for kind in kinds:
        errors.check_known(f"{way} block", kind, known, where=hf.CONFIG)
    if len(kinds) != len(default):
        raise errors.ConfigError(
            f"{len(kinds)} {way}_block_types of {len(default)} blocks",
            where=hf.CONFIG,
            fix="use the config.json that was saved with the weights",
        )
    return tuple(_KINDS_OF_BLOCKS[kind] for kind in kinds)
