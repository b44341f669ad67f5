"""Optax optimisers from a config; learning rates read the training step, never an own counter."""

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

# Paths of the layers that put out a picture, a logit or an embedding. Muon is meant for what lies
# between the first and the last layer: these learn by Adam (Jordan 2024, "Muon").
LAST = r"(^|/)(leave|real|projection)/"
DECAYS = {  # (share of the decay's steps, share of the rate that is left at the end) -> share
    "constant": lambda x, final: jnp.ones_like(x),
    "linear": lambda x, final: 1 - x * (1 - final),
    "cosine": lambda x, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * x)),
}
Clip = Annotated[float | None, fields.above(0)]
MASKS = ("mask", "weight_decay_mask")  # optax's names for what says which parameters decay


class Optimiser(NamedTuple):
    """init: params -> state.   update: (grads, state, params, step) -> (updates, state).

    A net that several losses of one step train is updated by each of them at the same `step`, so a
    schedule counts steps of the loop and not calls.
    """

    init: Callable
    update: Callable
    learning_rate: Callable  # step -> scalar


def make_all(config, trained) -> dict[str, Optimiser]:
    """The optimiser of each trained net, by config.optim.

    Raises:
      ConfigError: config.optim has not one for each, or config.ema averages another net.
    """
    if set(config.optim) != set(trained) or not set(config.ema) <= set(trained):
        raise errors.ConfigError(
            f"config.optim has {sorted(config.optim)}, config.ema {sorted(config.ema)}",
            where=f"objective {config.objective!r}",
            fix=f"its trained nets are {sorted(trained)}: one optimiser for each",
        )
    return {
        name: make(spec, steps=config.steps, where=f"config.optim.{name}")
        for name, spec in config.optim.items()
    }


def make(spec, *, steps: int, where: str) -> Optimiser:
    """The optimiser a config describes.

    Args:
      spec: name (a function of optax or optax.contrib that takes `learning_rate`), learning_rate,
        and optionally warmup (steps, linear from 0), stable (share of the steps after it at the
        full rate), decay ("constant", "cosine" or "linear", to `final` × learning_rate at
        `steps`), clip (global gradient norm); all else goes to the function, a pair of numbers as
        one that goes from the first to the second on a cosine over the run (`annealed`). Weight
        decay is of kernels alone, where the function takes a mask. Muon gets kernels as matrices,
        see `_matrices`; all other parameters learn by its Adam.
      steps: length of the run.
    Raises:
      ConfigError: an unknown name or option, a learning rate that is not positive.
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
    own = _take(spec, ("warmup", "stable", "decay", "final"))
    schedule = fields.build(_schedule, own, peak, steps, where=where)
    fields.check_names(fn, spec, where=where)
    parameters = inspect.signature(fn).parameters
    if fn is optax.contrib.muon:
        if spec.get("adam_weight_decay"):
            raise errors.ConfigError(
                "Muon's Adam would decay norms and biases, too",
                where=f"{where}.adam_weight_decay",
                fix="set weight_decay, which is of the kernels that Muon trains",
            )
        spec.setdefault("muon_weight_dimension_numbers", _matrices)
    if masks := [name for name in MASKS if name in parameters]:
        spec.setdefault(masks[0], _kernels)
    elif spec.get("weight_decay"):
        logging.warning("%s: %s decays norms and biases, too", where, name)
    pairs = {option: tuple(value) for option, value in spec.items() if _is_pair(value)}
    for option in pairs:
        if not isinstance(parameters[option].default, float):
            raise errors.ConfigError(
                f"{option} is {pairs[option]!r}, and it is no number that could be annealed",
                where=where,
                fix="give one value",
            )
    # Muon's Adam may have a rate of its own, which goes up and down with the other.
    rates = {option: spec[option] / peak for option in spec if option.endswith("_learning_rate")}
    fixed = tuple(option for option in spec if option not in {**pairs, **rates})
    rates["learning_rate"] = 1.0
    spec |= {option: float(pair[0]) for option, pair in pairs.items()}
    inner = optax.inject_hyperparams(fn, static_args=fixed)(learning_rate=peak, **spec)

    def init(params):
        return _unmasked(inner.init(params))

    def update(grads, state, params, step):
        state = jax.tree.structure(jax.eval_shape(inner.init, params)).unflatten(
            jax.tree.leaves(state)
        )
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        now = {option: annealed(pair, step, steps) for option, pair in pairs.items()}
        now |= {option: schedule(step) * share for option, share in rates.items()}
        now = {option: jnp.asarray(value, jnp.float32) for option, value in now.items()}
        state = state._replace(hyperparams={**state.hyperparams, **now})
        updates, state = inner.update(grads, state, params)
        return updates, _unmasked(state)

    return Optimiser(init, update, schedule)


def annealed(pair, step, steps: int):
    """What goes from the first to the second value on a cosine over `steps` of training."""
    start, end = pair
    share = jnp.clip(step / max(steps, 1), 0, 1)
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))


def _is_pair(value) -> bool:
    numbers = isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value)
    return numbers and len(value) == 2


def _unmasked(state):
    """A state without wrappers of masks that hold nothing: checkpoints from before know none."""
    empty = lambda x: isinstance(x, optax.MaskedState) and not jax.tree.leaves(x)
    return jax.tree.map(lambda x: optax.EmptyState() if empty(x) else x, state, is_leaf=empty)


def _matrices(params):
    """How Muon sees a net's parameters: kernels as matrices, their last axis the output.

    A kernel is (in, out), of a convolution (height, width, in, out), whose axes but the last are
    its inputs. With one axis more in front it is a stack, the layers of a scan: each of them is a
    matrix of its own. Whatever else there is (vectors, stacked or not, and embeddings), and the
    kernels of LAST, are for Adam.
    """

    def numbers(path, leaf):
        path = path_of(path)
        if not _is_kernel(path, leaf) or re.search(LAST, path):
            return None
        stacked = leaf.ndim % 2
        inputs = tuple(range(stacked, leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _kernels(params):
    """What decays: True for kernels, not for norms, biases, null tokens, scales and embeddings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _is_kernel(path_of(path), leaf), params
    )


def _is_kernel(path: str, leaf) -> bool:
    """Whether it is a kernel, or one of the two factors that adapt a kernel (`lora`)."""
    return "kernel" in path.split("/") and leaf.ndim >= 2


def _take(spec: dict, names):
    return {name: spec.pop(name) for name in names if name in spec}


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
        ramp = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        share = (step - warmup) / max(steps - warmup, 1)
        share = jnp.clip((share - stable) / (1 - stable), 0.0, 1.0)
        return peak * ramp * DECAYS[decay](share, final)

    return learning_rate


def ema_decay(decay, step):
    """min(decay, (1 + n)/(10 + n)): the warm-up keeps early averages from remembering the start."""
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))
