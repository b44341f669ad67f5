"""Masked codes: a picture is guessed in a few passes, each of which keeps its surest codes.

MaskGIT (arXiv:2202.04200) and, with captions, Muse (arXiv:2301.00704). The codes are a frozen
autoencoder's. At time 0 all codes of a picture are seen, at time 1 none.

B batch · H W pixels · h w codes of a picture · N = h·w of them · K kinds of codes
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import fields, losses, plugins, randomness
from t2i_jax.objective import Aux, Loss, Objective, OfBatch, Pictures
from t2i_jax.objectives.parts import boxes, codes
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import tokens
from t2i_jax.text import condition, conditioner

NETS = ("model", codes.NET)  # that config.model describes
HELD_OUT_TIMES = tuple((i + 0.5) / 8 for i in range(8))

Steps = Annotated[int, fields.count()]


class Options(NamedTuple):
    """config.loss.

    text_dropout: share of captions replaced by the null condition, or a share for each encoder,
      see `text.conditioner`.
    smoothing: share of a target that all codes have alike.
    """

    text_dropout: Annotated[float | tuple[float, ...], fields.between(0, 1)] = 0.1
    smoothing: fields.Share = 0.1


def make(config) -> Objective:
    """Nets "model" and the frozen "text" and "autoencoder"; predictions sample, inpaint, outpaint,
    encode, codes, loss_at_times.

    `config.model.autoencoder` describes the tokenizer as `parts.autoencoders` says,
    `config.model.model` holds sizes of `models.codes.Network`.
    """
    family = Masked(config)
    predict = {"sample": family.sample, "inpaint": family.inpaint, "outpaint": family.outpaint}
    predict |= {"encode": family.text.encode, "codes": family.codes}
    predict["loss_at_times"] = family.loss_at_times
    return Objective(family.init, (Loss(("model",), family.loss),), predict, cached=codes.CACHED)


def hidden_share(t):
    """The share of a picture's codes that are hidden at a time: MaskGIT's cosine of 1 − t."""
    return jnp.sin(0.5 * jnp.pi * t)


class Masked:
    """The parts of the objective, and what is made of them."""

    def __init__(self, config):
        self.options = options = fields.build(Options, config.loss, where="config.loss")
        plugins.check_nets(config.model, NETS)
        self.tokenizer, self.space = codes.tokenizer(config)
        self.hidden = self.tokenizer.num_codes  # stands in place of a hidden code
        given = self.tokenizer.num_codes, self.space.shape
        self.model = codes.network(config, *given, causal=False)
        self.text = conditioner.Conditioner(config, text_dropout=options.text_dropout)

    def init(self, key, batch):
        key_model, key_text, key_space = jax.random.split(key, 3)
        text_variables, cond = self.text.init(key_text, batch)
        code_BN = jnp.zeros((len(batch["index"]), self.count), jnp.int32)
        nets = {"model": self.model.init(key_model, code_BN, cond), "text": text_variables}
        return nets | {name: init(key_space, batch) for name, init in self.space.init.items()}

    @property
    def count(self) -> int:
        """N, the codes of a picture."""
        return self.space.shape[0] * self.space.shape[1]

    def codes(self, nets, batch, key):
        """The codes of images.   -> int32 Bhw"""
        return {"codes": self.space.encode(nets, batch)}

    # ---- Training ----

    def loss_at(self, nets, code_BN, cond, score_BN, t_B):
        """The mean cross-entropy of the codes that are hidden at a time, of each example.   -> B

        score_BN: noise; the codes of the lowest are hidden, one at least.
        """
        many_B = jnp.ceil(hidden_share(t_B) * self.count).clip(1, self.count)
        hidden_BN = _lowest(score_BN, many_B)
        seen_BN = jnp.where(hidden_BN, self.hidden, code_BN)
        logits_BNK = self.model.apply(nets["model"], seen_BN, cond)
        value_BN = losses.cross_entropy(logits_BNK, code_BN, self.options.smoothing)
        return (value_BN * hidden_BN).sum(1) / many_B

    def loss(self, nets, batch, key, step):
        keys = randomness.split_each(randomness.per_example(key, batch["index"]), 3)
        t_B, score_BN = jax.vmap(jax.random.uniform)(keys[0]), self._scores(keys[1])
        cond = self.text.drop(self.text.encode(nets, batch), batch, keys[2])
        value_B = self.loss_at(nets, self._read(nets, batch), cond, score_BN, t_B)
        return losses.weighted_mean(value_B, batch["weight"]), Aux()

    def loss_at_times(self, nets, batch, key) -> OfBatch:
        """The training loss of a batch at eight fixed times, without dropout.   -> (8,)"""
        score_BN = self._scores(randomness.per_example(key, batch["index"]))
        code_BN, cond = self._read(nets, batch), self.text.encode(nets, batch)

        def at(t):
            value_B = self.loss_at(nets, code_BN, cond, score_BN, jnp.full(len(code_BN), t))
            return losses.weighted_mean(value_B, batch["weight"])

        # One time after another: all at once would need the memory of eight batches.
        return jax.lax.map(at, jnp.array(HELD_OUT_TIMES))

    def _scores(self, keys_B):
        return jax.vmap(lambda key: jax.random.uniform(key, (self.count,)))(keys_B)

    def _read(self, nets, batch):
        """The codes of a batch's images.   -> BN"""
        return self.space.encode(nets, batch).reshape(-1, self.count)

    # ---- Drawing ----

    def sample(
        self,
        nets,
        batch,
        key,
        *,
        guidance: tokens.Guidance = 3.0,
        steps: Steps = 12,
        temperature: tokens.Temperature = 4.5,
    ) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          guidance: scale of classifier-free guidance of logits, 1 is none.
          steps: passes of the network.
          temperature: of the noise on how sure codes are; it falls to 0 towards the last step.
        """
        code_BN = jnp.zeros((len(batch["index"]), self.count), jnp.int32)
        every_BN = jnp.ones(code_BN.shape, bool)
        how = dict(guidance=guidance, steps=steps, temperature=temperature)
        return self._shown(nets, self.guessed(nets, batch, key, code_BN, every_BN, **how))

    def inpaint(
        self,
        nets,
        batch,
        key,
        *,
        box: boxes.Box = (0.25, 0.25, 0.75, 0.75),
        guidance: tokens.Guidance = 3.0,
        steps: Steps = 12,
        temperature: tokens.Temperature = 4.5,
    ) -> Pictures:
        """Images that are given ones but for a hole, which is drawn.   -> image_BHWC in [-1, 1]

        A code is drawn where any of its pixels lies in the hole. Pixels beyond it stay as they are.

        Args:
          box: the hole's top, left, bottom and right as shares of the sides. A batch that holds
            "hole", bool BHW1, has its own.
          guidance, steps, temperature: as of `sample`.
        """
        hole_BHW1 = batch["hole"] if "hole" in batch else boxes.inside(batch["image"], box)
        how = dict(guidance=guidance, steps=steps, temperature=temperature)
        return self._filled(nets, batch, key, hole_BHW1, **how)

    def outpaint(
        self,
        nets,
        batch,
        key,
        *,
        box: boxes.Box = (0.25, 0.25, 0.75, 0.75),
        guidance: tokens.Guidance = 3.0,
        steps: Steps = 12,
        temperature: tokens.Temperature = 4.5,
    ) -> Pictures:
        """Images of which a part is given, and the rest is drawn.   -> image_BHWC in [-1, 1]

        Args:
          box: what is given, as of `inpaint`.
          guidance, steps, temperature: as of `sample`.
        """
        how = dict(guidance=guidance, steps=steps, temperature=temperature)
        return self._filled(nets, batch, key, ~boxes.inside(batch["image"], box), **how)

    def _filled(self, nets, batch, key, hole_BHW1, **how):
        """The batch's images, drawn within the hole."""
        side = self.tokenizer.factor
        h, w = self.space.shape
        open_Bhw = hole_BHW1.reshape(-1, h, side, w, side).any((2, 4))
        code_BN, open_BN = self._read(nets, batch), open_Bhw.reshape(-1, self.count)
        code_BN = self.guessed(nets, batch, key, code_BN, open_BN, **how)
        return jnp.where(hole_BHW1, self._shown(nets, code_BN), batch["image"])

    def guessed(self, nets, batch, key, code_BN, open_BN, *, guidance, steps, temperature):
        """The codes with those guessed that are open; all others stay.   -> BN

        MaskGIT's decoding: a pass draws all hidden codes, and the least sure are hidden again.
        """
        keys_B = randomness.per_example(key, batch["index"])
        cond, null = self.text.encode(nets, batch), self.text.negative(nets, batch)
        if null is None:
            # Training drops captions to the same null condition.
            null = condition.drop(cond, jnp.ones(len(code_BN), bool))

        def under(cond):
            prepared = self.model.apply(nets["model"], cond, method="prepare")
            return lambda seen, t: self.model.apply(nets["model"], seen, cond, prepared)

        pair = under(jax.tree.map(guide.interleave, cond, null))
        logits = guide.cfg(pair, under(cond), guidance, guide.ALWAYS)

        def step(n, seen_BN):
            t = 1 - (n + 1) / steps  # after this step
            draw_B, noise_B = randomness.split_each(randomness.fold_each(keys_B, n), 2)
            guess_BN, sure_BN = _guess(logits(seen_BN, t), draw_B)
            sure_BN += temperature * t * tokens.gumbel_each(noise_B, (self.count,))
            hidden_BN = seen_BN == self.hidden
            many_B = jnp.floor(hidden_share(t) * open_BN.sum(1))
            # What is seen is as sure as can be, so it is never hidden again.
            again_BN = _lowest(jnp.where(hidden_BN, sure_BN, jnp.inf), many_B)
            return jnp.where(hidden_BN & ~again_BN, guess_BN, seen_BN)

        return jax.lax.fori_loop(0, steps, step, jnp.where(open_BN, self.hidden, code_BN))

    def _shown(self, nets, code_BN):
        return self.space.decode(nets, code_BN.reshape(-1, *self.space.shape))


def _guess(logits_BNK, keys_B):
    """A draw of each code, and the logarithm of its probability.   -> BN, BN"""
    noise_BNK = tokens.gumbel_each(keys_B, logits_BNK.shape[1:])
    guess_BN = jnp.argmax(logits_BNK + noise_BNK, -1).astype(jnp.int32)
    return guess_BN, -losses.cross_entropy(logits_BNK, guess_BN)


def _lowest(score_BN, many_B):
    """Where the `many_B` lowest scores of each row are.   -> bool BN"""
    rank_BN = jnp.argsort(jnp.argsort(score_BN, axis=1), axis=1)
    return rank_BN < many_B[:, None]
