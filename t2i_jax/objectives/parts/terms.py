"""Named, weighted terms of a loss on drawn images, for any family that draws some.

B batch · S examples of a share of it · H W pixels · C channels
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import losses


class Keys(NamedTuple):
    """Random keys of a step, the same for every term.

    noise: of the noise that the images were drawn from, see `randomness.per_example`.
    choice: of what a term decides once for the batch. A second term that draws folds it in.
    """

    noise: jax.Array
    choice: jax.Array


class Term(NamedTuple):
    """One term. It owns the frozen nets that it needs.

    weight: of the term's mean in the loss.
    init: name of a frozen net -> (key, batch, cond) -> its variables.
    value: (nets, image_BHWC, cond, batch, keys) -> value_B, differentiable by the images; `cond`
      is what the captions are encoded to, `keys` are `Keys`.
    stride: every n-th example is asked for its value, for terms that cost much, see `every`.
    """

    weight: float
    init: Mapping[str, Callable]
    value: Callable
    stride: int = 1


def nets_of(terms: Mapping[str, Term]) -> tuple[str, ...]:
    """Names of the frozen nets that the terms add."""
    return tuple(dict.fromkeys(name for term in terms.values() for name in term.init))


def init(terms: Mapping[str, Term], keys, batch, cond):
    """The frozen nets that the terms add.

    Args:
      keys: name of a net -> its random key.
    """
    makers = {name: make for term in terms.values() for name, make in term.init.items()}
    return {name: make(keys[name], batch, cond) for name, make in makers.items()}


def add(value, terms: Mapping[str, Term], nets, image_BHWC, cond, batch, keys, batch_size: int):
    """`value` plus the weighted mean of each term, in their order.

    Args:
      value: the loss so far, a scalar.
      batch_size: examples of the whole batch, of which `batch` may be a part.
    Returns:
      The loss, and metrics: name of a term -> its mean, without its weight.
    """
    metrics = {}
    for name, term in terms.items():
        some, mean = every(term.stride, batch, batch_size)
        value_S = term.value(nets, some(image_BHWC), some(cond), some(batch), keys)
        metrics[name] = mean(value_S)
        value += term.weight * metrics[name]
    return value, metrics


def every(stride: int, batch, batch_size: int):
    """Every n-th slot of the global batch, however it is cut: (some, mean).

    Args:
      batch: of all slots or of a part of them, see `Objective`.
      batch_size: the number of all slots.
    Returns:
      some: tree of B -> tree of S, the examples of `batch` among them, or more.
      mean: value_S -> scalar, what they say of the mean over all examples that count. Like the
        loss, parts add up by the numbers of their examples that count.
    """
    index_B, weight_B = batch["index"], batch["weight"]
    if stride == 1:
        return (lambda tree: tree), lambda value_B: losses.weighted_mean(value_B, weight_B)
    # The share is that of the whole batch. Parts may hold unequal numbers of such slots.
    n, share = len(index_B), -(-batch_size // stride) / batch_size
    if n % stride == 0:  # no gather, which would move images between devices
        some, counted = lambda tree: jax.tree.map(lambda x: x[::stride], tree), 1.0
    else:
        # The first slot that the stride divides is known on the device only, the number of places
        # is fixed. A place beyond the end counts 0.
        place_S = -index_B[0] % stride + stride * jnp.arange(-(-n // stride))
        some = lambda tree: jax.tree.map(lambda x: x[jnp.minimum(place_S, n - 1)], tree)
        counted = (place_S < n).astype(jnp.float32)

    def mean(value_S):
        total = (value_S * some(weight_B) * counted).sum()
        return total / jnp.maximum(share * losses.counted(weight_B), 1e-9)

    return some, mean
