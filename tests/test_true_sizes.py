"""Pipelines of true size, without their weights: their sizes, and that configs alone will do."""

import contextlib
import json
import math
import shutil

import jax
import numpy as np
import pytest

from benchmarks import true_sizes
from configs import finetune, finetune_lora
from t2i_jax import errors, loop, pipeline
from t2i_jax.commands import plan
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf

# Parameters as published, or as diffusers counts them.
PARAMETERS = {
    ("sd15", "text_encoder"): 123_060_480,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "unet"): 859_520_964,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("sdxl", "unet"): 2_567_463_684,
}
ALL = [pytest.param(x, marks=[pytest.mark.slow] * (x != "sd15")) for x in true_sizes.PIPELINES]


@pytest.fixture(scope="module", params=ALL)
def found(request, tmp_path_factory):
    """The name of a pipeline, and part -> its tensors' shapes."""
    folder = true_sizes.write(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, true_sizes.networks(folder)


def test_parameters_are_as_many_as_published(found):
    name, _, networks = found
    for (of, part), count in PARAMETERS.items():
        if of == name:
            assert sum(map(math.prod, networks[part].values())) == count


def test_tensors_are_those_of_diffusers_and_transformers(found):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    import transformers

    _, folder, networks = found
    for part, ours in networks.items():
        config = json.loads((folder / part / "config.json").read_text())
        with torch.device("meta"):
            if "architectures" in config:
                kind = getattr(transformers, config["architectures"][0])
                theirs = kind(kind.config_class.from_dict(config))
            else:
                theirs = getattr(diffusers, config["_class_name"]).from_config(config)
        plain = {
            k.removeprefix("text_model."): tuple(v.shape) for k, v in theirs.named_parameters()
        }
        if "shared.weight" in plain:  # T5 has one table under two names
            plain["encoder.embed_tokens.weight"] = plain.pop("shared.weight")
        if part == "transformer" and "pos_embed.pos_embed" in ours:
            plain["pos_embed.pos_embed"] = tuple(theirs.pos_embed.pos_embed.shape)  # a buffer
        assert ours == plain, part


def tiny(tmp_path, **said):
    """The tiny pipeline without weights; `said`: more of every network's config.json."""
    ignored = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(folders.TINY, tmp_path / "pipeline", ignore=ignored)
    for path in folder.glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return folder


def frozen(config, tmp_path, alone):
    with hf.configs_alone() if alone else contextlib.nullcontext():
        return loop.Run(config, tmp_path / "run").frozen


@pytest.mark.parametrize("make", [finetune, finetune_lora])
def test_a_dry_run_takes_the_shapes_of_configs_alone(tmp_path, make):
    """The same arrays in the same types as from the files."""
    shapes = [
        frozen(config_of(make, source), tmp_path, alone)
        for source, alone in ((folders.TINY, False), (tiny(tmp_path), True))
    ]
    assert shapes[0] == shapes[1]


def config_of(make, source):
    """With pictures of shapes, as no folder is given."""
    config = make.get_config(f"source={source}")
    config.data = dict(source="shapes", size=1)
    return config


def test_a_config_json_says_the_type_of_the_weights_that_are_not_there(tmp_path):
    shapes = frozen(config_of(finetune_lora, tiny(tmp_path, dtype="bfloat16")), tmp_path, True)
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"bfloat16"}


def test_what_needs_weights_misses_them(tmp_path):
    with pytest.raises(errors.DataError, match=r"no model.safetensors"):
        loop.Run(config_of(finetune_lora, tiny(tmp_path)), tmp_path / "run")


@pytest.mark.slow
def test_a_dry_run_needs_neither_weights_nor_pictures(tmp_path, capsys):
    values = plan.show(finetune_lora.get_config(f"source={tiny(tmp_path)}"), tmp_path / "run")
    assert values["frozen/model"] == sum(
        math.prod(shape) for shape in true_sizes.networks(folders.TINY)["unet"].values()
    )
    assert values["peak_bytes"] > values["argument_bytes"] > values["state_bytes"] > 0
    assert "frozen/model" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_hub_is_asked_for_texts_alone(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(tiny(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with hf.configs_alone():
        assert hf.locate("hf:someone/model@1#unet").name == "unet"
    assert asked
    assert all(pattern.endswith((".json", ".txt", ".model")) for pattern in asked)


def test_random_weights_are_those_of_the_header_and_open(tmp_path):
    """The tiny pipeline, filled anew: what is written for the true one at its size."""
    folder = tiny(tmp_path)
    true_sizes.fill(folder)
    pipe = pipeline.Pipeline.load(str(folder))
    (picture,) = pipe(["a red circle"], steps=1)
    assert np.ptp(picture) > 0
    kinds = {x.dtype.name for x in jax.tree.leaves(pipe.nets)}
    assert kinds == {true_sizes.STORED}
