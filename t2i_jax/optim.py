"""Optax optimisers from a config. Learning rates read the training step, not their own counter."""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging

from t2i_jax import errors, fields
from t2i_jax.run.fingerprint import path_of

# Paths of the last layers, whose output is an image, a logit or an embedding. They learn by Adam:
# Muon is meant for the layers between the first and the last (Jordan 2024, "Muon").
LAST = r"(^|/)(leave|real|projection)/"
DECAYS = {  # (share of the decay that is done, final share of the rate) -> share of the rate
    "constant": lambda x, final: jnp.ones_like(x),
    "linear": lambda x, final: 1 - x * (1 - final),
    "cosine": lambda x, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * x)),
}
Clip = Annotated[float | None, fields.above(0)]
SCHEDULE_FREE = (optax.contrib.schedule_free_adamw, optax.contrib.schedule_free_sgd)
MASKS = ("mask", "weight_decay_mask")  # optax's options for the parameters that decay


class Optimiser(NamedTuple):
    """init: params -> state.   update: (grads, state, params, step) -> (updates, state).

    Several losses of one step may train one net. Each of them updates it at the same `step`. So a
    schedule counts steps of the loop, not calls (ADR 2).

    point: (state, params) -> the parameters to average and draw with, where these are others than
      those that gradients are taken at, as of schedule-free methods; None where they are the same.
    """

    init: Callable
    update: Callable
    learning_rate: Callable  # step -> scalar
    point: Callable | None = None


def make_all(config, trained) -> dict[str, Optimiser]:
    """The optimiser of each trained net, by config.optim.

    Raises:
      ConfigError: config.optim does not name just the trained nets, or config.ema another net, or
        not one whose optimiser finds its point beside the parameters.
    """
    if set(config.optim) != set(trained) or not set(config.ema) <= set(trained):
        raise errors.ConfigError(
            f"config.optim has {sorted(config.optim)}, config.ema {sorted(config.ema)}",
            where=f"objective {config.objective!r}",
            fix=f"its trained nets are {sorted(trained)}: one optimiser for each",
        )
    made = {
        name: make(spec, steps=config.steps, where=f"config.optim.{name}")
        for name, spec in config.optim.items()
    }
    for name, optimiser in made.items():
        if optimiser.point and name not in config.ema:
            raise errors.ConfigError(
                "it learns beside the point that it finds, which would be drawn with nowhere",
                where=f"config.optim.{name}.name",
                fix=f"set config.ema.{name}: 0.0 keeps that point itself, more averages it",
            )
    return made


def make(spec, *, steps: int, where: str) -> Optimiser:
    """The optimiser a config describes.

    Args:
      spec: `name` and `learning_rate`, with the options below. All others go to the function. A
        pair of numbers goes from the first to the second on a cosine over the run (`annealed`).

        - name: a function of optax or optax.contrib that takes `learning_rate`.
        - learning_rate: the highest rate, positive.
        - warmup: steps in which the rate rises linearly from 0.
        - stable: share of the steps after the warm-up that keep the full rate.
        - decay: "constant", "cosine" or "linear", down to `final` × learning_rate at `steps`.
        - clip: largest global norm of the gradient.
      steps: length of the run.
      where: the place of `spec` in the config, for errors.
    Raises:
      ConfigError: an unknown name or option, or a value out of range.

    Weight decay acts on kernels alone, where the function takes a mask. Muon gets kernels as
    matrices, see `_matrices`. All other parameters learn by its Adam.
    """
    spec = dict(spec)
    name, peak = spec.pop("name", "adamw"), spec.pop("learning_rate", None)
    fn = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if not callable(fn):
        raise errors.ConfigError(
            f"optax has no optimiser {name!r}", where=where, fix="use adamw, adam, lion, muon, …"
        )
    peak = fields.checked(Annotated[float, fields.above(0)], "learning_rate", peak, where=where)
    clip = fields.checked(Clip, "clip", spec.pop("clip", None), where=where)
    own = {n: spec.pop(n) for n in ("warmup", "stable", "decay", "final") if n in spec}
    schedule = fields.build(_schedule, own, peak, steps, where=where)
    fields.check_names(fn, spec, where=where)
    spec |= _for_kernels(fn, spec, where)
    pairs = _pairs(fn, spec, where)
    # Muon's Adam may have a rate of its own. It follows the same schedule.
    rates = {option: spec[option] / peak for option in spec if option.endswith("_learning_rate")}
    # Injected options are arrays in the state. Fixed ones stay Python's, so that optax can branch
    # on them and checkpoints do not hold them.
    fixed = tuple(option for option in spec if option not in {**pairs, **rates})
    rates["learning_rate"] = 1.0
    spec |= {option: float(pair[0]) for option, pair in pairs.items()}
    inner = _injected(fn, fixed, where, learning_rate=peak, **spec)

    def init(params):
        return _unmasked(inner.init(params))

    def update(grads, state, params, step):
        # Saved states lack the wrappers of empty masks, see `_unmasked`. Their leaves are the same,
        # in the same order, so the structure that optax wants can be built around them.
        state = jax.tree.structure(jax.eval_shape(inner.init, params)).unflatten(
            jax.tree.leaves(state)
        )
        if clip is not None:
            # Clipping has no state, so it stays outside of `inner` and of what checkpoints hold.
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        # The loop's step decides all hyperparameters: optax's own counter counts calls (ADR 2).
        now = {option: annealed(pair, step, steps) for option, pair in pairs.items()}
        now |= {option: schedule(step) * share for option, share in rates.items()}
        now = {option: jnp.asarray(value, jnp.float32) for option, value in now.items()}
        state = state._replace(hyperparams={**state.hyperparams, **now})
        updates, state = inner.update(grads, state, params)
        return updates, _unmasked(state)

    def point(state, params):
        # x of y = (1 − β)·z + β·x, in which y are the parameters (arXiv:2405.15682).
        return optax.contrib.schedule_free_eval_params(state.inner_state, params)

    return Optimiser(init, update, schedule, point if fn in SCHEDULE_FREE else None)


def _for_kernels(fn, spec, where: str) -> dict:
    """The options that tell an optimiser of Optax which parameters are kernels."""
    own = {}
    if fn is optax.contrib.muon:
        if spec.get("adam_weight_decay"):
            raise errors.ConfigError(
                "Muon's Adam would decay norms and biases, too",
                where=f"{where}.adam_weight_decay",
                fix="set weight_decay, which is of the kernels that Muon trains",
            )
        own["muon_weight_dimension_numbers"] = _matrices
    if masks := [name for name in MASKS if name in inspect.signature(fn).parameters]:
        own[masks[0]] = _kernels
    elif spec.get("weight_decay"):
        logging.warning("%s: %s decays norms and biases, too", where, fn.__name__)
    return {option: value for option, value in own.items() if option not in spec}


def _pairs(fn, spec, where: str) -> dict[str, tuple]:
    """The options that go from one number to another over the run.

    Raises:
      ConfigError: one of them is no number for this optimiser.
    """
    pairs = {option: tuple(value) for option, value in spec.items() if _is_pair(value)}
    for option, pair in pairs.items():
        if not isinstance(inspect.signature(fn).parameters[option].default, float):
            raise errors.ConfigError(
                f"{option} is {pair!r}, and it is no number that could be annealed",
                where=where,
                fix="give one value",
            )
    return pairs


def _injected(fn, fixed, where: str, **options):
    """An optimiser of Optax whose numbers are arrays of its state, but for `fixed` ones.

    Raises:
      ConfigError: it wants more than gradients, or another kind of parameters.
    """
    toy = {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")}
    defaults = inspect.signature(fn).parameters.values()
    # Where an optimiser branches on whole numbers, these must stay Python's. Other optimisers keep
    # the state that their checkpoints have.
    whole = [p.name for p in defaults if p.default is None or isinstance(p.default, int)]
    for static in (fixed, tuple({*fixed, *whole} - {"learning_rate"})):
        try:
            inner = optax.inject_hyperparams(fn, static_args=static)(**options)
            jax.eval_shape(lambda p, inner=inner: inner.update(p, inner.init(p), p), toy)
        except Exception as e:  # whatever an optimiser makes of arrays in place of numbers
            reason = errors.reason(e)
        else:
            return inner
    raise errors.ConfigError(
        f"{fn.__name__} cannot be used with these options: {reason:.200}",
        where=where,
        fix="choose another optimiser, such as adamw",
    )


def annealed(pair, step, steps: int):
    """The value at `step` on a cosine from the first of the pair to the second, at `steps`."""
    start, end = pair
    share = jnp.clip(step / max(steps, 1), 0, 1)
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))


def _is_pair(value) -> bool:
    numbers = isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value)
    return numbers and len(value) == 2


def _unmasked(state):
    """A state without the wrappers of empty masks, which older checkpoints do not have."""
    empty = lambda x: isinstance(x, optax.MaskedState) and not jax.tree.leaves(x)
    return jax.tree.map(lambda x: optax.EmptyState() if empty(x) else x, state, is_leaf=empty)


def _matrices(params):
    """The axes by which Muon treats each parameter as a matrix. None leaves a parameter to Adam.

    A dense kernel is (in, out), a convolution's (height, width, in, out). The last axis is the
    output, and all others are the input. One more axis in front makes it a stack, the layers of a
    scan, each a matrix of its own. Vectors, embeddings and the kernels of LAST are left to Adam.
    """

    def numbers(path, leaf):
        path = path_of(path)
        if not _is_kernel(path, leaf) or re.search(LAST, path):
            return None
        stacked = leaf.ndim % 2  # kernels have two or four axes, stacked ones three or five
        inputs = tuple(range(stacked, leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _kernels(params):
    """The mask of weight decay: True for kernels, False for norms, biases, tokens and the like."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _is_kernel(path_of(path), leaf), params
    )


def _is_kernel(path: str, leaf) -> bool:
    """Whether it is a kernel, or one of the two factors of a kernel's adapter (`lora`)."""
    return "kernel" in path.split("/") and leaf.ndim >= 2


def _schedule(
    peak,
    steps,
    *,
    warmup: Annotated[int, fields.at_least(0)] = 0,
    stable: Annotated[float, fields.at_least(0), fields.below(1)] = 0.0,
    decay: Annotated[str, fields.one_of(DECAYS)] = "constant",
    final: fields.Weight = 0.0,
):
    def learning_rate(step):
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum(1.0, (step + 1) / max(warmup, 1))  # the first step has a rate above 0
        share = (step - warmup) / max(steps - warmup, 1)
        share = jnp.clip((share - stable) / (1 - stable), 0.0, 1.0)
        return peak * ramp * DECAYS[decay](share, final)

    return learning_rate


def ema_decay(decay, step):
    """min(decay, (1 + n)/(10 + n)), so that early averages soon forget the random start."""
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))
