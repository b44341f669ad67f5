"""Spectral norm as a function of parameters (Miyato et al. 2018, arXiv:1802.05957).

A kernel is a matrix from all its inputs to its outputs. Where its largest singular value exceeds 1,
it is divided by that; smaller ones stay, so that kernels may begin at zero.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from t2i_jax import losses

COLLECTION = "spectral"
TINY = 1e-20  # shorter vectors have no direction


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
    """The vectors after one power iteration; that of a kernel of zeros stays."""

    def iterated(m, u):
        v = m.T @ (m @ u)
        length = jnp.linalg.norm(v)
        return jnp.where(length > TINY, v / jnp.maximum(length, TINY), u)

    return jax.lax.stop_gradient(_of_each(iterated, params, vectors))


def bounded(params, vectors):
    """Parameters whose kernels have no singular value above 1, as far as the vectors know."""

    def kernel(m, u):
        v = jax.lax.stop_gradient(m) @ u
        left = v / jnp.maximum(jnp.linalg.norm(v), TINY)
        return m / jnp.maximum(left @ m @ u, 1)

    flat = traverse_util.flatten_dict(meta.unbox(dict(params)))
    changed = traverse_util.flatten_dict(_of_each(kernel, params, vectors))
    return traverse_util.unflatten_dict(
        {path: changed[path].reshape(x.shape) if path in changed else x for path, x in flat.items()}
    )


def _of_each(fn, params, vectors):
    """fn(matrix, vector) of every kernel."""
    vectors = traverse_util.flatten_dict(meta.unbox(dict(vectors)))
    return traverse_util.unflatten_dict(
        {
            path: fn(kernel.reshape(-1, kernel.shape[-1]), vectors[path])
            for path, kernel in _kernels(params).items()
        }
    )


def _kernels(params):
    """path -> kernel, whole where it is split over devices (a box that Linen would open)."""
    flat = traverse_util.flatten_dict(meta.unbox(dict(params)))
    return {path: x for path, x in flat.items() if path[-1] == "kernel" and x.ndim >= 2}
