"""Parts of pretrained diffusion transformers: norms, modulation, MLPs and joint attention.

Submodules are called as in diffusers where they can be. The streams of tokens are float32; `dtype`
is that of the products, as in `models.transformer`.

B batch · T image tokens · S text tokens · D width · N heads · H head width
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.models import attention, layers
from t2i_jax.models.layers import flat
from t2i_jax.pretrained.embedding import PERIOD, Embedding, waves

SINUSOIDS = 256  # of a time or a guidance scale


def norm(x_BTD):
    """Layer norm without parameters, float32 (DiT, arXiv:2212.09748)."""
    # In two passes: the mean of squares minus the squared mean loses digits.
    wide = x_BTD.astype(jnp.float32)
    wide -= wide.mean(-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)


def entered(x_BTD, shift_BD, scale_BD):
    """The normed tokens, shifted and scaled."""
    return layers.modulate(norm(x_BTD), shift_BD, scale_BD)


class Modulation(nn.Module):
    """`parts` vectors of the condition's width, of its activated embedding (adaLN)."""

    width: int
    parts: int
    dtype: str = "float32"

    def setup(self):
        self.linear = nn.Dense(self.parts * self.width, dtype=self.dtype)

    def __call__(self, c_BD):
        return jnp.split(self.linear(nn.silu(c_BD)).astype(jnp.float32), self.parts, -1)


class Condition(nn.Module):
    """One vector from time, pooled text and perhaps a guidance scale, float32.   -> BD"""

    width: int
    guided: bool = False

    def setup(self):
        self.timestep_embedder, self.text_embedder = (Embedding(self.width) for _ in range(2))
        if self.guided:
            self.guidance_embedder = Embedding(self.width)

    def of_text(self, pooled_BD, guidance_B=None):
        """What does not depend on the time."""
        c_BD = self.text_embedder(pooled_BD)
        return c_BD + self.guidance_embedder(waves(guidance_B, SINUSOIDS)) if self.guided else c_BD

    def __call__(self, t_B, of_text_BD):
        return self.timestep_embedder(waves(t_B, SINUSOIDS)) + of_text_BD


class FeedForward(nn.Module):
    """Two layers with the GELU's tanh form between them."""

    width: int
    dtype: str

    def setup(self):
        self.up = nn.Dense(4 * self.width, dtype=self.dtype)
        self.down = nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x_BTD):
        return flat(self.down, nn.gelu(flat(self.up, x_BTD)))


def feed_forward_names(path: str) -> dict[str, str]:
    """The table of a FeedForward's tensors, see `tensors.Names`."""
    theirs = path.replace("_{}", ".{}").replace("/", ".")
    return {f"{path}/up": f"{theirs}.net.0.proj", f"{path}/down": f"{theirs}.net.2"}


class Heads(nn.Module):
    """Queries, keys and values of tokens, perhaps normed by head.   -> 3 × BTNH"""

    heads: int
    head_width: int
    normed: bool
    dtype: str

    def setup(self):
        width = self.heads * self.head_width
        self.q, self.k, self.v = (nn.Dense(width, dtype=self.dtype) for _ in range(3))
        if self.normed:
            self.norm_q, self.norm_k = (nn.RMSNorm(1e-6, dtype="float32") for _ in range(2))

    def __call__(self, x_BTD):
        qkv = (flat(fn, x_BTD.astype(self.dtype)) for fn in (self.q, self.k, self.v))
        q_BTNH, k_BTNH, v_BTNH = (attention.split_heads(x, self.heads) for x in qkv)
        if self.normed:
            q_BTNH, k_BTNH = (
                fn(x).astype(x.dtype) for fn, x in ((self.norm_q, q_BTNH), (self.norm_k, k_BTNH))
            )
        return q_BTNH, k_BTNH, v_BTNH


class JointAttention(nn.Module):
    """Image and text tokens attend to all of both (SD 3, arXiv:2403.03206, section 4).

    text: whether there are text tokens.   last: the text's outputs are not needed.
    """

    width: int
    heads: int
    head_width: int
    normed: bool
    dtype: str
    text: bool = True
    last: bool = False

    def setup(self):
        sizes = (self.heads, self.head_width, self.normed, self.dtype)
        dense = lambda: nn.Dense(self.width, dtype=self.dtype)
        self.image, self.out = Heads(*sizes), dense()
        if self.text:
            self.context = Heads(*sizes)
        if self.text and not self.last:
            self.context_out = dense()

    def __call__(self, x_BTD, text_BSD=None, turn=lambda x: x):
        """The outputs of image and text tokens; without outputs of text, None.

        turn: changes queries and keys of the image's tokens, by their places.
        """
        q, k, v = self.image(x_BTD)
        parts, count = [turn(q), turn(k), v], x_BTD.shape[1]
        if self.text:
            more = self.context(text_BSD)
            parts = [jnp.concatenate(pair, 1) for pair in zip(parts, more, strict=True)]
        seen_BTD = attention.merge_heads(attention.attention(*parts))
        out_BTD = flat(self.out, seen_BTD[:, :count])
        if not self.text or self.last:
            return out_BTD, None
        return out_BTD, flat(self.context_out, seen_BTD[:, count:])


def joint_names(block: str) -> dict:
    """The table of a joint attention's tensors in `block`, and of a second one of the image."""
    theirs, table = block.replace("_{}", ".{}").replace("/", "."), {}
    for name in ("attn", "attn2"):
        path, one = f"{block}/{name}", f"{theirs}.{name}"
        table |= {f"{path}/image/{x}": f"{one}.to_{x}" for x in "qkv"}
        table |= {f"{path}/context/{x}": f"{one}.add_{x}_proj" for x in "qkv"}
        table[f"{path}/out"], table[f"{path}/context_out"] = f"{one}.to_out.0", f"{one}.to_add_out"
        for x in "qk":
            table[f"{path}/image/norm_{x}"] = f"{one}.norm_{x}"
            table[f"{path}/context/norm_{x}"] = f"{one}.norm_added_{x}"
    return table


class JointBlock(nn.Module):
    """Joint attention, then an MLP for image and text each, all modulated by the condition.

    dual: the image also attends to itself alone (SD 3.5).
    last: the text ends here.
    """

    width: int
    heads: int
    head_width: int
    normed: bool
    dtype: str
    dual: bool = False
    last: bool = False

    def setup(self):
        sizes = (self.width, self.heads, self.head_width, self.normed, self.dtype)
        self.norm1 = Modulation(self.width, 9 if self.dual else 6)
        self.norm1_context = Modulation(self.width, 2 if self.last else 6)
        self.attn = JointAttention(*sizes, last=self.last)
        if self.dual:
            self.attn2 = JointAttention(*sizes, text=False)
        self.ff = FeedForward(self.width, self.dtype)
        if not self.last:
            self.ff_context = FeedForward(self.width, self.dtype)

    def __call__(self, tokens, c_BD, turn=lambda x: x):
        """tokens: x_BTD of the image, text_BSD; returned in the same form, and None."""
        x_BTD, text_BSD = tokens
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(c_BD)
        text = self.norm1_context(c_BD)
        # The last block's modulation of the text stands the other way round.
        h_text = entered(text_BSD, *(text[::-1] if self.last else text[:2]))
        out, out_text = self.attn(entered(x_BTD, shift, scale), h_text, turn)
        if self.dual:
            shift2, scale2, gate2 = second
            # It reads the block's input, too, not what the first attention adds.
            out2, _ = self.attn2(entered(x_BTD, shift2, scale2))
        x_BTD = x_BTD + layers.gate(out, gate)
        x_BTD = x_BTD + layers.gate(out2, gate2) if self.dual else x_BTD
        h = self.ff(entered(x_BTD, shift_mlp, scale_mlp).astype(self.dtype))
        x_BTD = x_BTD + layers.gate(h, gate_mlp)
        if self.last:
            return (x_BTD, None), None
        text_BSD = text_BSD + layers.gate(out_text, text[2])
        h = self.ff_context(entered(text_BSD, text[3], text[4]).astype(self.dtype))
        return (x_BTD, text_BSD + layers.gate(h, text[5])), None


def sincos_2d(rows, columns, width: int):
    """Sines and cosines of places on a grid: half of the width for columns, then for rows (PixArt
    and SD 3).   -> (rows · columns, width) float32
    """
    quarter = width // 4
    rates = PERIOD ** -(np.arange(quarter, dtype=np.float64) / quarter)
    turn = lambda x: np.concatenate([np.sin(x), np.cos(x)], -1)
    across = np.tile(turn(np.outer(columns, rates))[None], (len(rows), 1, 1))
    down = np.tile(turn(np.outer(rows, rates))[:, None], (1, len(columns), 1))
    return np.concatenate([across, down], -1).reshape(-1, width).astype(np.float32)
