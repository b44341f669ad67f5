"""Spectral norm as a function of parameters (Miyato et al. 2018, arXiv:1802.05957).

A kernel is a matrix from all its inputs to its outputs. Where its largest singular value exceeds 1,
it is divided by that; smaller ones stay, so that kernels may begin at zero.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util

from t2i_jax import losses

COLLECTION = "spectral"


def start(params, key):
    """For every kernel a unit vector of its outputs, to become its singular one."""
    kernels = _kernels(params)
    keys = jax.random.split(key, len(kernels))
    return traverse_util.unflatten_dict(
        {
            path: losses.unit(jax.random.normal(k, kernel.shape[-1:]))
            for k, (path, kernel) in zip(keys, kernels.items(), strict=True)
        }
    )


def advanced(params, vectors):
    """The vectors after one power iteration."""
    return jax.lax.stop_gradient(_of_each(lambda m, u: losses.unit(m.T @ (m @ u)), params, vectors))


def bounded(params, vectors):
    """Parameters whose kernels have no singular value above 1, as far as the vectors know."""

    def kernel(m, u):
        left = losses.unit(jax.lax.stop_gradient(m) @ u)
        return m / jnp.maximum(left @ m @ u, 1)

    flat = traverse_util.flatten_dict(dict(params))
    changed = traverse_util.flatten_dict(_of_each(kernel, params, vectors))
    return traverse_util.unflatten_dict(
        {path: changed[path].reshape(x.shape) if path in changed else x for path, x in flat.items()}
    )


def _of_each(fn, params, vectors):
    """fn(matrix, vector) of every kernel."""
    vectors = traverse_util.flatten_dict(dict(vectors))
    return traverse_util.unflatten_dict(
        {
            path: fn(kernel.reshape(-1, kernel.shape[-1]), vectors[path])
            for path, kernel in _kernels(params).items()
        }
    )


def _kernels(params):
    flat = traverse_util.flatten_dict(dict(params))
    return {path: x for path, x in flat.items() if path[-1] == "kernel" and x.ndim >= 2}
