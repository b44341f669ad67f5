"""Kernels in eight bits: near the kernels they stand for, and a byte for each number."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from t2i_jax import errors, int8, pipeline, sharding


def test_a_kernel_is_within_half_a_step_of_each_channel():
    w = np.random.default_rng(0).normal(size=(3, 3, 8, 5)).astype(np.float32)
    w *= 10.0 ** np.arange(-2, 3)
    w[..., 2] = 0
    kernel = int8.quantised(w)
    assert kernel.q.dtype == jnp.int8
    assert kernel.scale.shape == (1, 1, 1, 5)
    step = np.abs(w).max((0, 1, 2)) / 127
    error = np.abs(kernel.unbox() - w).max((0, 1, 2))
    assert (error <= 0.5001 * step).all()
    assert (error > 0.2 * step)[[0, 1, 3, 4]].all()  # and it is rounded
    assert not np.asarray(kernel.unbox())[..., 2].any()


@pytest.mark.parametrize("scan", [False, True])
def test_a_module_reads_what_the_box_stands_for(scan):
    """As with the rounded kernels themselves, also in a scan, and with gradients of the input."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x = nn.Conv(4, (3, 3))(x)
            return nn.tanh(nn.Dense(4, dtype="bfloat16")(x)).astype("float32"), None

    stack = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    net = nn.scan(Layer, **stack)() if scan else Layer()
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
    variables = net.init(jax.random.key(0), x, None)
    boxed = int8.stored(variables)
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_of(boxed) < 0.5 * bytes_of(variables)  # tiny kernels with large scales
    fn = lambda v: jax.value_and_grad(lambda x: net.apply(v, x, None)[0].sum())(x)
    found = [jax.tree.leaves(fn(v)) for v in (boxed, meta.unbox(boxed), variables)]
    for a, b, exact in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert not np.array_equal(a, exact)
    layers = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, int8.Kernel))
    dense = next(x for x in layers if isinstance(x, int8.Kernel) and x.q.ndim == 2 + scan)
    assert dense.scale.shape == ((3, 1, 4) if scan else (1, 4))  # of each layer its own


def test_split_over_devices_the_bytes_are_gathered():
    """Boxes of split parts lie within the kernel's, and open to the same numbers."""
    layout = sharding.Layout({"data": 1}, "fsdp", devices=jax.devices()[:1])
    net = {"params": {"d": {"kernel": np.ones((8, 4), np.float32), "bias": np.ones(4, "float32")}}}
    nets = {"net": int8.stored(net)}

    def split(x):
        return layout.gather(jax.device_put(x, layout.nets(x)))

    kernel = split(nets)["net"]["params"]["d"]["kernel"]
    assert isinstance(kernel, int8.Kernel)
    assert isinstance(kernel.q, sharding.GatherAtUse)
    assert kernel.q.value.dtype == jnp.int8
    np.testing.assert_allclose(meta.unbox(kernel), net["params"]["d"]["kernel"], rtol=1e-6)
    by_hand = layout.gather(nets, at_use=False)["net"]["params"]["d"]["kernel"]
    assert by_hand.q.dtype == jnp.int8


@pytest.mark.slow
def test_a_built_in_model_draws_nearly_the_same():
    """And its text encoder may be so, too; only nets that there are."""
    options = dict(seed=3, steps=4)
    names = ["a red circle on a white background", "a blue square"]
    draw = lambda **load: pipeline.Pipeline.load("builtin:shapes", **load)
    plain, small = draw(), draw(int8="model, text")
    bytes_of = lambda pipe, net: sum(x.nbytes for x in jax.tree.leaves(pipe.nets[net]))
    assert bytes_of(small, "model") < 0.3 * bytes_of(plain, "model")
    a, b = (pipe(names, **options).astype(float) for pipe in (plain, small))
    assert 0 < np.abs(a - b).mean() < 4
    with pytest.raises(errors.ConfigError, match="modle"):
        draw(int8="modle")
