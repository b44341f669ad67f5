"""Checkpoints through one door: kinds, parts, variants, and what a network is used as."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors, weights
from t2i_jax.models.types import Cond, Features, Moments, Output
from t2i_jax.pretrained import hf, opener, text_encoder, writer
from tests import test_conditioning
from tests import test_text_families as texts
from tests import test_vits as pictures

CASE = "roberta"


@pytest.fixture
def encoder(tmp_path):
    """The folder of a small text encoder."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    texts.by_golden(CASE, folder)
    return folder


@pytest.fixture
def pipeline(tmp_path):
    """A folder as diffusers writes it: an index, and each network in a folder of its own."""
    folder = tmp_path / "pipeline"
    index = {"_class_name": "P", "_diffusers_version": "0.42.1", "safety_checker": [None, None]}
    for part, case, by in (("text_encoder", CASE, texts), ("image_encoder", "clip", pictures)):
        (folder / part).mkdir(parents=True)
        by.by_golden(case, folder / part)
        index[part] = ["transformers", case]
    (folder / hf.PIPELINE).write_text(json.dumps(index))
    return folder


def shapes_of(net, inputs):
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)


def loaded(source):
    """A text encoder's variables."""
    checkpoint = opener.open(str(source))
    return checkpoint.load(shapes_of(checkpoint.module(Cond), texts.batch()))


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_checkpoint_is_read_again_only_where_it_changed(encoder, monkeypatch):
    test_conditioning.small_tokenizer(encoder)
    read, old = [], hf.read_json
    monkeypatch.setattr(hf, "read_json", lambda path: read.append(path.name) or old(path))
    for _ in range(3):
        assert opener.open(str(encoder)).config["hidden_size"] == 24
    assert read == [hf.CONFIG]
    for _ in range(3):
        text_encoder.tokenizer(str(encoder), 8)
    assert read.count("tokenizer.json") == 1
    config = old(encoder / hf.CONFIG) | {"hidden_size": 48}
    (encoder / hf.CONFIG).write_text(json.dumps(config))
    assert opener.open(str(encoder)).config["hidden_size"] == 48
    assert text_encoder.tokenizer(str(encoder), 9).length == 9


# --- what a network is used as ---


def test_a_network_for_another_use_is_named(encoder, tmp_path):
    image = tmp_path / "image"
    image.mkdir()
    pictures.by_golden("dino", image)
    for folder, wanted, message in (
        (image, Cond, "a text encoder is wanted here, and this is an image network.*Fix.*bert"),
        (encoder, Features, "an image network is wanted here, and this is a text enc.*Fix.*dino"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            opener.open(str(folder)).module(wanted)
        with pytest.raises(errors.ConfigError, match=message):
            opener.open(str(folder)).module(wanted, dtype="bfloat16")


def test_every_family_says_what_its_networks_return():
    for kind, family in opener.families().items():
        assert set(opener.gives(family)) <= {Cond, Features, Moments, Output}, kind
    assert {"clip", "bert", "t5", "gpt2", "dinov2", "lpips_vgg"} <= opener.families().keys()


def test_each_tower_of_one_checkpoint_gets_its_own_tensors(tmp_path):
    pictures.by_golden("clip, both towers", tmp_path)
    checkpoint = opener.open(str(tmp_path))
    stored = safetensors.numpy.load_file(tmp_path / hf.WEIGHTS)
    for wanted, inputs, name in (
        (Cond, texts.batch(), "text"),
        (Features, [pictures.picture(14, 14)], "vision"),
    ):
        params = checkpoint.load(shapes_of(checkpoint.module(wanted), inputs))["params"]
        want = stored[f"{name}_model.encoder.layers.1.mlp.fc1.bias"]
        np.testing.assert_array_equal(params["layer_1"]["up"]["bias"], want)
    with pytest.raises(errors.ConfigError, match="vision_config is 3"):
        opener.Checkpoint(
            tmp_path, checkpoint.config | {"vision_config": 3}, checkpoint.family
        ).module()


def test_a_class_of_diffusers_is_a_kind(encoder, monkeypatch):
    """What a config.json without a model_type is chosen by."""
    config = hf.read_json(encoder / hf.CONFIG)
    del config["model_type"]
    (encoder / hf.CONFIG).write_text(json.dumps(config | {"_class_name": ["A"]}))
    with pytest.raises(errors.ConfigError, match=r"\['A'\]\" is no network"):
        opener.open(str(encoder))
    (encoder / hf.CONFIG).write_text(json.dumps(config | {"_class_name": "AutoencoderXY"}))
    with pytest.raises(errors.ConfigError, match=r"'AutoencoderXY' is no network.*bert.*dinov2"):
        opener.open(str(encoder))
    family = types.ModuleType("autoencoder_xy")
    monkeypatch.setitem(opener.families(), "AutoencoderXY", family)
    assert opener.open(str(encoder)).family is family


# --- parts ---


def test_a_part_of_a_pipeline_is_a_checkpoint(pipeline, encoder):
    same(loaded(f"{pipeline}#text_encoder"), loaded(encoder))
    assert opener.open(f"{pipeline}#image_encoder").module(Features).res == 14
    assert not weights.is_ours(f"{pipeline}#text_encoder")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", r"several networks, not one.*Fix: .*pipeline#text_encoder: text_encoder, image_enc"),
        ("#text_encodr", "did you mean 'text_encoder'"),
        ("#safety_checker", "no such folder.*choose one of"),
    ],
)
def test_a_pipeline_names_its_parts(pipeline, part, message):
    with pytest.raises(errors.DataError, match=message):
        opener.open(f"{pipeline}{part}")


@pytest.mark.parametrize("part", ["..", "../encoder", "a/b", "/etc", "."])
@pytest.mark.parametrize("source", ["hf:org/name", "folder"])
def test_a_part_is_one_folder_within(tmp_path, source, part):
    with pytest.raises(errors.ConfigError, match="names no part"):
        hf.locate(f"{tmp_path / source if source == 'folder' else source}#{part}")


def test_a_folder_may_have_a_number_sign_in_its_name(encoder):
    same(loaded(encoder.rename(encoder.parent / "my#1")), loaded(encoder.parent / "my#1"))


def test_a_run_is_known_by_its_config_alone(tmp_path):
    (tmp_path / hf.CONFIG).write_text(json.dumps({"objective": "flow"}))
    assert weights.is_ours(str(tmp_path))
    assert weights.is_ours(f"{tmp_path}#model")
    (tmp_path / hf.CONFIG).write_text("{")  # a run's, which is broken
    assert weights.is_ours(f"{tmp_path}#model")
    (tmp_path / hf.CONFIG).write_text(json.dumps({"model_type": "bert"}))
    assert not weights.is_ours(f"{tmp_path}#model")
    assert not weights.is_ours("hf:org/name#vae")


def test_the_tokenizer_of_a_pipelines_encoder_lies_beside_it(pipeline, encoder):
    captions = ["a red circle on the left", ""]
    test_conditioning.small_tokenizer(encoder)
    (pipeline / "tokenizer").mkdir()
    test_conditioning.small_tokenizer(pipeline / "tokenizer")
    want = text_encoder.tokenizer(str(encoder), 9)
    got = text_encoder.tokenizer(f"{pipeline}#text_encoder", 9)
    same(got(captions)[:2], want(captions)[:2])
    assert got.fingerprint == want.fingerprint


# --- files of weights ---


@pytest.mark.parametrize("stem", hf.STEMS)
@pytest.mark.parametrize("variant", ["", *hf.VARIANTS])
def test_weights_of_any_name_are_found(encoder, stem, variant):
    want = loaded(encoder)
    (encoder / hf.WEIGHTS).rename(encoder / f"{stem}{variant}.safetensors")
    same(loaded(encoder), want)


@pytest.mark.parametrize("index", ["{}.safetensors.index.json", "{}.safetensors.index.fp16.json"])
@pytest.mark.parametrize("stem", hf.STEMS)
def test_weights_in_shards_of_any_name_are_found(encoder, stem, index):
    want = loaded(encoder)
    in_shards(encoder, stem, index)
    same(loaded(encoder), want)


def in_shards(encoder, stem, index):
    """Takes the file of weights apart into two shards in half precision by their names."""
    stored, shards = safetensors.numpy.load_file(encoder / hf.WEIGHTS), {}
    for i in range(2):
        name = f"{stem}.fp16-0000{i + 1}-of-00002.safetensors"
        part = dict(sorted(stored.items())[i::2])
        (encoder / name).write_bytes(safetensors.numpy.save(part))
        shards |= dict.fromkeys(part, name)
    (encoder / index.format(stem)).write_text(json.dumps({"weight_map": shards}))
    (encoder / hf.WEIGHTS).unlink()


def test_what_transformers_saves_as_a_variant_in_shards_is_found(encoder):
    """Names as the library makes them, not as we read of them."""
    transformers = pytest.importorskip("transformers")
    want = loaded(encoder)
    model = transformers.AutoModel.from_pretrained(encoder, add_pooling_layer=False)
    for options in (dict(variant="fp16"), dict(variant="bf16", max_shard_size="9KB")):
        folder = encoder.parent / options["variant"]
        model.save_pretrained(folder, **options)
        assert not (folder / hf.WEIGHTS).exists()
        same(loaded(folder), want)


def test_full_precision_is_read_where_both_are_there(encoder):
    half = {
        k: v.astype(np.float16)
        for k, v in safetensors.numpy.load_file(encoder / hf.WEIGHTS).items()
    }
    want = loaded(encoder)
    (encoder / "model.fp16.safetensors").write_bytes(safetensors.numpy.save(half))
    same(loaded(encoder), want)
    (encoder / hf.WEIGHTS).unlink()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), loaded(encoder), want)


def test_pickles_of_diffusers_say_how_they_are_converted(encoder):
    (encoder / hf.WEIGHTS).rename(encoder / "diffusion_pytorch_model.bin")
    with pytest.raises(errors.DataError, match=r"can run code.*import diffusers.*AutoModel"):
        opener.open(str(encoder))


def test_what_equals_a_trained_tensor_is_written_with_it(encoder, tmp_path):
    """A file may hold T5's embedding under both of its names, and transformers reads the other."""
    texts.by_golden("t5 1.1", encoder)
    stored = safetensors.numpy.load_file(encoder / hf.WEIGHTS)
    names = "shared.weight", "encoder.embed_tokens.weight"
    table = stored.pop(names[0], stored.pop(names[1], None))
    safetensors.numpy.save_file(stored | dict.fromkeys(names, table), encoder / hf.WEIGHTS)
    params = jax.tree.map(lambda x: np.asarray(x) + 1, loaded(encoder)["params"])
    writer.component(str(encoder), params, tmp_path / "out", "float32")
    found = safetensors.numpy.load_file(tmp_path / "out" / hf.WEIGHTS)
    for name in names:
        np.testing.assert_array_equal(found[name], table + 1)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of folders: its filter of names is the library's own. What was fetched is listed."""
    library = pytest.importorskip("huggingface_hub")
    fetched = []

    def download(repo_id, *, revision, allow_patterns, ignore_patterns, **_):
        source, target = tmp_path / repo_id, tmp_path / "cache" / repo_id
        names = [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]
        kept = library.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in kept:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not (target / name).exists():
                fetched.append(name)
                shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr(library, "snapshot_download", download)
    clear = lambda: (hf._fetch.cache_clear(), hf._fetch_index.cache_clear())
    clear()
    yield fetched
    clear()


def test_of_a_pipeline_one_part_is_fetched(hub, pipeline):
    (pipeline / "text_encoder" / "model.fp16.safetensors").write_bytes(b"of no use")
    (pipeline / "text_encoder" / "pytorch_model.bin").write_bytes(b"of no use")
    (pipeline / "text_encoder" / "more").mkdir()
    (pipeline / "text_encoder" / "more" / "config.json").write_text("{}")
    (pipeline / "tokenizer").mkdir()
    (pipeline / "tokenizer" / "tokenizer.json").write_text("{}")
    opener.open("hf:pipeline@1#text_encoder").module(Cond)
    files = ["text_encoder/config.json", "text_encoder/model.safetensors"]
    assert sorted(hub) == [*files, "tokenizer/tokenizer.json"]
    with pytest.raises(errors.DataError, match=r"several networks.*#text_encoder"):
        opener.open("hf:pipeline@1")


def test_a_model_of_ours_is_opened_from_the_hub_as_one(hub, pipeline, tmp_path):
    shutil.copytree(weights.BUILTIN / "shapes", tmp_path / "ours")
    assert weights.is_ours("hf:ours@1")
    assert weights.is_ours("hf:ours@1#model")
    assert hub == ["config.json"]  # its weights are not needed to say so
    assert weights.config_at("hf:ours@1").objective == "flow"
    assert weights.nets_in(weights.locate("hf:ours@1")) == ["model"]
    assert weights._trained("hf:ours@1#model", "teacher")[1] == "model"
    for source in ("hf:pipeline@1", "hf:pipeline@1#text_encoder"):
        assert not weights.is_ours(source)
    assert weights.is_pipeline("hf:pipeline@1")


def test_a_variant_is_fetched_only_where_there_is_nothing_else(hub, encoder):
    (encoder / hf.WEIGHTS).rename(encoder / "model.fp16.safetensors")
    assert opener.open("hf:encoder@1").folder.name == "encoder"
    assert sorted(hub) == ["config.json", "model.fp16.safetensors"]


@pytest.mark.parametrize("index", ["{}.safetensors.index.json", "{}.safetensors.index.fp16.json"])
def test_all_shards_that_an_index_names_are_fetched(hub, encoder, index):
    want = loaded(encoder)
    in_shards(encoder, "model", index)
    same(loaded("hf:encoder@1"), want)
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(hub) == ["config.json", *shards, index.format("model")]


def test_a_part_is_asked_for_by_its_whole_name_alone(monkeypatch):
    """A stranger's config may not fetch another part of what the user named."""
    library, asked = pytest.importorskip("huggingface_hub"), []

    def download(repo_id, *, local_files_only, **_):
        asked.append(local_files_only)
        raise OSError("no network")

    monkeypatch.setattr(library, "snapshot_download", download)
    with hf.offline_except("hf:org/name@1#vae"):
        for name in ("hf:org/name@1#vae", "hf:org/name@1#unet", "hf:org/name@1"):
            with pytest.raises(errors.DataError):
                hf.locate(name)
    assert asked == [False, True, True]
    hf._fetch_index.cache_clear()
    assert not weights.is_ours("hf:org/name@1#vae")


def test_as_many_encoders_as_the_net_has():
    with pytest.raises(errors.ConfigError, match="2 sources of a net with 1 parts"):
        opener.load(("a", "b"), {"params": {"encoders_0": {}}})
