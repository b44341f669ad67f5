"""Adapters: start as nothing, learn, are small, and merge into what they are with the net."""

import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes_transformer
from t2i_jax import errors, loop, lora, objective, pipeline, weights
from tests import runs

ROOT = pathlib.Path(__file__).parent.parent


def debug(**changes):
    config = shapes_transformer.get_config("debug")
    config.loss.prediction = "v"
    config.optim.model = dict(name="adamw", learning_rate=1e-3)  # compiles faster
    config.update({"steps": 3, "sample_every": 0, **changes})
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run whose model is to be adapted."""
    workdir = tmp_path_factory.mktemp("base")
    loop.train(debug(), workdir)
    return workdir


def adapted(base, spec=None):
    """A run's model, frozen, with adapters."""
    config = debug(lora=spec or dict(model=dict(rank=2)))
    config.load = dict(model=str(base))
    config.optim = dict(model_lora=dict(name="adam", learning_rate=1e-2))
    config.ema = dict(model_lora=0.5)
    return config


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    loop.train(adapted(base), workdir)
    return workdir


def test_an_adapter_starts_as_nothing_and_its_net_stays(base, tuned):
    now = pipeline.Pipeline.load(str(tuned))
    family = now.predictor.objective
    assert family.trained == ("model_lora",)
    fresh = jax.jit(family.init)(
        jax.random.key(0), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), batch(now.config))
    )
    options = lora.Options(rank=2)
    for adapter, same in ((fresh["model_lora"], True), (now.nets["model_lora"], False)):
        merged = lora.merge(now.nets["model"]["params"], adapter["params"], options)
        pairs = zip(
            jax.tree.leaves(merged), jax.tree.leaves(now.nets["model"]["params"]), strict=True
        )
        assert all(bool((a == b).all()) for a, b in pairs) == same


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_frozen_nets(base, tuned, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(tuned, tmp_path / "run")
    config = adapted(tmp_path / "base")
    config.steps = 4
    text = (tmp_path / "run/config.json").read_text().replace(str(base), str(tmp_path / "base"))
    (tmp_path / "run/config.json").write_text(text)
    loop.train(debug(steps=6), tmp_path / "base")  # trained on meanwhile
    with pytest.raises(errors.ConfigError, match="not those the run was trained with"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/attempts.json").exists()


def batch(config):
    return runs.abstract_batch(config, 2)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (3, 3, 5, 4)])
def test_a_merged_kernel_is_the_sum_of_both(shape):
    """Of a dense layer, of stacked ones, and of a convolution (Hu et al. 2021, equation 3)."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape).astype(np.float32)
    params = {"layer": {"kernel": kernel, "bias": np.zeros(4, np.float32)}}
    options = lora.Options(rank=2, alpha=6.0)
    adapter = lora._init(jax.random.key(0), params, options, "net", {"layer"})
    pair = adapter["layer"]["kernel"]
    pair["b"] = rng.normal(size=pair["b"].shape).astype(np.float32)
    got = lora.merge(params, adapter, options)["layer"]
    x = rng.normal(size=(2, *shape[:-1]))
    if len(shape) == 3:
        want = [x @ (kernel[i] + 3 * pair["a"][i] @ pair["b"][i]) for i in range(3)]
        want = np.stack([w[:, i] for i, w in enumerate(want)], 1)
        ours = np.einsum("nli,lio->nlo", x, got["kernel"])
    else:
        flat = x.reshape(2, -1)
        want = flat @ kernel.reshape(-1, 4) + 3 * flat @ pair["a"] @ pair["b"]
        ours = flat @ got["kernel"].reshape(-1, 4)
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)
    assert got["bias"] is params["layer"]["bias"]


class Layers(nn.Module):
    """A convolution with stride and padding, scanned dense layers, a dense layer in bfloat16."""

    @nn.compact
    def __call__(self, x_BHWC):
        x = nn.Conv(6, (3, 3), strides=(2, 1), padding=((0, 1), (1, 1)), name="conv")(x_BHWC)
        stack = dict(variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True})
        body = lambda dense, x: (dense(x), None)
        x, _ = nn.scan(body, length=3, **stack)(nn.Dense(6, name="dense"), x)
        return nn.Dense(4, dtype="bfloat16", name="last")(x).astype("float32")


def test_a_net_with_adapters_beside_it_is_the_merged_one():
    """Their products are never made, and give the same outputs and gradients."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 5, 3))
    family = objective.Objective(
        init=lambda key, batch: {"model": Layers().init(key, x)},
        losses=(objective.Loss(("model",), lambda nets, *_: (apply(nets).mean(), None)),),
        predict={"out": lambda nets, batch, key: apply(nets)},
    )
    apply = lambda nets: jnp.square(Layers().apply(nets["model"], x))
    adapted = lora.wrap(family, {"model": {"rank": 2, "alpha": 6.0}})
    nets = adapted.init(jax.random.key(1), None)
    nets["model_lora"] = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape), nets["model_lora"]
    )
    options = lora.Options(rank=2, alpha=6.0)

    def merged(adapter):
        params = lora.merge(nets["model"]["params"], adapter["params"], options)
        return apply({"model": {"params": params}})

    beside = lambda adapter: adapted.predict["out"]({**nets, "model_lora": adapter}, None, None)
    for fn in (lambda f: f, lambda f: jax.grad(lambda adapter: f(adapter).mean())):
        want, got = fn(merged)(nets["model_lora"]), fn(beside)(nets["model_lora"])
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            assert jnp.abs(a - b).max() <= 0.03 * jnp.abs(a).max()  # bfloat16 in the last layer


def test_no_gradient_of_a_whole_kernel_is_made():
    """The compiled step's largest temporary is smaller than the adapted kernel."""
    n = 512
    net = nn.Dense(n)
    family = objective.Objective(
        init=lambda key, batch: {"model": net.init(key, jnp.ones((1, n)))},
        losses=(
            objective.Loss(
                ("model",), lambda nets, x, *_: (net.apply(nets["model"], x).var(), None)
            ),
        ),
        predict={},
    )
    adapted = lora.wrap(family, {"model": {"rank": 2}})
    nets = adapted.init(jax.random.key(0), None)
    own = lambda adapter, x: adapted.losses[0].fn({**nets, "model_lora": adapter}, x, None, 0)[0]
    step = jax.jit(jax.grad(own)).lower(nets["model_lora"], jnp.ones((4, n))).compile()
    assert step.memory_analysis().temp_size_in_bytes < n * n * 4 / 4


@pytest.mark.slow
def test_the_exported_adapter_is_small_and_draws_what_the_merged_model_draws(base, tuned, tmp_path):
    export = [sys.executable, "-m", "t2i_jax", "export", f"--workdir={tuned}", "--dtype=float32"]
    for name, more in (("alone", []), ("merged", ["--merge"])):
        done = subprocess.run([*export, f"--output={tmp_path / name}", *more], cwd=ROOT)
        assert done.returncode == 0
    size = lambda name: (tmp_path / name / "model.safetensors").stat().st_size
    assert weights.nets_in(tmp_path / "alone") == ["model_lora"]
    assert weights.nets_in(tmp_path / "merged") == ["model"]
    assert size("alone") < 0.7 * size("merged")
    draw = lambda path: pipeline.Pipeline.load(str(path))(["a red circle"], steps=2).astype(int)
    alone, merged, before = map(draw, (tmp_path / "alone", tmp_path / "merged", base))
    assert np.abs(alone - draw(tuned)).max() == 0
    assert np.abs(alone - merged).max() <= 1
    assert np.abs(alone - before).max() > 1


def test_the_adapter_of_a_frozen_encoder_is_trained_by_the_last_loss(base):
    config = adapted(base, dict(text=dict(rank=2, match="qkv")))
    config.load = {}
    family = objective.make(config)
    assert family.losses[0].nets == ("model", "text_lora")
    shapes = weights.abstract_nets(family, config)
    assert set(shapes["text_lora"]["params"]["layer_0"]) == {"qkv"}
    config.cache = "encode"
    with pytest.raises(errors.ConfigError, match="cached caption states"):
        objective.make(config)


def test_an_adapter_of_other_pictures_than_the_nets_is_refused(base, tmp_path):
    config = adapted(base)
    config.res = 32
    with pytest.raises(errors.ConfigError, match="32 pixels a side, of a net for 16"):
        loop.train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(model=dict(rank=0)), "rank is 0"),
        (dict(model=dict(rank=2.5)), "rank is 2.5"),
        (dict(model=dict(match="(")), "give a text that is a regular expression"),
        (dict(model=8), "give a dictionary"),
        (dict(model=dict(rnk=4)), "rnk"),
        (dict(modell=dict()), "unknown net 'modell' .at config.lora"),
        (dict(model=dict(match="nothing")), "no kernel of 'model' matches 'nothing'"),
    ],
)
def test_a_bad_adapter_is_refused_before_anything_is_written(base, tmp_path, spec, message):
    with pytest.raises(errors.ConfigError, match=message):
        loop.train(adapted(base, spec), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_merging_keeps_what_half_precision_would_lose():
    """A frozen kernel may be bfloat16, whose steps are larger than most changes."""
    kernel = jnp.ones((8, 8), jnp.bfloat16)
    adapter = {"dense": {"kernel": {"a": np.full((8, 1), 1e-3), "b": np.ones((1, 8))}}}
    merged = lora.merge({"dense": {"kernel": kernel}}, adapter, lora.Options(rank=1))
    np.testing.assert_allclose(merged["dense"]["kernel"], 1.001, rtol=1e-6)


@pytest.mark.slow
def test_adapters_learn_beside_a_net_in_eight_bits(base, tmp_path):
    """A stopped run goes on with the same bits, and draws with the base that it learned beside."""
    config = adapted(base)
    config.int8 = "model"
    whole = loop.train(config, tmp_path / "whole")
    config.steps = 2
    loop.train(config, tmp_path / "parts")
    config.steps = 3
    assert loop.train(config, tmp_path / "parts") == whole
    pipe = pipeline.Pipeline.load(str(tmp_path / "whole"))
    kinds = {x.dtype for x in jax.tree.leaves(pipe.nets["model"])}
    assert np.dtype("int8") in kinds
    pictures = pipe(["a red circle"], steps=2)
    merged, plain = lora.merge_run(pipe.nets, pipe.config)
    again = pipeline.Predictor(plain).sample(merged, ["a red circle"], steps=2)
    assert np.abs(pictures.astype(int) - again).max() <= 1
    config.int8 = ""
    with pytest.raises(errors.ConfigError, match="int8: 'model'"):
        loop.train(config, tmp_path / "parts")
    config.int8 = "model_lora"
    with pytest.raises(errors.ConfigError, match=r"config\.int8"):
        loop.train(config, tmp_path / "new")
