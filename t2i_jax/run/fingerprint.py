"""A fingerprint of arrays that does not depend on their sharding.

A word is an element's bits. Its place is its row-major number in the array, modulo 2³². Two lanes
join a word with a key of its place, one by exclusive or and one by addition. An integer hash mixes
the result, and the hashes of all words are summed modulo 2³². Integer sums are exact. So sharding,
the number of devices and the order of a reduction cannot change them. Each array has 64 bits.

What the sums detect:

- One changed word, whatever bits change: for certain, in either lane. Under a fixed key the hash
  is a bijection of the word, so its term changes and no other does.
- Words that change places: no two places share a key, as a key is the place times an odd number.
  So the same word gives another term elsewhere.
- Two flips, also of sign bits, or a negated, scaled or permuted array: each sum changes by a sum of
  differences of hashed words. The hash is not linear, so these do not cancel by signs and carries,
  as they do in a weighted sum. A lane misses such a change with a chance of about 2⁻³², and
  both miss it with a chance of about 2⁻⁶⁴.
- Swapped arrays: each has its own sums, kept by its path.

Why two ways to join: let the inputs of two words differ in one bit alone. A flip of that bit in
both makes them trade their terms. Both lanes would miss that if they joined alike.

The chances hold for accidental damage. They are no protection from an attacker, who can write a
manifest of his own. In arrays of more than 2³² words places repeat, and a swap of two words with
equal places is not detected.
"""

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 3  # of the sums; checkpoints' manifests and digests name it
SMALL = 2**15  # elements: numpy sums smaller arrays, as XLA would compile a program for each shape
WEIGHTED = 2  # the format before: its sums miss two flipped sign bits


def of(tree, *, format: int = FORMAT, widened: bool = False) -> tuple[dict, list]:
    """The fingerprints of a tree of arrays.

    The devices that hold a large array compute its sums. Only the sums come to the host.

    Args:
      format: FORMAT, or WEIGHTED to check what an older version wrote.
      widened: of 16-bit floats those of the float32 numbers that they equal.
    Returns:
      Path -> [dtype, shape, two sums in hexadecimal], and the paths of arrays that are not finite.
    """
    flat = jax.tree_util.tree_leaves_with_path(tree)
    lanes = _weighted if format == WEIGHTED else _mixed
    # On simulated devices these programs and the step's would starve each other of threads (ADR 8).
    jax.block_until_ready(tree)

    def kind(leaf):
        half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 2
        return jnp.dtype("float32") if widened and half else leaf.dtype

    def sums_of(leaf):
        leaf = leaf.astype(kind(leaf))
        # A numpy array lacks the attribute. Of an array that lies partly in other processes the
        # host cannot read all.
        if leaf.size <= SMALL and getattr(leaf, "is_fully_addressable", True):
            return _sum_here(np.asarray(leaf), lanes)
        # One array after the other, as simulated devices share few threads. Each shape has its own
        # program: one program for all arrays took three times as long to compile.
        return jax.block_until_ready(_sum(leaf, lanes))

    sums = jax.device_get([sums_of(leaf) for _, leaf in flat])
    prints, bad = {}, []
    for (path, leaf), (first, second, finite) in zip(flat, sums, strict=True):
        name = path_of(path)
        prints[name] = [str(kind(leaf)), list(leaf.shape), f"{first:08x}{second:08x}"]
        if not finite:
            bad.append(name)
    return prints, bad


def digest(tree, *, format: int = FORMAT, widened: bool = False) -> str:
    """One hash of all fingerprints of a tree, with its format in front: "3:…".

    widened: as of `of`; then it does not tell in which type equal numbers are stored.
    """
    prints, _ = of(tree, format=format, widened=widened)
    text = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()
    return text if format == WEIGHTED else f"{format}:{text}"


def matches(tree, known: str) -> bool:
    """Whether the digest `known`, of this format or the one before, is the tree's, perhaps of the
    same numbers in another type.
    """
    # Digests of the format before were written without its number.
    kind = FORMAT if ":" in known else WEIGHTED
    return any(known == digest(tree, format=kind, widened=w) for w in (False, True))


def path_of(path) -> str:
    """A tree path as text: "nets/model/params/w"."""
    # JAX has a type of key for each node: that of dicts has `key`, of named tuples `name`, of
    # lists `idx`.
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


@functools.partial(jax.jit, static_argnums=1)
def _sum(x, lanes):
    """The two sums, and whether all of x is finite."""
    bits = _bits(x)
    bad = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, bool)
    # The words of an 8-byte number lie in a last axis, which x itself lacks.
    bad = jnp.broadcast_to(bad.reshape(*x.shape, *(1,) * (bits.ndim - x.ndim)), bits.shape)
    parts = (*lanes(bits, _places(bits.shape)), bad.astype(jnp.uint32))
    # One pass for all three sums, and first along the last axis. XLA:CPU uses all cores for a sum
    # of rows, but a single one for a sum to one number. The barrier keeps it from joining the two.
    for axes in ((bits.ndim - 1,), tuple(range(bits.ndim - 1))) if bits.ndim else ():
        parts = jax.lax.reduce(parts, (np.uint32(0),) * 3, _add, axes)
        parts = jax.lax.optimization_barrier(parts)
    first, second, bad = parts
    return first, second, bad == 0


def _sum_here(x, lanes):
    """The same as `_sum`, computed by numpy on the host."""
    flat = x.reshape(-1)
    # An 8-byte number is viewed as two words, as `_bits` splits it on the devices.
    kind = bool if x.dtype == bool else f"uint{8 * min(x.dtype.itemsize, 4)}"
    bits = flat.view(kind).astype(np.uint32)
    terms = lanes(bits, np.arange(bits.size, dtype=np.uint32))
    finite = np.isfinite(flat).all() if jnp.issubdtype(x.dtype, jnp.inexact) else True
    return *(term.sum(dtype=np.uint32) for term in terms), finite


def _mixed(word, place):
    """The terms of both lanes."""
    key, other = place * np.uint32(0x9E3779B9), place * np.uint32(0xD6E8FEB9)
    # The two factors and the last shift of a lane belong together: the search found them as one.
    return _mix(word ^ key, 0x21F0AAAD, 0xD35A2D97, 15), _mix(word + other, 0x7FEB352D, 0x846CA68B)


def _mix(x, first: int, second: int, last: int = 16):
    """A bijection of 32 bits in which each bit of x reaches every bit.

    It is two multiplications between shifts. C. Wellons found the factors and shifts by a search
    ("Prospecting for hash functions").
    """
    x = (x ^ (x >> 16)) * np.uint32(first)
    x = (x ^ (x >> 15)) * np.uint32(second)
    return x ^ (x >> last)


def _weighted(word, place):
    """The terms of both lanes in format 2, which old checkpoints were written with."""
    weight = (place + np.uint32(1)) * np.uint32(0x9E3779B9)
    weight = (weight ^ (weight >> 15)) * np.uint32(0x85EBCA6B)
    weight = weight ^ (weight >> 13)
    # Odd factors have an inverse modulo 2³². So a single changed word always changes both sums.
    return (word ^ weight) * np.uint32(0xC2B2AE35), word * (weight | np.uint32(1))


def _add(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _bits(x):
    """The bits of each element as uint32 words."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size == 8:  # two words, in a last axis
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)


def _places(shape):
    """Each element's number in row-major order, modulo 2³²."""
    # numpy refuses to make a uint32 of a larger number, so Python takes the remainder.
    strides = [math.prod(shape[i + 1 :]) % 2**32 for i in range(len(shape))]
    numbers = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, i) * np.uint32(stride)
        for i, stride in enumerate(strides)
    ]
    return functools.reduce(jnp.add, numbers, jnp.zeros(shape, jnp.uint32))
