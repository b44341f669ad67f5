"""Flow matching and diffusion: a network learns the way from noise to images.

The way is a `sampling.path`: by default rectified flow, z_t = (1 − t)·x + t·ε with the velocity
ε − x (arXiv:2209.03003, 2210.02747). What lies on it is of a `space`: by default an image. The
network reads the caption by cross-attention. Captions are dropped for guidance (arXiv:2207.12598).

B batch · H W pixels · C channels · S solver steps
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import fields, losses, plugins, randomness
from t2i_jax import space as spaces
from t2i_jax.models import backbone
from t2i_jax.objective import Aux, Cached, Loss, Objective, OfBatch, Pictures
from t2i_jax.objectives.parts import autoencoders
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import ode
from t2i_jax.sampling import path as paths
from t2i_jax.text import condition, conditioner

NETS = ("model", autoencoders.NET)  # that config.model describes
HELD_OUT_TIMES = tuple((i + 0.5) / 8 for i in range(8))


Guidance = Annotated[float, fields.at_least(0), fields.compiled_apart(guide.NONE)]
Interval = Annotated[
    tuple[float, float],
    fields.at_least(0),
    fields.ascending(),
    fields.compiled_apart(guide.ALWAYS),
]
Steps = Annotated[int, fields.count()]


class Options(NamedTuple):
    """config.loss.

    path: from image to noise: "straight", or the discrete schedule of `sampling.path` with that
      name. It says what the loss compares.
    prediction: what the network puts out, one of the path's kinds.
    time_mean, time_std: of the normal that training times come from, see the path.
    text_dropout: share of captions replaced by the null condition, or a share for each encoder,
      see `text.conditioner`.
    train_text: the text encoder learns, too, from its own entry of config.optim.
    """

    path: Annotated[str, fields.one_of(paths.NAMES)] = "straight"
    prediction: str = "v"
    time_mean: float = 0.0
    time_std: fields.Weight = 1.0
    text_dropout: Annotated[float | tuple[float, ...], fields.between(0, 1)] = 0.1
    train_text: bool = False


def model_by_net(model, load):
    """`config.model`, whose sizes older versions wrote without the net's name."""
    flat = any(not hasattr(value, "items") for value in model.values())
    return {"model": model} if flat else model


def outputs(config):
    """What `prediction` says of net "model"."""
    return {"model": config.loss.get("prediction", Options._field_defaults["prediction"])}


def make(config, space: spaces.Space | None = None) -> Objective:
    """Nets "model" and "text", the latter frozen or trained, too, and those of the space;
    predictions sample, img2img, encode, loss_at_times.

    `config.model.model`: `backbone`, a file of `t2i_jax/models/`, and its sizes.
    `config.model.autoencoder`: that of the latents to work in, see `parts.autoencoders`; a frozen
      net, of which config.cache may keep the "moments". Without it, the model works in pixels.

    space: what to work in where the config describes no autoencoder; by default pixels.
    """
    predict, cached = {}, {}
    if autoencoders.NET in config.model:
        net = autoencoders.of_config(config)
        space = autoencoders.latents(net, (config.res, config.res))
        predict["moments"] = lambda nets, batch, key: autoencoders.moments(net, nets, batch)
        cached["moments"] = Cached("image", (autoencoders.NET,))
    flow = Flow(config, space or spaces.pixels(config.res))
    predict |= {"sample": flow.sample, "img2img": flow.img2img, "encode": flow.text.encode}
    predict["loss_at_times"] = flow.loss_at_times
    trained = ("model", "text") if flow.options.train_text else ("model",)
    return Objective(flow.init, (Loss(trained, flow.loss),), predict, cached=cached)


class Flow:
    """The parts of the objective, and what is made of them; shapes x are those of the space."""

    def __init__(self, config, space: spaces.Space):
        self.options = options = fields.build(Options, config.loss, where="config.loss")
        self.space = space
        self.path = paths.make(options.path, mean=options.time_mean, std=options.time_std)
        kind = Annotated[str, fields.one_of(self.path.kinds)]
        fields.checked(kind, "prediction", options.prediction, where="config.loss")
        plugins.check_nets(config.model, NETS)
        sizes = config.model.get("model", {})
        self.model = backbone.build(sizes, shape_HWC=space.shape, where="config.model.model")
        self.text = conditioner.Conditioner(
            config, text_dropout=options.text_dropout, train_text=options.train_text
        )

    def init(self, key, batch):
        key_model, key_text = jax.random.split(key)
        key_space = jax.random.fold_in(key, randomness.APART)
        text_variables, cond = self.text.init(key_text, batch)
        t_B = jnp.zeros(len(batch["index"]))
        x = jnp.zeros((len(t_B), *self.space.shape))
        nets = {"model": self.model.init(key_model, x, t_B, cond), "text": text_variables}
        return nets | {name: init(key_space, batch) for name, init in self.space.init.items()}

    def output(self, nets, z, t_B, cond, prepared=None):
        return self.model.apply(nets["model"], z, t_B, cond, prepared)

    def loss_at(self, nets, x, cond, noise, t_B):
        """The path's loss of each example at its time.   -> B"""
        z = self.path.mix(x, noise, t_B)
        out = self.output(nets, z, t_B, cond)
        return self.path.error(self.options.prediction, out, z, x, noise, t_B)

    def loss(self, nets, batch, key, step):
        keys_B = randomness.per_example(key, batch["index"])
        keys = randomness.split_each(keys_B, 3)
        x = self.space.of_images(nets, batch, keys_B)
        noise = randomness.normal_each(keys[0], self.space.shape)
        t_B = self.path.draw(randomness.normal_each(keys[1], ()))
        cond = self.text.drop(self.text.encode(nets, batch), batch, keys[2])
        value_B = self.loss_at(nets, x, cond, noise, t_B)
        return losses.weighted_mean(value_B, batch["weight"]), Aux()

    def loss_at_times(self, nets, batch, key) -> OfBatch:
        """The training loss of a batch at eight fixed times, without dropout.   -> (8,)"""
        keys_B = randomness.per_example(key, batch["index"])
        x = self.space.of_images(nets, batch, keys_B)
        noise, cond = (
            randomness.normal_each(keys_B, self.space.shape),
            self.text.encode(nets, batch),
        )

        def at(t):
            value_B = self.loss_at(nets, x, cond, noise, jnp.full(keys_B.shape, t))
            return losses.weighted_mean(value_B, batch["weight"])

        # One time after another: all at once would need the memory of eight batches.
        return jax.lax.map(at, jnp.array(HELD_OUT_TIMES))

    def sample(
        self,
        nets,
        batch,
        key,
        *,
        guidance: Guidance = 3.0,
        steps: Steps = 12,
        sampler: ode.Sampler = "heun",
        shift: ode.Shift = 1.0,
        interval: Interval = guide.ALWAYS,
    ) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          guidance: scale of classifier-free guidance, 1 is none.
          steps: solver steps; heun calls the network twice in each.
          sampler: "euler" or "heun".
          shift: above 0; above 1, more of the steps go to noisy times, where the layout is decided.
          interval: times between which guidance acts, 1 is noise and 0 the image.
        """
        keys_B = randomness.per_example(key, batch["index"])
        z = randomness.given_or_normal(batch, keys_B, self.space.shape)
        return self.solved(nets, batch, z, ode.times(steps, shift), guidance, sampler, interval)

    def img2img(
        self,
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
    ) -> Pictures:
        """Images for captions that begin as given ones.   -> image_BHWC in [-1, 1]

        Noise of time `strength` is put on the images and taken off again (SDEdit,
        arXiv:2108.01073). The noise is that of `sample`.

        Args:
          strength: 0 … 1; 0 leaves the images, 1 draws others.
          guidance, steps, sampler, interval: as of `sample`.
          shift: as of `sample`, of the times up to `strength`.
        """
        keys_B = randomness.per_example(key, batch["index"])
        noise = randomness.given_or_normal(batch, keys_B, self.space.shape)
        x = self.space.of_images(nets, batch, keys_B)
        z = self.path.mix(x, noise, strength)
        # All steps are done at any strength: their number is a shape, and one program serves all.
        ts_S = strength * ode.times(steps, shift)
        return self.solved(nets, batch, z, ts_S, guidance, sampler, interval)

    def solved(self, nets, batch, z, ts_S, guidance, sampler, interval):
        """The images that guided flow leads to from z at the first time.   -> image_BHWC"""
        cond, path = self.text.encode(nets, batch), self.path
        ts_S = jnp.minimum(ts_S, path.latest)

        def under(cond):
            # What follows from the caption alone is computed once, not in each step of the solver.
            prepared = self.model.apply(nets["model"], cond, method="prepare")

            def velocity(state, t_B):
                z = path.of_state(state, t_B)
                out = self.output(nets, z, t_B, cond, prepared)
                return path.velocity(self.options.prediction, out, z, t_B)

            return velocity

        null = self.text.negative(nets, batch)
        if null is None:
            # Training drops captions to the same null condition.
            null = condition.drop(cond, jnp.ones(batch["index"].shape, bool))
        pair = under(jax.tree.map(guide.interleave, cond, null))
        field = guide.cfg(pair, under(cond), guidance, interval)
        state = ode.SOLVERS[sampler](field, path.state(z, ts_S[0]), ts_S, path.clock)
        # All times end at 0, where a state of every path is the example itself.
        return jnp.clip(self.space.decode(nets, state), -1, 1)
