"""Spectral norm as a function of parameters (Miyato et al. 2018, arXiv:1802.05957).

A kernel is a matrix from all its inputs to its outputs. It is divided by its largest singular value
where that exceeds 1. Smaller kernels stay as they are, so a kernel may begin at zero.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from t2i_jax import losses

COLLECTION = "spectral"
TINY = 1e-20  # a shorter vector has no direction: its kernel is zero


def start(params, key):
    """A random unit vector over the outputs of every kernel, from which power iteration starts."""
    kernels = _kernels(params)
    keys = jax.random.split(key, len(kernels))
    return traverse_util.unflatten_dict(
        {
            path: losses.unit(jax.random.normal(k, kernel.shape[-1:]))
            for k, (path, kernel) in zip(keys, kernels.items(), strict=True)
        }
    )


def advanced(params, vectors):
    """The vectors after one power iteration. The vector of a zero kernel stays."""

    def iterated(m, u):
        v = m.T @ (m @ u)
        length = jnp.linalg.norm(v)
        # `where` computes both of its sides, so the divisor must not be 0 on either.
        return jnp.where(length > TINY, v / jnp.maximum(length, TINY), u)

    # The vectors are the state of an iteration, which no loss differentiates.
    return jax.lax.stop_gradient(_of_each(iterated, params, vectors))


def bounded(params, vectors):
    """Parameters whose kernels have no singular value above 1, by the estimates of the vectors."""

    def kernel(m, u):
        # The gradient treats both singular vectors as constants.
        v = jax.lax.stop_gradient(m) @ u
        left = v / jnp.maximum(jnp.linalg.norm(v), TINY)
        return m / jnp.maximum(left @ m @ u, 1)

    flat = traverse_util.flatten_dict(meta.unbox(dict(params)))
    changed = traverse_util.flatten_dict(_of_each(kernel, params, vectors))
    return traverse_util.unflatten_dict(
        {path: changed[path].reshape(x.shape) if path in changed else x for path, x in flat.items()}
    )


def _of_each(fn, params, vectors):
    """Path -> fn(matrix, vector), for every kernel."""
    vectors = traverse_util.flatten_dict(meta.unbox(dict(vectors)))
    return traverse_util.unflatten_dict(
        {
            path: fn(kernel.reshape(-1, kernel.shape[-1]), vectors[path])
            for path, kernel in _kernels(params).items()
        }
    )


def _kernels(params):
    """Path -> kernel. A kernel that is split over devices is gathered, as Linen does on reading."""
    flat = traverse_util.flatten_dict(meta.unbox(dict(params)))
    return {path: x for path, x in flat.items() if path[-1] == "kernel" and x.ndim >= 2}
