"""Recurrent nets that read a caption word by word and paint a picture strip by strip.

The historical form of text-to-image (arXiv:1511.02793), for comparison: LSTMs, no attention. A
strip is a few rows of pixels. The painter knows the caption's last state, which part of a picture
is given, and the strip before.

B batch · H W pixels · C channels · S text tokens · T strips · P values of a strip · K choices
D width
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.models import blocks, layers, pyramid, unet
from t2i_jax.models.types import Cond

# One cell for all steps, along the second axis of what it reads and gives.
STEPS = dict(variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)


class Choices(NamedTuple):
    """What a strip may be: a mixture of K whole strips.

    logits_BTK: of the choice.   mean_BTKP, log_scale_BTK: of a logistic of each value.
    """

    logits_BTK: jax.Array
    mean_BTKP: jax.Array
    log_scale_BTK: jax.Array


class Reader(nn.Module):
    """One step of an LSTM that reads tokens. One that is not real changes nothing."""

    width: int

    @nn.compact
    def __call__(self, carry, x_BD, real_B):
        read, _ = nn.OptimizedLSTMCell(self.width)(carry, x_BD)
        keep = lambda new, old: jnp.where(real_B[:, None], new, old)
        return jax.tree.map(keep, read, carry), None


def still(x_BTD):
    """The state of an LSTM that has read nothing."""
    return (jnp.zeros_like(x_BTD[:, 0]),) * 2


class Painter(nn.Module):
    """Captions and what is given of pictures -> what each strip may be.

    res: pixels a side.
    strip: rows of pixels painted in one step, a divisor of `res`.
    width: of both LSTMs.
    depth: blocks of the network that looks at given pictures.
    channels: of that network.
    choices: what a strip may be at once.
    """

    res: fields.Size = 32
    strip: fields.Size = 2
    width: fields.Size = 384
    depth: fields.Size = 1
    channels: fields.Size = 32
    choices: fields.Size = 8

    def setup(self):
        steps, values = self.res // self.strip, self.strip * self.res * 3
        self.words = layers.TextTokens(self.width)
        self.reader = nn.scan(Reader, **STEPS)(self.width)
        self.caption = layers.Dense(self.width)
        self.eye_enter = unet.Conv(self.channels)
        self.eye_blocks = [pyramid.Plain() for _ in range(self.depth)]
        self.eye = layers.Dense(self.width)
        self.place = blocks.Value((steps, self.width))
        self.enter = layers.Dense(self.width)
        self.cell = nn.OptimizedLSTMCell(self.width)
        self.leave = layers.Dense(self.choices * (2 + values))

    def context(self, given_BHWC, open_BHW1, cond: Cond):
        """What each step knows from the start: caption, place, and the picture there.   -> BTD

        Args:
          given_BHWC: a picture. Nothing of it is read where it is open.
          open_BHW1: True where it is still to be painted.
        """
        tokens_BSD, mask_BS = self.words(cond.seq_BLD, cond.mask_BL)
        (_, caption_BD), _ = self.reader(still(tokens_BSD), tokens_BSD, mask_BS)
        seen = jnp.concatenate([jnp.where(open_BHW1, 0, given_BHWC), ~open_BHW1], -1)
        x = self.eye_enter(layers.space_to_depth(seen, self.strip))
        for block in self.eye_blocks:
            x = block(x)
        seen_BTD = self.eye(x.reshape(*x.shape[:2], -1))
        return seen_BTD + self.caption(caption_BD)[:, None] + self.place()

    def __call__(self, before_BTP, given_BHWC, open_BHW1, cond: Cond) -> Choices:
        """What each strip may be, given the true strips before (teacher forcing)."""
        x_BTD = self.enter(before_BTP) + self.context(given_BHWC, open_BHW1, cond)
        run = nn.scan(lambda self, carry, x_BD: self.cell(carry, x_BD), **STEPS)
        _, h_BTD = run(self, still(x_BTD), x_BTD)
        return self._choices(h_BTD, before_BTP)

    def paint(self, gumbel_BTK, given_BHWC, open_BHW1, cond: Cond):
        """A picture painted strip by strip, where it is open.   -> BHWC

        Each step takes the most likely choice, after `gumbel_BTK` is added to the logits.
        """
        context_BTD = self.context(given_BHWC, open_BHW1, cond)
        given_BTP, open_BTP = (
            self.strips(jnp.broadcast_to(x, given_BHWC.shape)) for x in (given_BHWC, open_BHW1)
        )

        def step(self, carry, inputs):
            lstm, before_BP = carry
            context_BD, gumbel_BK, given_BP, open_BP = inputs
            lstm, h_BD = self.cell(lstm, self.enter(before_BP) + context_BD)
            found = self._choices(h_BD[:, None], before_BP[:, None])
            best_B = jnp.argmax(found.logits_BTK[:, 0] + gumbel_BK, -1)
            painted_BP = jnp.take_along_axis(found.mean_BTKP[:, 0], best_B[:, None, None], 1)[:, 0]
            painted_BP = jnp.where(open_BP, jnp.clip(painted_BP, -1, 1), given_BP)
            return (lstm, painted_BP), painted_BP

        start = still(context_BTD), jnp.zeros_like(given_BTP[:, 0])
        inputs = context_BTD, gumbel_BTK, given_BTP, open_BTP
        _, painted_BTP = nn.scan(step, **STEPS)(self, start, inputs)
        return painted_BTP.reshape(given_BHWC.shape)

    def strips(self, x_BHWC):
        """A picture cut into strips, from the top.   -> BTP"""
        return x_BHWC.reshape(len(x_BHWC), self.res // self.strip, -1)

    def _choices(self, h_BTD, before_BTP) -> Choices:
        out_BTKV = self.leave(h_BTD).reshape(*h_BTD.shape[:2], self.choices, -1)
        # A strip is mostly as the one before it, so that nets learn what changes.
        mean_BTKP = before_BTP[:, :, None] + out_BTKV[..., 2:]
        return Choices(out_BTKV[..., 0], mean_BTKP, out_BTKV[..., 1] - 1)
