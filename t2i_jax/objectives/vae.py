"""A variational autoencoder whose prior reads the caption.

Latents z₁, z₂, … lie on a ladder of sizes, see `models.vae`. The loss is the negative evidence
bound, the distortion E_q[−log p(x | z, text)] and the rate Σₗ KL(q(zₗ | z₍<l₎, x, text) ‖
p(zₗ | z₍<l₎, text)), in bits of each value of the picture (arXiv:1312.6114, eq. 3; 1711.00464).

The likelihood is a discretised logistic of one learned scale for each channel. That scale weighs
distortion against rate (arXiv:2006.13202). A scale of each pixel would let edges stay blurred, and
pictures drawn from it are grainy. So pictures are its means.

So far latents learn colours from the picture long before the prior learns them from the caption.
Then reconstructions are right, and drawn objects do not follow their captions.

B batch · H W pixels · C channels · G groups of latents
"""

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import errors, fields, losses, plugins, randomness
from t2i_jax.models import vae
from t2i_jax.objective import Aux, Loss, Objective, OfBatch, Pictures
from t2i_jax.sampling import guidance as guide
from t2i_jax.text import condition, conditioner

NETS = ("model",)  # that config.model describes
BIT = math.log(2)  # nats

Guidance = Annotated[float, fields.at_least(0), fields.compiled_apart(guide.NONE)]


class Options(NamedTuple):
    """config.loss.

    free_bits: that each group of latents may cost an example at no price, so that it does not fall
      silent (arXiv:1606.04934, section 3.2). The prior need not foresee these bits. So many of them
      would let pictures leave their captions.
    text_dropout: share of captions replaced by the null condition, see `text.conditioner`.
    """

    free_bits: fields.Weight = 0.1
    text_dropout: Annotated[float | tuple[float, ...], fields.between(0, 1)] = 0.1


def make(config) -> Objective:
    """Nets "model" and the frozen "text"; predictions sample, reconstruct, encode, bits.

    `config.model.model` holds the sizes of a `models.vae.Ladder` but for `res`.
    """
    options = fields.build(Options, config.loss, where="config.loss")
    plugins.check_nets(config.model, NETS)
    if config.res < 16 or config.res & (config.res - 1):
        raise errors.ConfigError(
            f"res is {config.res}", where="config.res", fix="use 16, 32, 64, 128, …"
        )
    sizes = {"res": config.res, **config.model.get("model", {})}
    ladder = plugins.network(vae.Ladder, where="config.model.model", options=sizes)
    text = conditioner.Conditioner(config, text_dropout=options.text_dropout)
    family = VAE(options, ladder, text)
    predict = {"sample": family.sample, "reconstruct": family.reconstruct}
    predict |= {"encode": text.encode, "bits": family.bits}
    return Objective(family.init, (Loss(("model",), family.loss),), predict)


class VAE(NamedTuple):
    """The parts of the family; its methods are the loss and the predictions that `make` names."""

    options: Options
    ladder: vae.Ladder
    text: conditioner.Conditioner

    def init(self, key, batch):
        key_model, key_text = jax.random.split(key)
        text_variables, cond = self.text.init(key_text, batch)
        noise = self._noise(randomness.per_example(key, batch["index"]))
        image_BHWC = jnp.zeros((len(batch["index"]), self.ladder.res, self.ladder.res, 3))
        return {
            "model": self.ladder.init(key_model, noise, cond, image_BHWC),
            "text": text_variables,
        }

    def loss(self, nets, batch, key, step):
        """Bits of each value: those of the picture, and those of latents beyond the free ones."""
        keys_B, drop_B = randomness.split_each(randomness.per_example(key, batch["index"]), 2)
        cond = self.text.drop(self.text.encode(nets, batch), batch, drop_B)
        drawn, distortion_B = self._judged(nets, batch, cond, keys_B)
        mean = lambda value_B: losses.weighted_mean(value_B, batch["weight"])
        paid_B = jnp.maximum(drawn.rate_BG / BIT, self.options.free_bits).sum(1)
        metrics = {
            "rate": mean(drawn.rate_BG.sum(1) / BIT),
            "distortion": mean(distortion_B),
            "psnr": mean(losses.psnr(jnp.clip(drawn.mean_BHWC, -1, 1), batch["image"])),
        }
        return mean(distortion_B + paid_B) / self._values, Aux(metrics)

    # --- predictions ------------------------------------------------------------------------------

    def sample(
        self,
        nets,
        batch,
        key,
        *,
        temperature: fields.Weight = 1.0,
        guidance: Guidance = guide.NONE,
    ) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          temperature: factor of the standard deviation of the latents: below 1, pictures are nearer
            to what the caption usually gives, and less varied.
          guidance: how far the means of the latents lie beyond those without a caption, 1 is none.
        """
        cond = self.text.encode(nets, batch)
        noise = self._noise(randomness.per_example(key, batch["index"]))
        noise = [temperature * one for one in noise]
        if guide.is_none(guidance):
            return self._picture(self.ladder.apply(nets["model"], noise, cond))
        null = self.text.negative(nets, batch)
        if null is None:
            null = condition.drop(cond, jnp.ones(batch["index"].shape, bool))
        pair = jax.tree.map(guide.interleave, cond, null)
        noise = [guide.interleave(one, one) for one in noise]
        drawn = self.ladder.apply(nets["model"], noise, pair, guidance=guidance)
        return self._picture(drawn)[::2]

    def reconstruct(self, nets, batch, key) -> Pictures:
        """Images drawn from latents of the posterior of given ones.   -> image_BHWC in [-1, 1]"""
        keys_B = randomness.per_example(key, batch["index"])
        drawn, _ = self._judged(nets, batch, self.text.encode(nets, batch), keys_B)
        return self._picture(drawn)

    def bits(self, nets, batch, key) -> OfBatch:
        """The evidence bound of a batch's images, without free bits and dropped captions.

        -> (1,) bits of each value
        """
        keys_B = randomness.per_example(key, batch["index"])
        drawn, distortion_B = self._judged(nets, batch, self.text.encode(nets, batch), keys_B)
        value_B = (distortion_B + drawn.rate_BG.sum(1) / BIT) / self._values
        return losses.weighted_mean(value_B, batch["weight"])[None]

    def _judged(self, nets, batch, cond, keys_B):
        """How latents of the posterior draw the batch's images, and what these cost in bits."""
        drawn = self.ladder.apply(nets["model"], self._noise(keys_B), cond, batch["image"])
        log_p = losses.log_logistic(batch["image"], drawn.mean_BHWC, drawn.log_scale_C)
        return drawn, -log_p.sum(axis=(1, 2, 3)) / BIT

    def _noise(self, keys_B):
        shapes = self.ladder.noise_shapes
        keys = randomness.split_each(keys_B, len(shapes))
        return [randomness.normal_each(*pair) for pair in zip(keys, shapes, strict=True)]

    @property
    def _values(self) -> int:
        """Numbers of a picture."""
        return 3 * self.ladder.res**2

    @staticmethod
    def _picture(drawn: vae.Drawn):
        return jnp.clip(drawn.mean_BHWC, -1, 1)
