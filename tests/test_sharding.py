"""Strategies on eight simulated devices: the same numbers, and only what was planned on each."""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from configs import dit
from t2i_jax import errors, objective, optim, sharding, step
from tests import runs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quick():
    return on_eight_devices()


@pytest.fixture(scope="module")
def long():
    return on_eight_devices("--long")


def test_pictures_cross_as_bytes_and_become_numpys_floats_to_the_bit():
    layout = sharding.Layout({"data": 1})
    image = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    placed = layout.place({"image": image, "float": image / np.float32(2), "mask": image > 9})
    assert {name: x.dtype.name for name, x in placed.items()} == {
        "image": "float32",
        "float": "float32",
        "mask": "bool",
    }
    bits = lambda x: np.asarray(x).view(np.int32)
    wanted = image.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(bits(placed["image"]), bits(wanted))
    np.testing.assert_array_equal(placed["float"], image / np.float32(2))
    assert placed["image"].sharding.is_equivalent_to(layout.batch, 4)


def on_eight_devices(*flags):
    """What tests/on_eight_devices.py saw: case -> numbers."""
    eight = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": eight}
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_eight_devices", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SLOW = pytest.mark.slow
CASES = ["pmap", "zero1", "fsdp", "fsdp/2", "tensor"]
CASES += [pytest.param(case, marks=SLOW) for case in ("data", "data/2", "zero1/2", "tensor fsdp")]


@pytest.fixture
def found(request):
    """The run that has the test's case."""
    marked = request.node.get_closest_marker("slow")
    return request.getfixturevalue("long" if marked else "quick")


@pytest.mark.parametrize("case", CASES)
def test_every_strategy_trains_as_one_device_does(found, case):
    """First loss ≤ 1e-6, weights after three steps ≤ 1e-5 of the largest, as on one device."""
    assert found[case]["loss"] == pytest.approx(found["one"]["loss"], rel=1e-6)
    assert found[case]["grad_norm"] == pytest.approx(found["one"]["grad_norm"], rel=1e-5)
    assert found[case]["difference"] <= 1e-5


@SLOW
def test_arrays_split_over_a_part_or_over_two_axes_train_as_on_one_device(found):
    one = found["uneven one"]
    for case, share in (("uneven fsdp", 1 / 8), ("uneven zero1", (1 + 3 / 8) / 4)):
        assert found[case]["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert found[case]["difference"] <= 1e-5
        assert found[case]["held"] <= share + 0.02
        assert found[case]["donated"] == found[case]["state_bytes"]
        assert set(found[case]["collectives"]) <= {"all-reduce", "reduce-scatter", "all-gather"}


@SLOW
def test_features_and_contrast_are_those_of_one_device(found):
    assert found["features"]["difference"] <= 1e-6
    assert found["contrast"]["difference"] <= 1e-6


@SLOW
@pytest.mark.parametrize("name", ["gan", "vae", "recurrent", "kl", "vq", "ar", "joint", "masked"])
def test_a_family_trains_as_on_one_device(found, name):
    assert found[name]["difference"] <= 1e-5


def test_a_guided_draw_moves_nothing_between_devices_but_the_pictures(quick):
    once = {"all-gather": [1, quick["guided"]["picture_bytes"]]}
    assert quick["guided"]["always"] == quick["guided"]["at times"] == once


def test_each_device_holds_its_share(found):
    assert found["pmap"]["held"] == 1
    assert found["zero1"]["held"] <= (1 + 3 / 8) / 4 + 0.02  # of weights, two moments, averages
    assert found["fsdp"]["held"] <= 1 / 8 + 0.02


def test_what_is_donated_is_the_state(found):
    for case in ("pmap", "zero1", "fsdp"):
        assert found[case]["donated"] == found[case]["state_bytes"]


@pytest.mark.parametrize("case", [case for case in CASES if "tensor" not in str(case)])
def test_gradients_are_reduced_once_a_step(found, case):
    """With micro-batches, too: the bytes all-reduced are those of the parameters, and metrics."""
    sums = found[case]["collectives"]
    reduced = sums.get("all-reduce", 0) + sums.get("reduce-scatter", 0)
    assert reduced <= found["one"]["parameter_bytes"] + 4096
    assert reduced >= 0.99 * found["one"]["parameter_bytes"]


@pytest.mark.parametrize(
    "case", ["pmap", pytest.param("data", marks=SLOW), pytest.param("data/2", marks=SLOW)]
)
def test_whole_parameters_need_no_gathering(found, case):
    assert set(found[case]["collectives"]) == {"all-reduce"}
    assert found[case]["reductions"] <= 2  # the gradients, and the examples' total weight


def test_split_parameters_are_gathered_for_each_pass_and_nothing_else_moves(found):
    moved = found["fsdp"]["collectives"]
    assert set(moved) <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert moved["all-gather"] <= 2.1 * found["one"]["parameter_bytes"]
    assert set(found["zero1"]["collectives"]) <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert found["zero1"]["collectives"]["all-gather"] <= 1.1 * found["one"]["parameter_bytes"]


def test_the_tensor_axis_splits_heads_and_mlp_by_the_rules(found):
    assert found["tensor"]["split_kernels"] == [
        "blocks_0/cross_out",
        "blocks_0/cross_query/q",
        "blocks_0/mlp_gate",
        "blocks_0/mlp_leave",
        "blocks_0/mlp_up",
        "blocks_0/out",
        "blocks_0/picture/kv",
        "blocks_0/query/q",
        "kvs_0/kv",
    ]
    assert set(found["tensor"]["collectives"]) == {"all-reduce"}


def test_kernels_for_attention_see_each_devices_examples_and_heads(found):
    for case, seen in found["attention"].items():
        assert seen["difference"] < 1e-5, case
        if case.startswith("data"):
            assert not seen["moved"], case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split"), [("unet", 56), ("pixart", 10), ("sd3", 26), ("flux", 21)]
)
def test_the_tensor_axis_splits_pretrained_denoisers(long, name, split):
    found = long["denoisers"][name]
    assert found["difference"] <= 1e-5
    assert found["split"] == split


@SLOW
def test_both_axes_together_split_the_state(found):
    assert found["tensor fsdp"]["held"] <= 1 / 8 + 0.02


@pytest.mark.parametrize("tier", ["quick", pytest.param("long", marks=SLOW)])
def test_pretrained_encoders_are_read_in_parts_and_compute_the_same(found, tier):
    for case, seen in found["encoders"].items():
        assert seen["equal"], case
        assert seen["held"] <= 0.3, case
        assert seen["difference"] <= 1e-6, case


@SLOW
def test_remat_saves_memory(found):
    assert found["remat"]["temporaries"] <= 0.3 * found["no remat"]["temporaries"]


@SLOW
def test_remat_works_on_split_parameters_which_are_gathered_again(found):
    """A checkpoint around the whole loss would replace the blocks' own policy."""
    plain, remat = found["fsdp no remat"], found["fsdp remat"]
    assert remat["temporaries"] <= 0.35 * plain["temporaries"]
    assert remat["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert plain["gathered"] <= 1.1 * plain["parameter_bytes"]
    assert 1.5 * plain["parameter_bytes"] <= remat["gathered"] <= 2.1 * plain["parameter_bytes"]


@SLOW
def test_adapters_train_on_split_nets_as_on_one_device(found):
    one, fsdp = found["lora"]["one"], found["lora"]["fsdp"]
    assert fsdp["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert fsdp["difference"] <= 1e-4
    assert fsdp["reduced"] <= 1.1 * one["frozen_bytes"]  # gradients of the merged kernels


@SLOW
@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_a_pretrained_pipeline_is_tuned_as_on_one_device(found, kind):
    """Changes of weights and loss of two steps; a state that was saved under one strategy is under
    another what it was, to the bit.
    """
    one = found["finetune"][f"{kind} one"]
    for strategy in ("data", "zero1", "fsdp") if kind == "whole" else ("fsdp",):
        seen = found["finetune"][f"{kind} {strategy}"]
        assert seen["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert seen["difference"] <= 1e-5
        assert seen["restored"]
    assert one["restored"]
    assert found["finetune"][f"{kind} fsdp"]["held"] <= 0.3


@SLOW
def test_a_net_split_over_eight_devices_draws_as_one_does(found):
    assert found["draw"]["spread"] > 50
    assert found["draw"]["difference"] <= 1


@SLOW
@pytest.mark.parametrize(("strategy", "share"), [("data", 1), ("fsdp", 1 / 8)])
def test_a_pretrained_pipeline_draws_on_eight_devices_as_on_one(found, strategy, share):
    ours = found["pipeline"][strategy]
    assert found["pipeline"]["spread"] > 0.5
    assert ours["difference"] <= 1e-5
    assert ours["few"] <= 1  # three pictures: padded to eight, and cut again
    assert ours["programs"] == 1
    assert share <= ours["held"] <= share * 1.1
    assert found["pipeline"]["low memory"] <= 1
    assert found["pipeline"]["watched"] <= 1  # other programs round otherwise
    # The steps gather what they read, each anew. All at once it would be 0.8 of all parameters.
    more = ours["temporaries"] - found["pipeline"]["data"]["temporaries"]
    assert more <= 0.6 * ours["bytes"]
    # Where images are decoded one after another, each device decodes its own.
    assert found["pipeline"]["sliced"] <= found["pipeline"]["at once"]


@SLOW
def test_a_scan_over_layers_computes_what_the_layers_do(found):
    assert found["scan"]["difference"] <= 1e-5


@SLOW
def test_bfloat16_computes_and_float32_remembers(found):
    assert found["bfloat16"]["types"] == ["float32", "int32"]
    assert found["bfloat16"]["loss"] == pytest.approx(found["one"]["loss"], rel=2e-2)


MESHES = (
    {"data": -1},
    {"data": 4, "tensor": -1},
    {"hosts": 2, "data": -1},
    {"hosts": -1, "data": 2, "tensor": 2},
)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 24, 28, 96, 1000, 1152, 3456, 4608]), max_size=4),
    devices=st.sampled_from([4, 8, 12, 16, 24, 40, 64, 128, 256, 512]),
    axes=st.sampled_from(MESHES),
    path=st.sampled_from(["nets/model/params/w", "nets/model/params/mlp_up/Dense_0/kernel"]),
)
def test_an_array_is_split_as_far_as_one_of_its_axes_allows_or_further(shape, devices, axes, path):
    layout = sharding.Layout(axes, "fsdp", devices=devices)
    spec, tensor = layout._spec(path, shape, True), layout.axes.get("tensor", 1)
    named = [name for names in spec if names for name in np.atleast_1d(names)]
    assert len(named) == len(set(named))
    held = math.prod(NamedSharding(layout.mesh, spec).shard_shape(tuple(shape)))
    rule = tensor if "mlp_up" in path and shape and shape[-1] % tensor == 0 else 1
    others = devices // tensor  # parts of these divide any axis but the tensor's
    free = [n for i, n in enumerate(shape) if rule == 1 or i < len(shape) - 1]
    assert held <= math.prod(shape) // rule // max([math.gcd(n, others) for n in free], default=1)
    if rule == 1 and any(n % devices == 0 for n in shape):
        assert held == math.prod(shape) // devices
        assert sum(names is not None for names in spec) == 1


def test_what_no_axis_divides_whole_is_split_over_two_or_in_part():
    layout = sharding.Layout({"data": -1}, "fsdp", devices=256)
    shard = lambda *shape: NamedSharding(
        layout.mesh, layout._spec("nets/model/params/w", shape, True)
    ).shard_shape(shape)
    assert shard(28, 1152, 4608) == (28, 1152, 18)  # the largest axis that divides
    assert shard(28, 1152, 1152) == (28, 9, 576)
    assert shard(1152) == (9,)
    assert shard(28, 1152) == (28, 9)  # layers of a stack are not parted for so little
    assert shard(7, 9) == (7, 9)
    assert shard() == ()


def test_each_chip_holds_its_part_of_the_largest_configs_state():
    config = dit.get_config("size=XL")
    family = objective.make(config)
    optimisers = {"model": optim.make(config.optim.model, steps=10, where="")}
    init = functools.partial(step.init, family, optimisers, {"model": 0.9})
    state = jax.eval_shape(init, jax.random.key(0), runs.abstract_batch(config))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total > 13 * 2**30
    for devices in (8, 16, 32, 64, 96, 128, 256):
        held, _ = sharding.Layout({"data": -1}, "fsdp", devices=devices).held(state)
        assert held <= (1 / devices + 0.001) * total
        held, _ = sharding.Layout({"data": -1}, "zero1", devices=devices).held(state)
        assert held <= (1 / 4 + 3 / 4 / devices + 0.001) * total


def test_what_does_not_divide_is_told_in_bytes(monkeypatch):
    told = []
    monkeypatch.setattr(sharding.logging, "warning", lambda text, *a: told.append(text % a))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    nets = lambda **arrays: {"model": {"params": arrays}}
    state = lambda **arrays: step.State(array(), nets(**arrays), {}, {}, array())
    layout = sharding.Layout({"data": -1}, "fsdp", devices=8)
    layout.report(state(even=array(800, 1000)))
    assert not told
    layout.report(state(even=array(800, 1000), odd=array(501, 1001), small=array(3)))
    assert len(told) == 1
    assert re.search(r"1\.8 MB of them .* 8 devices: nets/model/params/odd 1\.8 MB", told[0])
    layout = sharding.Layout({"data": -1}, "data", devices=8)
    layout.report(state(odd=array(501, 1001)))  # whole, as the strategy says
    assert len(told) == 1


def test_an_unknown_strategy_is_refused():
    with pytest.raises(errors.ConfigError, match="did you mean 'fsdp'"):
        sharding.Layout({"data": -1}, "fspd")


def test_a_batch_that_does_not_divide_is_refused_with_those_that_would():
    layout = sharding.Layout({"data": 1})
    layout.parts = 8  # as if eight devices were there
    with pytest.raises(errors.ConfigError, match=r"use one of \[16, 32\]"):
        layout.check_batch(20, 2)
    layout.check_batch(32, 2)


def test_all_noise_is_the_same_on_any_mesh(found):
    """Initial nets are the same to the bit (jax-ml/jax#40232)."""
    prints = {case: found[case]["fingerprint"] for case in ("one", "zero1", "fsdp")}
    assert len(set(map(str, prints.values()))) == 1
    assert np.isfinite(found["one"]["loss"])
