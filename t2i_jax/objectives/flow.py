"""Flow matching: a network learns the velocity from noise to picture.

Rectified flow z_t = (1 − t)·x + t·ε with velocity v = ε − x (arXiv:2209.03003, 2210.02747), times
logit-normal (arXiv:2403.03206), text by cross-attention, captions dropped for guidance.

B batch · H W pixels · C channels · L text length · D width · S solver steps
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import fields, losses, plugins, randomness
from t2i_jax.models import backbone
from t2i_jax.objective import Aux, Loss, Objective
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import ode, prediction
from t2i_jax.text import condition, conditioner

TIME_FLOOR = 0.2  # an x-prediction's loss is weighted by 1/t² down to here
NETS = ("model",)  # that config.model describes
HELD_OUT_TIMES = tuple((i + 0.5) / 8 for i in range(8))


Guidance = Annotated[float, fields.at_least(0), fields.compiled_apart(guide.NONE)]
Interval = Annotated[tuple[float, float], fields.at_least(0), fields.compiled_apart(guide.ALWAYS)]
Steps = Annotated[int, fields.count()]
Output = prediction.Kind


class Options(NamedTuple):
    """config.loss.

    prediction: what the network puts out, see `sampling.prediction`; the loss is the velocity's
      squared error, of "x" times min(t/0.2, 1)²: where little noise is left the network would spend
      most of it on pixels that are right.
    time_mean, time_std: of the normal whose sigmoid is the training time; 1 is noise.
    text_dropout: share of captions replaced by the null condition, or a share for each encoder,
      see `text.conditioner`.
    train_text: the text encoder learns, too, from its own entry of config.optim.
    """

    prediction: Output = "v"
    time_mean: float = 0.0
    time_std: fields.Weight = 1.0
    text_dropout: Annotated[float | tuple[float, ...], fields.between(0, 1)] = 0.1
    train_text: bool = False


def model_by_net(model, load):
    """`config.model`, whose sizes older versions wrote without the net's name."""
    flat = any(not hasattr(value, "items") for value in model.values())
    return {"model": model} if flat else model


def make(config) -> Objective:
    """Nets "model" and "text", the latter frozen or trained, too; predictions sample, img2img,
    encode, loss_at_times.

    `config.model.model`: `backbone`, a file of `t2i_jax/models/`, and its sizes.
    """
    options = fields.build(Options, config.loss, where="config.loss")
    plugins.check_nets(config.model, NETS)
    sizes = config.model.get("model", {})
    model = backbone.build(sizes, res=config.res, where="config.model.model")
    text = conditioner.Conditioner(
        config, text_dropout=options.text_dropout, train_text=options.train_text
    )
    shape_HWC = (config.res, config.res, 3)

    def init(key, batch):
        key_model, key_text = jax.random.split(key)
        text_variables, cond = text.init(key_text, batch)
        t_B = jnp.zeros(len(batch["index"]))
        image_BHWC = jnp.zeros((t_B.shape[0], *shape_HWC))
        return {"model": model.init(key_model, image_BHWC, t_B, cond), "text": text_variables}

    def velocity(nets, z_BHWC, t_B, cond, text_kv=None):
        out_BHWC = model.apply(nets["model"], z_BHWC, t_B, cond, text_kv)
        return prediction.velocity(options.prediction, out_BHWC, z_BHWC, t_B)

    def loss_at(nets, batch, cond, noise_BHWC, t_B):
        t = t_B[:, None, None, None]
        z_BHWC = (1 - t) * batch["image"] + t * noise_BHWC
        error_B = losses.squared_error(
            velocity(nets, z_BHWC, t_B, cond), noise_BHWC - batch["image"]
        )
        if options.prediction == "x":
            error_B *= jnp.minimum(t_B / TIME_FLOOR, 1) ** 2
        return error_B

    def loss(nets, batch, key, step):
        keys = randomness.split_each(randomness.per_example(key, batch["index"]), 3)
        noise_BHWC = randomness.normal_each(keys[0], shape_HWC)
        t_B = jax.nn.sigmoid(
            options.time_mean + options.time_std * randomness.normal_each(keys[1], ())
        )
        cond = text.drop(text.encode(nets, batch), batch, keys[2])
        value_B = loss_at(nets, batch, cond, noise_BHWC, t_B)
        return losses.weighted_mean(value_B, batch["weight"]), Aux()

    def loss_at_times(nets, batch, key):
        """The training loss of a batch at eight fixed times, without dropout.   -> (8,)"""
        keys_B = randomness.per_example(key, batch["index"])
        noise_BHWC, cond = randomness.normal_each(keys_B, shape_HWC), text.encode(nets, batch)

        def at(t):
            value_B = loss_at(nets, batch, cond, noise_BHWC, jnp.full(keys_B.shape, t))
            return losses.weighted_mean(value_B, batch["weight"])

        return jax.lax.map(at, jnp.array(HELD_OUT_TIMES))

    def sample(
        nets,
        batch,
        key,
        *,
        guidance: Guidance = 3.0,
        steps: Steps = 12,
        sampler: ode.Sampler = "heun",
        shift: ode.Shift = 1.0,
        interval: Interval = guide.ALWAYS,
    ):
        """Pictures for captions.   -> image_BHWC in [-1, 1]

        Args:
          guidance: scale of classifier-free guidance, 1 is none.
          steps: solver steps; heun calls the network twice in each.
          sampler: "euler" or "heun".
          shift: above 0; above 1, more of the steps go to noisy times, where the layout is decided.
          interval: times between which guidance acts, 1 is noise and 0 the picture.
        """
        keys_B = randomness.per_example(key, batch["index"])
        noise_BHWC = randomness.normal_each(keys_B, shape_HWC)
        ts_S = ode.times(steps, shift)
        return solved(nets, batch, noise_BHWC, ts_S, guidance, sampler, interval)

    def img2img(
        nets,
        batch,
        key,
        *,
        strength: fields.Share = 0.7,
        guidance: Guidance = 3.0,
        steps: Steps = 12,
        sampler: ode.Sampler = "heun",
        shift: ode.Shift = 1.0,
        interval: Interval = guide.ALWAYS,
    ):
        """What becomes of the batch's pictures where noise of time `strength` is put on them and
        taken off again (SDEdit, arXiv:2108.01073); the noise is that of `sample`.   -> image_BHWC
        in [-1, 1]

        Args:
          strength: 0 … 1; 0 leaves the pictures, 1 draws others.
          guidance, steps, sampler, interval: as of `sample`.
          shift: as of `sample`, of the times up to `strength`.
        """
        keys_B = randomness.per_example(key, batch["index"])
        noise_BHWC = randomness.normal_each(keys_B, shape_HWC)
        start_BHWC = (1 - strength) * batch["image"] + strength * noise_BHWC
        ts_S = strength * ode.times(steps, shift)
        return solved(nets, batch, start_BHWC, ts_S, guidance, sampler, interval)

    def solved(nets, batch, start_BHWC, ts_S, guidance, sampler, interval):
        """The pictures that guided flow leads to.   -> image_BHWC in [-1, 1]"""
        cond = text.encode(nets, batch)

        def under(cond):
            text_kv = model.apply(nets["model"], cond, method="text_kv")
            return lambda z_BHWC, t_B: velocity(nets, z_BHWC, t_B, cond, text_kv)

        null = text.negative(nets, batch)
        if null is None:
            null = condition.drop(cond, jnp.ones(batch["index"].shape, bool))
        pair = under(jax.tree.map(guide.interleave, cond, null))
        field = guide.cfg(pair, under(cond), guidance, interval)
        return jnp.clip(ode.SOLVERS[sampler](field, start_BHWC, ts_S), -1, 1)

    predict = {"sample": sample, "img2img": img2img, "encode": text.encode}
    predict["loss_at_times"] = loss_at_times
    trained = ("model", "text") if options.train_text else ("model",)
    return Objective(init, (Loss(trained, loss),), predict)
