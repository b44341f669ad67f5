"""Kernels for attention over many tokens: the same numbers as XLA's, where each may be used."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import errors, loop, sharding
from t2i_jax.commands import plan
from t2i_jax.models import attention
from t2i_jax.objectives.parts import games
from tests import runs


def splash(monkeypatch):
    """Lets the CPU choose the TPU's kernel, interpreted."""
    monkeypatch.setattr(attention, "BEST", {"cpu": "splash"})
    monkeypatch.setattr(attention, "LARGE", 0)
    of = functools.partial(attention._splash, interpret=True)
    monkeypatch.setattr(attention, "_splash", of)


def arrays(t, s, dtype="float32", heads=2, width=24):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(3, n, heads, width) for n in (t, s, s, t)]
    return [jax.random.normal(k, x).astype(dtype) for k, x in zip(keys, shapes, strict=True)]


def value_and_gradients(q, k, v, weight, **options):
    """Of the same sum, with new programs at each call."""
    fn = lambda *qkv: (attention.attention(*qkv, **options) * weight).sum()
    out = attention.attention(q, k, v, **options)
    return [out, *jax.grad(fn, (0, 1, 2))(q, k, v)]


@pytest.mark.parametrize(
    ("t", "s", "masked"),
    [(256, 256, False), (130, 40, True), (128, 520, True), (20, 300, False)],
    ids=["whole blocks", "cross attention", "more than a block of keys", "filled"],
)
def test_the_tpus_kernel_is_xlas(t, s, masked, monkeypatch):
    """Values and gradients, also of an example that hides all keys."""
    q, k, v, weight = arrays(t, s)
    mask = jnp.arange(s)[None] < jnp.array([[s // 3], [s], [0]]) if masked else None
    options = dict(mask_BS=mask, scale=0.3)
    wanted = value_and_gradients(q, k, v, weight, **options)
    splash(monkeypatch)
    found = value_and_gradients(q, k, v, weight, **options)
    jaxpr = str(jax.make_jaxpr(functools.partial(attention.attention, **options))(q, k, v))
    assert "pallas_call" in jaxpr
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_tpus_kernel_in_half_precision(dtype, monkeypatch):
    q, k, v, _ = arrays(256, 256, dtype)
    wide = attention.attention(*(x.astype("float32") for x in (q, k, v)))
    splash(monkeypatch)
    out = attention.attention(q, k, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype("float32"), wide, atol=1e-2)


def test_the_gradient_of_a_slope_needs_no_kernel(monkeypatch):
    """A discriminator's exact penalty is a second derivative, which the TPU's kernel lacks."""
    image_BHWC = arrays(8, 8)[0]

    def gradient(logit):
        penalty = games.slopes("exact", logit, None, 0.0)
        return jax.grad(lambda x: penalty(x).sum())(image_BHWC)

    logit = lambda x: jnp.square(attention.attention(x, x, x)).sum((1, 2, 3))
    wanted = gradient(logit)
    splash(monkeypatch)
    np.testing.assert_allclose(gradient(logit), wanted, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 128, 500, 512, 513, 4096, 4129, 4608])
def test_blocks_hold_all_tokens_and_little_more(n):
    block, length = attention._blocks(n)
    assert block in (128, 256, 384, 512)
    assert length % block == 0
    assert n <= length < n + 128 * math.ceil(n / 512)


def test_what_a_kernel_cannot_do_is_refused_or_left_to_xla(monkeypatch):
    q, k, v, _ = arrays(16, 16)
    attend = functools.partial(attention.attention, q, k, v)
    cases = [
        ("splash", dict(bias_NTS=jnp.ones((2, 16, 16)))),
        ("splash", dict(mask_BTS=jnp.ones((3, 16, 16), bool))),
        ("by_head", dict(causal=True)),
        ("cudnn", {}),  # float32
    ]
    few = attend(causal=True)
    monkeypatch.setattr(attention, "LARGE", 0)
    for kernel, options in cases:
        monkeypatch.setattr(attention, "BEST", {"cpu": kernel})
        attend(**options)  # by XLA
        monkeypatch.setattr(sharding, "kernel", lambda name=kernel: name)
        with pytest.raises(errors.ConfigError, match=r"config\.attention"):
            attend(**options)
        monkeypatch.setattr(sharding, "kernel", lambda: "auto")
    monkeypatch.setattr(attention, "LARGE", 16 * 16 + 1)
    monkeypatch.setattr(sharding, "kernel", lambda: "splash")
    np.testing.assert_array_equal(attend(causal=True), few)  # too few tokens for a kernel


@pytest.mark.parametrize("kernel", ["splash", "cudnn", "flash"])
def test_a_run_refuses_a_kernel_that_its_devices_lack(kernel, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"config\.attention"):
        loop.train(runs.config(attention=kernel), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_layouts_kernel_is_what_compiles(monkeypatch):
    """Within the context alone, and for each layout its own."""
    monkeypatch.setattr(attention, "LARGE", 0)
    q, k, v, _ = arrays(16, 16)
    layout = sharding.Layout({"data": 1}, devices=jax.devices()[:1], attention="xla")
    text = lambda fn: str(jax.make_jaxpr(fn)(q, k, v))
    assert "scan" in text(lambda *x: attention.attention(*x))
    assert "scan" not in text(layout.context()(lambda *x: attention.attention(*x)))
    assert "scan" in text(lambda *x: attention.attention(*x))


def test_operations_of_a_kernel_count_for_all_its_blocks(monkeypatch):
    q, k, v, _ = arrays(1024, 512, heads=1, width=128)
    count = lambda: plan.flops(jax.make_jaxpr(lambda *x: attention.attention(*x))(q, k, v))
    plain = count()
    splash(monkeypatch)
    assert count() == plain == 3 * 2 * 2 * 1024 * 512 * 128


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("axes", [{"data": 1}, {"data": -1}, {"data": 2, "tensor": 2}], ids=str)
def test_compiled_for_a_tpu_no_scores_are_in_memory(axes):
    devices = plan.slice_devices("v5e:2x2")[: 1 if axes == {"data": 1} else 4]
    layout = sharding.Layout(axes, "fsdp", devices=devices)  # "auto": the devices are no CPUs
    each = jax.ShapeDtypeStruct((4, 4096, 2, 72), jnp.bfloat16, sharding=layout.batch)
    mask = jax.ShapeDtypeStruct((4, 4096), bool, sharding=layout.batch)
    fn = lambda q, k, v, mask: attention.attention(q, k, v, mask_BS=mask).sum()
    step = jax.jit(layout.context()(jax.grad(fn, (0, 1, 2))))
    temporaries = plan.needs(step.trace(each, each, each, mask)).temporaries
    scores = 2 * 4 * 2 * 4096**2 / len(devices)  # bytes of bfloat16, on each device
    assert temporaries < scores / 2
