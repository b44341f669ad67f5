"""Distillation of a trained flow model: drawn images approach what it makes of them.

B batch · H W pixels · C channels · M feature maps
"""

import copy

import jax

from t2i_jax import errors, fields, losses
from t2i_jax.objectives import flow
from t2i_jax.objectives.parts.terms import Term

WHERE = "config.loss.teacher"


def term(config, *, weight, stride, times, options, noise_shape, maps=None) -> Term:
    """How far images lie from those that the flow model, net "teacher", goes on to from them.

    It starts at a point on the straight line between an image and the noise it was drawn from.
    The gradient leaves the flow model's images alone.

    Args:
      config: `model.teacher` describes the flow network, and its `prediction`.
      times: the point lies at a time between these, drawn once for each batch; 1 is noise.
      options: of the flow model's `img2img`.
      noise_shape: of the noise that one image is drawn from: as an image, as the flow model's.
      maps: as of `perceptual_error`, but (nets, image_BHWC) -> maps.
    Raises:
      ConfigError: other noise, or options that `img2img` does not take.
    """
    if noise_shape != (config.res, config.res, 3):
        raise errors.ConfigError(
            "the generator draws from other noise than a flow model",
            where="config.loss.distil",
            fix="describe a flow network in config.model.gen, as configs/shapes_gan_from_flow.py",
        )
    family = teacher(config)
    options = fields.check(family.predict["img2img"], options, where=WHERE, given=3)
    if "strength" in options:
        raise errors.ConfigError(
            "strength is drawn for each batch", where=WHERE, fix="set config.loss.distil_times"
        )

    def value(nets, image_BHWC, cond, batch, keys):
        low, high = times
        strength = jax.random.uniform(keys.choice, minval=low, maxval=high)
        theirs = {"model": nets["teacher"], "text": nets["text"]}
        # The key is that of the image's own noise, so the teacher goes on with this noise.
        wanted_BHWC = family.predict["img2img"](
            theirs, batch | {"image": image_BHWC}, keys.noise, strength=strength, **options
        )
        # It is made of the image. Gradients would otherwise run back through every step of the
        # teacher.
        wanted_BHWC = jax.lax.stop_gradient(wanted_BHWC)
        of_nets = maps and (lambda x_BHWC: maps(nets, x_BHWC))
        return perceptual_error(image_BHWC, wanted_BHWC, of_nets)

    init = {"teacher": lambda key, batch, cond: family.init(key, batch)["model"]}
    return Term(weight, init, value, stride)


def perceptual_error(a_BHWC, b_BHWC, maps=None):
    """The squared error of pixels plus that of feature maps, scaled to unit mean square.   -> B

    Args:
      maps: image_BHWC -> feature maps, each BHWC; None compares pixels alone.
    """
    error_B = losses.squared_error(a_BHWC, b_BHWC)
    if maps is None:
        return error_B
    return error_B + losses.map_error(maps(a_BHWC), maps(b_BHWC))


def teacher(config):
    """The flow model that `config.model.teacher` describes, as an objective."""
    sizes = dict(config.model.get("teacher", {}))
    own = copy.deepcopy(config)
    # A flow family would refuse the options and nets of the GAN.
    if "prediction" not in sizes:
        raise errors.ConfigError(
            "nothing says what the teacher's output means",
            where="config.model.teacher",
            fix="add the prediction of the run that trained it, such as prediction='x'",
        )
    own.loss, own.model = dict(prediction=sizes.pop("prediction")), dict(model=sizes)
    return flow.make(own)
