"""Damage that the sums of an array have to see, tried by the thousand and by the billion."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from t2i_jax.run import fingerprint

N = 2**13  # words of an array: 2³⁵ pairs of its bits
OLD = {
    "flag": ["bool", [2], "a33d3dd0c321cfe3"],
    "h": ["float16", [3, 4, 5], "4151a914dd70b1d2"],
    "n": ["int32", [], "b5d5023455ecaf35"],
    "x": ["float32", [3, 4, 5], "b0d8a6eed833db7a"],
}
OLD_DIGEST = "dc3d285aad54bd4ea6bf983bc01d1a2364cef62b1b143756189ad19da3ed83b3"
NEW = {
    "flag": ["bool", [2], "cb370aa5064e126c"],
    "h": ["float16", [3, 4, 5], "83050d51a3886a5f"],
    "n": ["int32", [], "ab71f1ff948ba1e6"],
    "x": ["float32", [3, 4, 5], "e30b78ff408495b4"],
}


def prints(x, **options):
    return fingerprint.of({"x": x}, **options)[0]["x"]


def words(x) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize]).astype(np.uint32)


def arrays(rng):
    yield rng.standard_normal(N).astype(np.float32)
    yield np.zeros(N, np.float32)
    yield np.ones(N, np.float32)
    yield np.arange(N, dtype=np.float32)
    yield np.tile(rng.standard_normal(8).astype(np.float32), N // 8)
    yield rng.standard_normal(N).astype(ml_dtypes.bfloat16)


def test_every_pair_of_flipped_bits_is_seen():
    place = jnp.arange(N, dtype=jnp.uint32)
    lanes = jax.jit(lambda word: jnp.stack(fingerprint._mixed(word, place)))
    for x in arrays(np.random.default_rng(0)):
        word, bits = words(x), 8 * x.itemsize
        before = lanes(word)
        change = [np.asarray(lanes(word ^ np.uint32(1 << b)) - before) for b in range(bits)]
        change = np.stack(change, 1).reshape(2, -1)  # of both sums, for every single flip
        assert (change != 0).all()
        both = lambda c: c[0].astype(np.uint64) << np.uint64(32) | c[1]
        unseen = np.isin(both(change), both(-change))  # a pair whose changes cancel in both
        assert not unseen.any()
        for lane in change:  # one alone misses hardly more than chance does
            expected = lane.size**2 / 2 / 2**32
            assert np.isin(lane, -lane).sum() / 2 <= 2 * expected + 6 * expected**0.5


def damages(x, rng):
    """Other arrays of the same shape and type."""
    yield "negated", -x
    yield "doubled", x * 2
    yield "halved", x / 2
    yield "shuffled", rng.permuted(x, axis=0)
    yield "transposed", np.ascontiguousarray(x.T).reshape(x.shape)
    yield "turned", np.roll(x, 1)
    yield "mirrored", x[::-1]
    yield "one row negated", np.where(np.arange(len(x))[:, None] == 3, -x, x)
    yield "one column negated", np.where(np.arange(x.shape[1]) == 3, -x, x)
    yield "every second negated", np.where(np.arange(x.size).reshape(x.shape) % 2, -x, x)
    for count in (2, 3, 4, 8, 64):
        for _ in range(40):
            signs = np.ones(x.size, x.dtype)
            signs[rng.choice(x.size, count, replace=False)] = -1
            yield f"{count} signs", x * signs.reshape(x.shape)
    for _ in range(200):
        i, j = rng.choice(len(x), 2, replace=False)
        rows = np.arange(len(x))
        rows[[i, j]] = j, i
        yield "two rows exchanged", x[rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_signs_scales_and_exchanges_are_seen(dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 24)).astype(dtype)
    variants = list(damages(x, rng))
    found = fingerprint.of({str(i): v for i, (_, v) in enumerate(variants)})[0]
    for i, (name, variant) in enumerate(variants):
        assert (variant != x).any(), name
        assert found[str(i)] != prints(x), name


def test_arrays_that_are_exchanged_are_seen():
    a, b = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    assert fingerprint.digest({"a": a, "b": b}) != fingerprint.digest({"a": b, "b": a})


def test_the_sums_are_those_of_stored_checkpoints():
    """What a manifest holds must stay readable; the numbers of format 2 are of its own code."""
    x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    tree = {"x": x, "n": np.int32(7), "flag": np.array([True, False]), "h": x.astype(np.float16)}
    assert fingerprint.of(tree, format=2)[0] == OLD
    assert fingerprint.of(tree)[0] == NEW
    old = fingerprint.digest(tree, format=2)
    assert old == OLD_DIGEST
    assert fingerprint.matches(tree, old)
    assert fingerprint.matches(tree, fingerprint.digest(tree, widened=True))
    half = {"w": jnp.arange(8, dtype="bfloat16")}
    whole = fingerprint.digest({"w": half["w"].astype("float32")}, widened=True)
    assert fingerprint.digest(half, widened=True) == whole != fingerprint.digest(half)
    changed = {**tree, "x": x + 1}
    assert not fingerprint.matches(changed, old)
    assert not fingerprint.matches(changed, fingerprint.digest(tree))


@pytest.mark.parametrize("format", [fingerprint.FORMAT, fingerprint.WEIGHTED])
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "int8", "bool"]
)
def test_the_host_sums_small_arrays_as_devices_do(dtype, format, monkeypatch):
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    some = lambda *shape: rng.integers(0, 2**7, shape).astype(kind)
    tree = {"a": some(3, 4, 5), "b": some(7), "c": some(), "d": some(0, 2), "e": some(2, 3, 2, 2)}
    if jnp.issubdtype(kind, jnp.inexact):
        tree["bad"] = np.array([1, np.inf, 0, np.nan], kind)
    tree = jax.device_put(tree)
    here = fingerprint.of(tree, format=format)
    monkeypatch.setattr(fingerprint, "SMALL", -1)
    assert here == fingerprint.of(tree, format=format)
    assert here[1] == (["bad"] if "bad" in tree else [])
