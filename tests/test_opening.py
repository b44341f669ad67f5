"""Models and checkpoints as they are opened: what is imported, bounded and looked up."""

import inspect
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors, pipeline, weights
from t2i_jax.models.types import Features
from t2i_jax.pretrained import hf, opener, text_encoder
from tests import test_text_families as texts
from tests import test_vits as pictures

ROOT = pathlib.Path(__file__).parent.parent


def test_training_and_drawing_import_neither_torch_nor_transformers():
    """Both take seconds to import, whether or not they are of use."""
    code = """
import sys
from t2i_jax import loop, pipeline
pipeline.Pipeline.load("builtin:shapes")(["a red circle"], steps=1)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["[]"]


def changed(folder, **changes):
    """A copy of a built-in model whose config says something else."""
    shutil.copytree(weights.BUILTIN / "shapes", folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        dict(res=10**6),
        dict(text_length=10**9),
        dict(model=dict(depth=513)),  # one beyond the limit, which can still be built
        dict(model=dict(width=10**9)),
        dict(model=dict(gen=dict(width=float("inf")))),
        dict(model=dict(backbone="transformer", width=2**16, patch=1), res=4096),
    ],
)
def test_a_config_of_a_huge_network_is_refused_at_once(tmp_path, change):
    folder = changed(tmp_path, **change)
    start = time.perf_counter()
    with pytest.raises(errors.ConfigError, match="Fix: "):
        pipeline.Pipeline.load(str(folder))
    assert time.perf_counter() - start < 20  # under 1 on a quiet core


def test_weights_of_whole_numbers_are_none(tmp_path):
    folder = changed(tmp_path)
    path = folder / weights.EXPORTED
    tensors = safetensors.numpy.load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = (100 * tensors[name]).astype(np.int16)
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(errors.DataError, match=f"1 tensors do not fit: {name}.* found I16"):
        pipeline.Pipeline.load(str(folder))


def test_the_hub_is_asked_for_what_the_user_names_alone(tmp_path, monkeypatch):
    """A stranger's config may name what was fetched before, and nothing else."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def download(repo_id, *, local_files_only, **_):
        asked.append((repo_id, local_files_only))
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", download)
    folder = changed(tmp_path, load={"text": "hf:evil/tracker"})
    with pytest.raises(errors.DataError, match=r"not fetched before.*--load=NET=hf:evil/tracker"):
        pipeline.Pipeline.load(str(folder))
    load = {"text": "hf:my/encoder@1"}
    with pytest.raises(errors.DataError, match="cannot be fetched"):
        pipeline.Pipeline.load(str(folder), load=load)
    assert asked == [("evil/tracker", True), ("my/encoder", False)]
    with pytest.raises(errors.DataError, match="not fetched before"):  # as text encoder of a run
        text_encoder.make(str(folder))
    with pytest.raises(errors.DataError, match="cannot be fetched"):  # by the user's own config
        text_encoder.make("hf:evil/tracker")


HOSTILE = [
    *(("gpt-2", {"n_embd": size}) for size in (10**9, [3], "24", 0, -1, 1.5, True)),
    *(("roberta", {name: 10**9}) for name in ("hidden_size", "num_hidden_layers", "vocab_size")),
    *(("roberta", {"layer_norm_eps": value}) for value in (float("nan"), float("inf"), 0.0)),
    ("roberta", {"num_hidden_layers": 5000}),
    ("roberta", {"pad_token_id": 10**12}),
    *(("t5 1.0", {"relative_attention_num_buckets": n}) for n in (1, 2, 10**9)),
    ("t5 1.0", {"relative_attention_max_distance": 8}),
    ("clip, quick", {"max_position_embeddings": 10**12}),
]


@pytest.mark.parametrize(("case", "change"), HOSTILE)
def test_a_text_encoder_of_no_sensible_size_is_refused_at_once(tmp_path, case, change):
    texts.by_golden(case, tmp_path)
    path = tmp_path / hf.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    start = time.perf_counter()
    with pytest.raises(errors.ConfigError, match="it should be"):
        text_encoder.make(str(tmp_path))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("dino", {"image_size": 10**6}),
        ("dino", {"hidden_size": 10**9}),
        ("dino", {"num_hidden_layers": 5000}),
        ("dino, registers", {"num_register_tokens": 10**9}),
        ("clip", {"image_size": 10**6}),
    ],
)
def test_an_image_network_of_no_sensible_size_is_refused_at_once(tmp_path, case, change):
    pictures.by_golden(case, tmp_path)
    path = tmp_path / hf.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    start = time.perf_counter()
    with pytest.raises(errors.ConfigError, match="it should be"):
        opener.open(str(tmp_path)).module(Features)
    assert time.perf_counter() - start < 5


def test_a_preprocessors_huge_crop_is_refused(tmp_path):
    pictures.by_golden("dino", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 4 * 10**6}))
    with pytest.raises(errors.ConfigError, match="res is 4000000"):
        opener.open(str(tmp_path)).module(Features)


def modules():
    """Every model_type that we read, and what makes its module."""
    for model_type, family in opener.families().items():
        if family.__name__.rpartition(".")[2] not in ("inception", "efficientnet", "lpips"):
            yield pytest.param(model_type, family, id=model_type)


@pytest.mark.parametrize(("model_type", "family"), list(modules()))
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type, family):
    short = {"model_type": model_type}
    if model_type[0].isupper():  # a class of diffusers
        diffusers = pytest.importorskip("diffusers")
        arguments = inspect.signature(getattr(diffusers, model_type).__init__).parameters
        whole = {n: a.default for n, a in arguments.items() if n != "self"} | short
    else:
        transformers = pytest.importorskip("transformers")
        kind = transformers.AutoConfig.for_model(model_type)
        whole = json.loads(kind.to_json_string(use_diff=False)) | short
    if "text_config" in whole:
        short |= {"text_config": {}, "vision_config": {}}
    made = lambda config: opener.Checkpoint(pathlib.Path(), config, family).module
    for gives in opener.Checkpoint(pathlib.Path(), short, family).towers():
        assert made(short)(gives) == made(whole)(gives)
