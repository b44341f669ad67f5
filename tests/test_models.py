"""Both backbones keep the same promises; convolutions are XLA's to any derivative."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.models import attention, convolution, layers, transformer, unet
from t2i_jax.models.types import Cond

TINY = {
    "transformer": transformer.Backbone(width=16, depth=2, heads=2),
    "unet": unet.Backbone(stem=8, width=16, depth=1, heads=2),
}


def inputs(b=2, length=5, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    cond = Cond(
        jax.random.normal(keys[0], (b, length, 12)),
        jnp.arange(length)[None] < jnp.array([[3], [5]])[:b],
        jax.random.normal(keys[1], (b, 12)),
    )
    return jax.random.normal(keys[2], (b, 16, 16, 3)), jnp.linspace(0.2, 0.9, b), cond


@pytest.fixture(scope="module", params=TINY)
def net(request):
    """A backbone whose zero-initialised layers are not zero, as after training."""
    module = TINY[request.param]
    variables = jax.jit(module.init)(jax.random.key(0), *inputs())
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(tree, moved), jax.jit(module.apply)


def test_a_fresh_network_predicts_zero():
    for module in TINY.values():
        variables = jax.jit(module.init)(jax.random.key(0), *inputs())
        assert not np.any(jax.jit(module.apply)(variables, *inputs()))


def test_text_keys_and_values_computed_before_give_the_same(net):
    module, variables, apply = net
    x, t, cond = inputs()
    before = module.apply(variables, cond, method="prepare")
    np.testing.assert_allclose(
        apply(variables, x, t, cond), apply(variables, x, t, cond, before), atol=1e-5
    )


def test_bfloat16_adds_up_in_float32(net):
    """Blocks compute in it, what passes them by does not: outputs and gradients are near."""
    module, variables, _ = net
    x, t, cond = inputs()

    @functools.partial(jax.jit, static_argnums=0)
    def results(module):
        out, pull = jax.vjp(lambda v: module.apply(v, x, t, cond), variables)
        return out, jnp.concatenate([g.ravel() for g in jax.tree.leaves(pull(x))])

    exact, near = results(module), results(module.clone(dtype="bfloat16"))
    for ours, want in zip(near, exact, strict=True):
        error = float(jnp.linalg.norm(ours - want) / jnp.linalg.norm(want))
        assert 1e-5 < error < (4e-3 if isinstance(module, transformer.Backbone) else 8e-3)


def test_padding_of_the_text_changes_nothing(net):
    _, variables, apply = net
    x, t, cond = inputs()
    other = cond._replace(seq_BLD=jnp.where(cond.mask_BL[..., None], cond.seq_BLD, 1e3))
    ours, moved = (apply(variables, x, t, c) for c in (cond, other))
    np.testing.assert_allclose(ours, moved, atol=1e-5)


def test_text_and_time_reach_every_part_of_the_picture(net):
    _, variables, apply = net
    x, t, cond = inputs()
    out = apply(variables, x, t, cond)
    for other in (
        apply(variables, x, t, cond._replace(seq_BLD=cond.seq_BLD + 1)),
        apply(variables, x, t, cond._replace(pooled_BD=-cond.pooled_BD)),
        apply(variables, x, t + 0.05, cond),
    ):
        assert (np.abs(out - other).max(axis=(1, 2, 3)) > 1e-4).all()


def test_a_caption_without_tokens_is_finite_and_like_no_other(net):
    _, variables, apply = net
    x, t, cond = inputs()
    null = cond._replace(mask_BL=jnp.zeros_like(cond.mask_BL))
    out = apply(variables, x, t, null)
    assert np.isfinite(out).all()
    assert np.abs(out - apply(variables, x, t, cond)).max() > 1e-4


def test_examples_do_not_see_each_other(net):
    _, variables, apply = net
    x, t, cond = inputs()
    moved = apply(variables, x.at[1].add(1.0), t, cond)
    np.testing.assert_allclose(apply(variables, x, t, cond)[0], moved[0], atol=1e-5)


def test_space_to_depth_and_back():
    x = np.random.default_rng(0).random((2, 8, 8, 3))
    np.testing.assert_array_equal(layers.depth_to_space(layers.space_to_depth(x, 4), 4), x)
    np.testing.assert_array_equal(layers.space_to_depth(x, 2)[0, 0, 0, :3], x[0, 0, 0])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradient_are_the_textbook_formula(masked, by_head, monkeypatch):
    monkeypatch.setattr(attention, "LARGE", 0 if by_head else 2**30)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, n, 3, 8)) for key, n in zip(keys, (4, 6, 6), strict=True))
    mask = jnp.arange(6)[None] < jnp.array([[2], [6]]) if masked else None

    def formula(q, k, v):
        score = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
        if masked:
            score = jnp.where(mask[:, None, None], score, -1e9)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(score), v)

    def ours(q, k, v):
        return attention.attention(q, k, v, mask_BS=mask)

    np.testing.assert_allclose(ours(q, k, v), formula(q, k, v), atol=1e-5)
    gradients = lambda f: jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))(q, k, v)
    for a, b in zip(gradients(ours), gradients(formula), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("large", [0, 2**30])
def test_attention_with_every_key_masked_is_finite(large, monkeypatch):
    monkeypatch.setattr(attention, "LARGE", large)
    q = jnp.ones((1, 2, 1, 4))
    assert np.isfinite(attention.attention(q, q, q, mask_BS=jnp.zeros((1, 2), bool))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_by_head_is_all_at_once(dtype, monkeypatch):
    """With a mask of each query, and for several heads and examples."""
    keys, found = jax.random.split(jax.random.key(0), 4), []
    q, k, v = (jax.random.normal(x, (2, 5, 3, 8)).astype(dtype) for x in keys[:3])
    mask_BTS = jax.random.bernoulli(keys[3], 0.7, (2, 5, 5))
    for large in (0, 2**30):
        monkeypatch.setattr(attention, "LARGE", large)
        found.append(attention.attention(q, k, v, mask_BTS=mask_BTS, scale=0.5))
    assert found[0].dtype == q.dtype
    np.testing.assert_allclose(
        *(x.astype(jnp.float32) for x in found), atol=1e-6 if dtype == "float32" else 2e-2
    )


@pytest.fixture(scope="module", params=["parts", "products"])
def convolved(request):
    """The convolution by parts or by products and XLA's, with their arguments."""
    size, channels, features = (16, 3, 5) if request.param == "parts" else (4, 64, 65)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (size, size, size, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, features)) / np.sqrt(channels / 3)
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    ours, theirs = (
        lambda x, kernel, fn=fn: jnp.tanh(fn(x, kernel, (1, 1), "SAME", **options))
        for fn in (convolution.conv, jax.lax.conv_general_dilated)
    )
    return ours, theirs, x, kernel


def test_convolutions_derivatives_of_all_orders_are_xlas(convolved):
    *fns, x, kernel = convolved

    def penalty(fn, x, kernel):
        return jnp.square(jax.grad(lambda x: jnp.square(fn(x, kernel)).sum())(x)).sum()

    ways = {
        "value": lambda fn: fn(x, kernel),
        "gradients": lambda fn: jax.grad(lambda *a: jnp.square(fn(*a)).sum(), (0, 1))(x, kernel),
        "of a gradient": lambda fn: jax.grad(lambda *a: penalty(fn, *a), (0, 1))(x, kernel),
        "forwards": lambda fn: jax.jvp(lambda x: fn(x, kernel), (x,), (x,)),
        "forwards, of both": lambda fn: jax.jvp(fn, (x, kernel), (x, kernel)),
    }
    for name, way in ways.items():
        got, wanted = (jax.jit(lambda way=way, fn=fn: way(fn))() for fn in fns)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=name)


def test_a_kernels_gradient_is_summed_over_parts_without_a_conditional(convolved):
    """On CPUs convolutions within a conditional or a loop run through naive code."""
    ours, theirs, x, kernel = convolved
    count = {}
    for fn in (ours, theirs):
        gradient = jax.jit(jax.grad(lambda *a, fn=fn: jnp.square(fn(*a)).sum(), 1))
        program = gradient.lower(x, kernel).compile().as_text()
        assert not re.search(r" (conditional|while)\(", program)
        count[fn] = len(re.findall(r" convolution\(", program))
    parts = 8 if x.shape[-1] == 3 else 0  # 4096 pixels, 512 a part; products are none
    assert count[ours] == count[theirs] - 1 + parts
