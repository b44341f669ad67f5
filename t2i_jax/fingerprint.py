"""A fingerprint of arrays that does not depend on how they lie over devices.

Every element's bits, weighted by a hash of its place, are summed modulo 2³² in two ways. Integer
sums are exact, so sharding, the number of devices and the order of a reduction cannot change them;
a flipped bit changes the second sum for certain, as its weights are odd.
"""

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np


def of(tree) -> tuple[dict, list]:
    """Path -> [dtype, shape, two sums in hexadecimal], and the paths of arrays not finite.

    The sums are computed where the arrays lie; only they come to the host.
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    # One program, and nothing else in flight: simulated devices share few threads.
    leaves = jax.block_until_ready([leaf for _, leaf in flat])
    sums = jax.device_get(_sums(leaves))
    prints, bad = {}, []
    for (path, leaf), (first, second, finite) in zip(flat, sums, strict=True):
        name = path_of(path)
        prints[name] = [str(leaf.dtype), list(leaf.shape), f"{first:08x}{second:08x}"]
        if not finite:
            bad.append(name)
    return prints, bad


def digest(tree) -> str:
    """One hash of all of a tree's fingerprints."""
    prints, _ = of(tree)
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()


def path_of(path) -> str:
    """A tree path as text: "nets/model/params/w"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


@jax.jit
def _sums(leaves):
    return [_sum(x) for x in leaves]


def _sum(x):
    """The two sums, and whether all of x is finite."""
    bits = _bits(x)
    weight = _hash(_places(bits.shape))
    bad = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, bool)
    bad = jnp.broadcast_to(bad.reshape(*x.shape, *(1,) * (bits.ndim - x.ndim)), bits.shape)
    parts = (
        (bits ^ weight) * np.uint32(0xC2B2AE35),
        bits * (weight | np.uint32(1)),
        bad.astype(jnp.uint32),
    )
    # One pass for all three, rows first: XLA:CPU sums rows on all cores, to one number on one.
    for axes in ((bits.ndim - 1,), tuple(range(bits.ndim - 1))) if bits.ndim else ():
        parts = jax.lax.reduce(parts, (np.uint32(0),) * 3, _add, axes)
        parts = jax.lax.optimization_barrier(parts)
    first, second, bad = parts
    return first, second, bad == 0


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _bits(x):
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size == 8:  # two words, in a last axis
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)


def _places(shape):
    """Each element's number in row-major order, modulo 2³²."""
    strides = [math.prod(shape[i + 1 :]) % 2**32 for i in range(len(shape))]
    numbers = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, i) * np.uint32(stride)
        for i, stride in enumerate(strides)
    ]
    return functools.reduce(jnp.add, numbers, jnp.zeros(shape, jnp.uint32))


def _hash(x):
    """The finaliser of MurmurHash3, shortened to two rounds."""
    x = (x + np.uint32(1)) * np.uint32(0x9E3779B9)
    x = (x ^ (x >> 15)) * np.uint32(0x85EBCA6B)
    return x ^ (x >> 13)
