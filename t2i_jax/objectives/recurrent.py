"""A recurrent generator: an LSTM reads the caption, another one paints strip by strip.

It is the historical form of text-to-image, for comparison with the others. The painter learns by
teacher forcing: it gets the true strip before, with a little noise, as its own will not be perfect.
A strip is one of a few whole strips, by a mixture of discretised logistics with one scale each
(PixelCNN++, arXiv:1701.05517, has such mixtures for each pixel). The noise of a drawing decides
which one. What is emitted is the mean of that choice, so that pixels agree with each other.

It edits, too. A network looks at what is given of a picture, and the painter fills the rest. A
share of the examples is trained so, with a rectangle to be filled. The others are wholly open.

B batch · H W pixels · C channels · T strips · P values of a strip · K choices
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import errors, fields, losses, plugins, randomness
from t2i_jax.data import inputs
from t2i_jax.models import recurrent
from t2i_jax.objective import Aux, Loss, Objective, OfBatch, Pictures
from t2i_jax.objectives.parts import boxes
from t2i_jax.text import conditioner

NETS = ("model",)  # that config.model describes
BIT = math.log(2)  # nats


class Options(NamedTuple):
    """config.loss.

    edited: share of the examples of which a picture is given, but for a rectangle.
    noise: standard deviation of what is added to the true strips that the painter gets.
    """

    edited: fields.Share = 0.3
    noise: fields.Weight = 0.05


def make(config) -> Objective:
    """Nets "model" and the frozen "text"; predictions sample, edit, encode, bits.

    `config.model.model` holds the sizes of a `models.recurrent.Painter` but for `res`.
    """
    options = fields.build(Options, config.loss, where="config.loss")
    plugins.check_nets(config.model, NETS)
    sizes = {"res": config.res, **config.model.get("model", {})}
    painter = plugins.network(recurrent.Painter, where="config.model.model", options=sizes)
    if config.res % painter.strip:
        raise errors.ConfigError(
            f"strips of {painter.strip} rows do not fill {config.res}",
            where="config.model.model.strip",
            fix="use a divisor of config.res",
        )
    family = Recurrent(options, painter, conditioner.Conditioner(config))
    predict = {"sample": family.sample, "edit": family.edit}
    predict |= {"encode": family.text.encode, "bits": family.bits}
    read = (*inputs.picture_and_caption(config), inputs.hole(config.res))
    return Objective(family.init, (Loss(("model",), family.loss),), predict, inputs=read)


class Recurrent(NamedTuple):
    """The parts of the family; its methods are the loss and the predictions that `make` names."""

    options: Options
    painter: recurrent.Painter
    text: conditioner.Conditioner

    def init(self, key, batch):
        key_model, key_text = jax.random.split(key)
        text_variables, cond = self.text.init(key_text, batch)
        blank_BHWC, open_BHW1 = self._blank(batch)
        before_BTP = self.painter.strips(blank_BHWC)
        model = self.painter.init(key_model, before_BTP, blank_BHWC, open_BHW1, cond)
        return {"model": model, "text": text_variables}

    def loss(self, nets, batch, key, step):
        """Bits of each value that is open, of each example."""
        keys_B, noise_B = randomness.split_each(randomness.per_example(key, batch["index"]), 2)
        edited_B = jax.vmap(jax.random.uniform)(keys_B) < self.options.edited
        open_BHW1 = batch["hole"] | ~edited_B[:, None, None, None]
        noise_BHWC = randomness.normal_each(noise_B, batch["image"].shape[1:])
        value_B = self._bits(nets, batch, open_BHW1, self.options.noise * noise_BHWC)
        return losses.weighted_mean(value_B, batch["weight"]), Aux()

    # --- predictions ------------------------------------------------------------------------------

    def sample(self, nets, batch, key, *, temperature: fields.Weight = 1.0) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          temperature: of the choice of each strip; 0 takes the likeliest.
        """
        return self._paint(nets, batch, key, *self._blank(batch), temperature)

    def edit(
        self,
        nets,
        batch,
        key,
        *,
        hole: boxes.Box = (0.0, 0.0, 1.0, 0.5),
        temperature: fields.Weight = 1.0,
    ) -> Pictures:
        """Given images with a rectangle painted anew, after the caption.   -> image_BHWC in [-1, 1]

        Args:
          hole: top, left, bottom and right of the rectangle, as shares of the sides.
          temperature: as of `sample`.
        """
        open_BHW1 = boxes.inside(batch["image"], hole)
        return self._paint(nets, batch, key, batch["image"], open_BHW1, temperature)

    def bits(self, nets, batch, key) -> OfBatch:
        """What a batch's images cost, wholly open.   -> (1,) bits of each value"""
        _, open_BHW1 = self._blank(batch)
        value_B = self._bits(nets, batch, open_BHW1, 0.0)
        return losses.weighted_mean(value_B, batch["weight"])[None]

    def _paint(self, nets, batch, key, given_BHWC, open_BHW1, temperature):
        keys_B = randomness.per_example(key, batch["index"])
        shape = (self.painter.res // self.painter.strip, self.painter.choices)
        gumbel_BTK = jax.vmap(lambda one: jax.random.gumbel(one, shape))(keys_B)
        cond = self.text.encode(nets, batch)
        arguments = temperature * gumbel_BTK, given_BHWC, open_BHW1, cond
        return self.painter.apply(nets["model"], *arguments, method="paint")

    def _bits(self, nets, batch, open_BHW1, noise_BHWC):
        """The cost of what is open, given the noisy strips before, in bits of each value.   -> B"""
        strips, image_BHWC = self.painter.strips, batch["image"]
        before_BTP = jnp.pad(strips(image_BHWC + noise_BHWC)[:, :-1], ((0, 0), (1, 0), (0, 0)))
        cond = self.text.encode(nets, batch)
        found = self.painter.apply(nets["model"], before_BTP, image_BHWC, open_BHW1, cond)
        open_BTP = strips(jnp.broadcast_to(open_BHW1, image_BHWC.shape))
        log_p_BTK = mixture(found, strips(image_BHWC), open_BTP)
        return -log_p_BTK.sum(1) / BIT / jnp.maximum(open_BTP.sum(axis=(1, 2)), 1)

    def _blank(self, batch):
        """No picture, and all of it open."""
        shape = (len(batch["index"]), self.painter.res, self.painter.res)
        return jnp.zeros((*shape, 3)), jnp.ones((*shape, 1), bool)


def mixture(found: recurrent.Choices, strips_BTP, open_BTP):
    """The log-probability, in nats, of what is open of each strip.   -> BT"""
    log_p_BTKP = losses.log_logistic(
        strips_BTP[:, :, None], found.mean_BTKP, found.log_scale_BTK[..., None]
    )
    log_p_BTK = (log_p_BTKP * open_BTP[:, :, None]).sum(-1)
    return jax.nn.logsumexp(jax.nn.log_softmax(found.logits_BTK) + log_p_BTK, -1)
