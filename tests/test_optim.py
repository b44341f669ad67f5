"""Optimisers on real nets: what Muon takes for a matrix, and what decays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import (
    digits_mlp_gan,
    dit,
    shapes_clip,
    shapes_finetune,
    shapes_gan,
    shapes_gan_from_flow,
)
from t2i_jax import errors, objective, optim, step, weights
from t2i_jax.models import transformer
from t2i_jax.models.types import Cond
from t2i_jax.run import hooks
from t2i_jax.run.fingerprint import path_of
from tests import toys

DEPTH = 2
MUON = dict(name="muon", learning_rate=1.0, consistent_rms=1.0)
FAMILIES = {
    "flow": shapes_finetune,  # U-net, and a text encoder with embeddings
    "flow, scanned": dit,
    "gan": shapes_gan,
    "gan, one step": shapes_gan_from_flow,
    "gan, dense": digits_mlp_gan,
    "clip": shapes_clip,
}


def by_path(tree) -> dict:
    return {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def updated(spec, grads, params=None):
    """The first update that an optimiser makes, of parameters that are 0."""
    found = optim.make(spec, steps=10, where="test")
    params = jax.tree.map(jnp.zeros_like, grads) if params is None else params
    return jax.jit(found.update)(grads, found.init(params), params, 0)[0]


def gradient(rng, shape):
    """Random, with singular values from 0.3 to 1."""
    if len(shape) < 2:
        return rng.standard_normal(shape).astype(np.float32)
    left, _, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return (left * np.linspace(1, 0.3, left.shape[-1]) @ right).astype(np.float32)


@pytest.fixture(scope="module")
def grads():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: gradient(rng, x.shape), shapes(scan=False))


@pytest.fixture(scope="module")
def unrolled(grads):
    return updated(MUON, grads)


@pytest.fixture(scope="module")
def scanned(grads):
    grads = stacked(grads)
    assert jax.tree.map(np.shape, grads) == jax.tree.map(np.shape, shapes(scan=True))
    return updated(MUON, grads)


def shapes(scan: bool):
    """The parameters of a transformer."""
    net = transformer.Backbone(width=8, depth=DEPTH, heads=2, patch=4, scan=scan)
    cond = Cond(jnp.zeros((1, 3, 12)), jnp.ones((1, 3), bool), jnp.zeros((1, 12)))
    inputs = (jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), cond)
    return jax.eval_shape(net.init, *inputs)["params"]


def stacked(tree):
    """Parameters of the unrolled transformer as the scanned one has them."""
    whole = {name: x for name, x in tree.items() if not name.startswith(("kvs_", "blocks_"))}
    for name in ("kvs", "blocks"):
        layers = [tree[f"{name}_{i}"] for i in range(DEPTH)]
        whole[f"{name}_0"] = jax.tree.map(lambda *xs: np.stack(xs), *layers)
    return whole


def test_muon_trains_scanned_layers_as_unrolled_ones(unrolled, scanned):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), stacked(unrolled), scanned
    )


def test_muon_makes_kernels_nearly_orthogonal_and_touches_nothing_else(unrolled):
    """Its five iterations bring singular values to 0.7 … 1.2."""
    kernels = 0
    for path, x in by_path(unrolled).items():
        if not path.endswith("kernel") or path.startswith("leave/"):  # Adam's first step
            assert np.ptp(np.abs(x)) < 1e-2, path
        else:
            near_orthogonal(x, path)
            kernels += 1
    assert kernels == 6 + 10 * DEPTH


def near_orthogonal(x, name=""):
    values = np.linalg.svd(x / max(x.shape) ** 0.5, compute_uv=False)
    np.testing.assert_array_less(np.abs(values - 0.95), 0.3, err_msg=name)


def test_muon_takes_a_convolution_for_one_matrix_alone_and_in_a_stack():
    rng = np.random.default_rng(0)
    stack = gradient(rng, (2, 3 * 3 * 2, 8)).reshape(2, 3, 3, 2, 8)
    found = updated(MUON, {"a": {"kernel": stack}, "b": {"kernel": stack[1]}})
    for layer in (*found["a"]["kernel"], found["b"]["kernel"]):
        near_orthogonal(layer.reshape(18, 8))
    np.testing.assert_allclose(found["a"]["kernel"][1], found["b"]["kernel"], atol=1e-5)


def test_muon_leaves_embeddings_and_last_layers_to_adam():
    paths = {
        "flow": ("leave/Conv_0/kernel", "word/embedding", "position/embedding"),
        "gan": ("verdict/real/kernel", "leave/Conv_0/kernel"),
        "clip": ("projection/Dense_0/kernel",),
    }
    for name, ends in paths.items():
        numbers = optim._matrices(trained(FAMILIES[name]))
        is_leaf = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
        numbers = {
            path_of(path): n
            for path, n in jax.tree_util.tree_leaves_with_path(numbers, is_leaf=is_leaf)
        }
        assert {len(n.reduction_axis) for n in numbers.values()} <= {1, 3}  # Dense, Conv
        assert not any(path.endswith(ends) for path in numbers)
        every = by_path(trained(FAMILIES[name]))
        assert all(any(path.endswith(end) for path in every) for end in ends)


def test_muons_adam_keeps_its_own_rate_and_the_common_schedule():
    grads = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    whole = updated(MUON, grads)
    own = updated(dict(MUON, adam_learning_rate=0.1, warmup=4), grads)
    np.testing.assert_allclose(own["bias"], whole["bias"] * 0.1 / 4, rtol=1e-5)
    np.testing.assert_allclose(own["kernel"], whole["kernel"] / 4, rtol=1e-5)


@functools.cache
def trained(config):
    """The parameters, as shapes, of the nets that a config trains."""
    config = config.get_config("debug")
    family = objective.make(config)
    nets = weights.abstract_nets(family, config)
    return {net: nets[net]["params"] for net in family.trained}


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_decay_and_nothing_else(name):
    """No norm, bias, null token, logit scale or embedding of any family."""
    params = trained(FAMILIES[name])
    decays = by_path(optim._kernels(params))
    assert {path.rpartition("/")[2] for path in decays} >= {"kernel", "bias", "scale"}
    for path, decayed in decays.items():
        assert decayed == path.endswith("/kernel"), path
    assert all(by_path(params)[path].ndim >= 2 for path in decays if decays[path])


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lion", "lamb", "lars", "adan", "muon"])
def test_every_optimiser_with_a_mask_spares_vectors(name):
    """Without gradients decay is all that moves."""
    params = {"kernel": np.ones((4, 4)), "bias": np.ones(4), "norm": {"scale": np.ones((2, 4))}}
    spec = dict(name=name, learning_rate=0.1, weight_decay=0.5)
    moved = updated(spec, jax.tree.map(np.zeros_like, params), params)
    assert (np.abs(moved["kernel"]) > 5e-5).all()
    assert not np.any(moved["bias"])
    assert not np.any(moved["norm"]["scale"])


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_state_is_that_of_checkpoints_from_before_decay_had_a_mask(name):
    params = {"kernel": np.ones((4, 4), np.float32), "bias": np.ones(4, np.float32)}
    found = optim.make(dict(name=name, learning_rate=0.1), steps=10, where="test")
    plain = getattr(optax, name, None) or optax.contrib.muon
    wanted = jax.tree.structure(plain(0.1).init(params))
    first = found.init(params)
    assert jax.tree.structure(first.inner_state) == wanted
    _, second = found.update(params, first, params, 0)
    assert jax.tree.structure(second) == jax.tree.structure(first)


def test_decay_that_no_mask_can_limit_is_told(caplog):
    optim.make(dict(name="novograd", learning_rate=0.1, weight_decay=0.5), steps=1, where="here")
    assert "novograd decays norms and biases, too" in caplog.text
    with pytest.raises(errors.ConfigError, match="Adam would decay norms"):
        optim.make(dict(MUON, adam_weight_decay=0.1), steps=1, where="here")


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion"])
def test_an_optimiser_that_branches_on_numbers_works(name):
    spec = dict(name=name, learning_rate=1e-2)
    made = optim.make(spec, steps=4, where="config.optim.model")
    params = {"kernel": jnp.ones((4, 4))}
    updates, _ = jax.jit(made.update)(params, made.init(params), params, jnp.int32(1))
    assert np.abs(updates["kernel"]).max() > 0


@pytest.mark.parametrize("name", ["lbfgs", "momo", "polyak_sgd"])
def test_an_optimiser_that_wants_more_than_gradients_is_refused(name):
    with pytest.raises(errors.ConfigError, match="cannot be used"):
        optim.make(dict(name=name, learning_rate=1e-2), steps=4, where="config.optim.model")


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_a_schedule_free_optimisers_point_is_the_mean_of_its_steps(name):
    """At a constant rate (arXiv:2405.15682): the parameters lie beside it."""
    made = optim.make(dict(name=name, learning_rate=0.1), steps=9, where="test")
    params = {"kernel": jnp.arange(8.0).reshape(2, 4)}
    state, seen = made.init(params), []
    for n in range(4):
        grads = jax.tree.map(lambda x: 2 * x - 1, params)
        updates, state = jax.jit(made.update)(grads, state, params, n)
        params = optax.apply_updates(params, updates)
        seen.append(state.inner_state.z["kernel"])
    point = made.point(state, params)["kernel"]
    np.testing.assert_allclose(point, np.mean(seen, 0), rtol=1e-5)
    assert np.abs(point - params["kernel"]).max() > 1e-3


def test_a_run_draws_at_a_schedule_free_optimisers_point():
    objective = toys.regression()
    spec = dict(name="schedule_free_sgd", learning_rate=0.1)
    optimisers = {"model": optim.make(spec, steps=9, where="test")}
    state = step.init(objective, optimisers, {"model": 0.0}, jax.random.key(1), toys.batch())
    update = jax.jit(step.make_update(objective, optimisers, ema={"model": 0.0}))
    for _ in range(3):
        state, _ = update(state, {}, toys.batch())
    params = state.nets["model"]["params"]
    drawn = hooks.averaged(state)["model"]["params"]
    wanted = optax.contrib.schedule_free_eval_params(state.opt["model"].inner_state, params)
    np.testing.assert_allclose(drawn["w"], wanted["w"], rtol=1e-6)
    assert np.abs(drawn["w"] - params["w"]).max() > 1e-4
    config = shapes_clip.get_config("debug")
    config.optim = dict.fromkeys(("image", "caption"), spec)
    config.ema = dict(image=0.9)
    with pytest.raises(errors.ConfigError, match=r"set config\.ema\.caption: 0\.0 keeps"):
        optim.make_all(config, ("image", "caption"))
