"""Files of adapters: what other programs may write in them, and what is refused."""

import json
import math

import jax
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors, objective, pipeline, weights
from t2i_jax.pretrained import folder, lora_files, opener, tensors, writer


@pytest.fixture(scope="module")
def plans():
    """The tensors of the tiny pipeline's text encoder."""
    config = weights.config_at(str(folder.TINY))
    shapes = weights.abstract_nets(objective.make(config), config)
    opened = folder.open(str(folder.TINY))
    return {"text_encoder": opener.open(opened.part("text_encoder")).plan(shapes["text"])}


@pytest.fixture(scope="module")
def module(plans):
    """A module of the text encoder and its width in and out."""
    for source in plans["text_encoder"].values():
        for tensor in source.tensors:
            if tensor.name.endswith("layers.0.self_attn.q_proj.weight"):
                return tensor.name.removesuffix(".weight"), tensor.shape[::-1]


def written(path, module, shape, *, notes=None, kohya=False, **changes):
    """A file with one adapter of rank 4."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, shape[0])), rng.normal(size=(shape[1], 4))
    name = f"text_encoder.{module}.lora_{{}}.weight"
    found = {name.format("A"): a.astype(np.float32), name.format("B"): b.astype(np.float32)}
    if kohya:
        name = f"lora_te_{module.replace('.', '_')}"
        kinds = ("lora_down.weight", "lora_up.weight")
        found = {f"{name}.{k}": x for k, x in zip(kinds, found.values(), strict=True)}
    found |= {
        (f"lora_te_{module.replace('.', '_')}.alpha" if k == "alpha" else name.format(k)): v
        for k, v in changes.items()
    }
    note = {lora_files.METADATA: json.dumps(notes)} if notes else None
    safetensors.numpy.save_file(found, path, note)
    return path, b @ a


def product(path, plans):
    """What is added to queries, keys and values, of the file's one adapter."""
    (pair,) = lora_files._pairs(lora_files.read(path, plans)["text_encoder"]).values()
    return (pair.a @ pair.b).T


@pytest.mark.parametrize(
    ("notes", "scale"),
    [
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 8}, 2.0),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}, 4.0),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": None}, 1.0),
    ],
)
def test_the_scale_is_what_the_notes_say(plans, module, tmp_path, notes, scale):
    """alpha/r, or alpha/√r of rank-stabilised LoRA, as PEFT has it."""
    path, change = written(tmp_path / "a.safetensors", *module, notes=notes)
    np.testing.assert_allclose(
        product(path, plans)[: len(change)], scale * change, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_both_names_of_clips_modules_fit(plans, module, tmp_path, kohya, prefix):
    """transformers 5 has dropped the prefix that published files have."""
    name, shape = module
    name = prefix + name.removeprefix("text_model.")
    path, change = written(tmp_path / "a.safetensors", name, shape, kohya=kohya)
    np.testing.assert_allclose(product(path, plans)[: len(change)], change, rtol=1e-5, atol=1e-5)


def test_kohyas_alpha_may_be_a_whole_number(plans, module, tmp_path):
    path, change = written(
        tmp_path / "a.safetensors", *module, kohya=True, alpha=np.array(2, np.int64)
    )
    np.testing.assert_allclose(
        product(path, plans)[: len(change)], change / 2, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"B": np.zeros((8, 3), np.float32)},
        {"A": np.full((4, 8), np.nan, np.float32)},
        {"A": np.zeros((0, 8), np.float32), "B": np.zeros((8, 0), np.float32)},
        {"A": np.zeros(4, np.float32)},
        {"A": np.zeros((4, 8, 1), np.float32)},
        {"kohya": True, "alpha": np.zeros(0, np.float32)},
        {"kohya": True, "alpha": np.array(np.nan, np.float32)},
        {"notes": {"text_encoder.r": "4"}},
        {"notes": {"text_encoder.r": -4}},
        {"notes": {"text_encoder.lora_alpha": "eight"}},
        {"notes": {"text_encoder.lora_alpha": math.nan}},
        {"notes": {"text_encoder.lora_alpha": 10**400}},
    ],
)
def test_matrices_that_are_no_adapter_are_refused(plans, module, tmp_path, change):
    path, _ = written(tmp_path / "a.safetensors", *module, **change)
    with pytest.raises(errors.DataError, match=r"q_proj has matrices of.*a\.safetensors"):
        lora_files.read(path, plans)


def test_half_precision_without_room_writes_nothing(plans, module, tmp_path):
    path, _ = written(
        tmp_path / "a.safetensors", *module, B=np.full((module[1][1], 4), 1e5, np.float32)
    )
    adapters = lora_files.read(path, plans)
    without_room = pytest.raises(errors.ConfigError, match="float16 has no room for values of")
    with without_room:
        lora_files.write(tmp_path / "out", adapters, plans, "float16")
    params = {"conv_in": {"bias": np.full(8, 1e5, np.float32)}}
    opened = folder.open(str(folder.TINY))
    with without_room:
        writer.pipeline(opened, tmp_path / "out", {"unet": params}, "float16", {})
    assert not (tmp_path / "out").exists()
    lora_files.write(tmp_path / "out", adapters, plans, "float32")
    assert lora_files.read(tmp_path / "out" / lora_files.WEIGHTS, plans)


def test_a_pipeline_knows_the_files_it_was_loaded_with(plans, module, tmp_path):
    path, _ = written(tmp_path / "a.safetensors", *module)
    (tmp_path / "other").mkdir()
    other, _ = written(tmp_path / "other" / "a.safetensors", *module)  # of the same name
    pipe = pipeline.Pipeline.load(str(folder.TINY), lora={str(path): 0.5, str(other): 2})
    found = [(one["name"], one["weight"], len(one["sha256"])) for one in pipe.adapters]
    assert found == [("a.safetensors", 0.5, 64), ("a.safetensors", 2.0, 64)]
    assert not pipeline.Pipeline.load(str(folder.TINY)).adapters
    assert jax.tree.leaves(pipe.nets)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q"])
def test_a_pickle_is_called_one(start, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(start.ljust(64, b"0"))
    with pytest.raises(errors.DataError, match="a zip or a pickle"):
        tensors.header(tmp_path / "a.ckpt")
