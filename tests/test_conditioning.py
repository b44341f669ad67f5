"""Conditions from one encoder or several, cut short, dropped, or learning with the generator."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from configs import shapes_finetune, shapes_transformer
from t2i_jax import errors, loop, objective, pipeline, weights
from t2i_jax.models.types import Cond, Tokens
from t2i_jax.pretrained import opener, text_encoder
from t2i_jax.text import condition, tokenize
from tests import runs, test_text_families
from tests.test_pipeline import start

WORDS = ["<pad>", "<end>", "a", "red", "blue", "circle", "square", "on", "the", "left"]


def small_tokenizer(folder):
    """Of WORDS."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}'
    )


def small_encoders(root):
    """Folders of a CLIP with nine positions and a T5, each with a small tokenizer of words."""
    folders = []
    for case in ("clip, projected", "t5 1.1"):
        folder = root / case
        folder.mkdir()
        test_text_families.by_golden(case, folder)
        small_tokenizer(folder)
        folders.append(str(folder))
    return tuple(folders)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return small_encoders(tmp_path_factory.mktemp("encoders"))


def encoded(source, captions, length=16, **options):
    net = text_encoder.make(source, **options)
    tokens, cut = tokenize.read(text_encoder.tokenizer(source, length), captions)
    tokens = tokens if isinstance(tokens, Tokens) else (tokens,)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *tokens)
    return net, jax.jit(net.apply)(opener.load(source, shapes), *tokens), cut


def test_several_encoders_are_each_of_them_side_by_side(pair):
    captions = ["a red circle", "", "the blue square on the left " * 3, "a red circle " * 4]
    net, both, cut = encoded(pair, captions)
    _, clip, clip_cut = encoded(pair[0], captions, length=9)
    _, t5, t5_cut = encoded(pair[1], captions)
    assert net.names == ("clip", "t5")
    assert net.pooled == (10, 24)
    np.testing.assert_allclose(both.seq_BLD[:, :9], clip.seq_BLD, atol=1e-6)
    np.testing.assert_allclose(both.seq_BLD[:, 9:], t5.seq_BLD, atol=1e-6)
    np.testing.assert_array_equal(both.mask_BL, np.concatenate([clip.mask_BL, t5.mask_BL], 1))
    pooled = np.concatenate([clip.pooled_BD, t5.pooled_BD], 1)
    np.testing.assert_allclose(both.pooled_BD, pooled, atol=1e-6)
    assert not both.mask_BL[1].any()
    assert not both.pooled_BD[1].any()
    assert t5_cut == [None, None, "on the left", None]
    assert cut == clip_cut  # which lost more
    assert cut[:2] == [None, None]
    assert all(cut[2:])


def test_a_string_names_several_by_commas_unless_it_is_a_folder(tmp_path):
    assert opener.parse("a/clip, b/t5") == ("a/clip", "b/t5")
    assert opener.parse("") is opener.parse(None) is None
    assert opener.parse(["a", "b"]) == ("a", "b")
    (tmp_path / "clip, projected").mkdir()
    assert opener.parse(str(tmp_path / "clip, projected")) == str(tmp_path / "clip, projected")


def test_a_comma_in_a_path_that_is_not_there_is_told(tmp_path):
    for source in (f"{tmp_path}/nowhere,{tmp_path}/b", [f"{tmp_path}/my", "pictures"]):
        with pytest.raises(errors.DataError, match="commas separate several encoders"):
            text_encoder.make(source)
    with pytest.raises(errors.DataError, match=r"looked for config.*in it .at"):
        text_encoder.make(f"{tmp_path}/nowhere")


def test_a_run_that_is_not_there_is_no_image_network():
    for source in ("runs/nothere", ["runs/nothere", "minilm"]):
        with pytest.raises(errors.ConfigError, match=r"no such folder.* .at config.load.gen=runs"):
            weights._check_there("gen", source)
    for source in ("hf:org/name", "minilm", "inception", "tests"):
        weights._check_there("gen", source)


def test_a_field_not_implemented_names_its_folder(pair, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(pair[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "odd"}))
    with pytest.raises(errors.ConfigError, match=f"{folder}/config.json"):
        text_encoder.make(str(folder))


def test_a_roberta_beside_others_reads_no_more_than_its_positions(pair, tmp_path):
    test_text_families.by_golden("roberta", tmp_path)  # eleven places, of which captions have nine
    small_tokenizer(tmp_path)
    made = text_encoder.tokenizer((str(tmp_path), pair[1]), 32)
    assert {name: one.length for name, one in made.items()} == {"bert": 9, "t5": 32}


def test_encoders_that_are_alike_are_numbered(pair):
    made = text_encoder.tokenizer((pair[0], pair[1], pair[0], pair[0]), 9)
    assert list(made) == ["clip", "t5", "clip_2", "clip_3"]
    assert text_encoder.make((pair[1], pair[1])).names == ("t5", "t5_2")


def test_narrower_states_are_filled_up_with_zeros(tmp_path):
    text_BL, mask_BL = test_text_families.batch()
    sources = []
    for case in ("t5 1.1", "gpt-2"):
        folder = tmp_path / case
        folder.mkdir()
        test_text_families.by_golden(case, folder)
        sources.append(text_encoder.make(str(folder)))
    wide = text_encoder.Joined((sources[0].clone(width=32), sources[1]), ("a", "b"))
    tokens = dict.fromkeys(("a", "b"), Tokens(text_BL, mask_BL))
    cond, _ = wide.init_with_output(jax.random.key(0), tokens)
    assert cond.seq_BLD.shape == (3, 18, 32)
    assert np.abs(cond.seq_BLD[0, 9:, :24]).min() > 0
    assert not cond.seq_BLD[:, 9:, 24:].any()


def test_clip_reads_the_penultimate_layer_on_request(pair):
    captions = ["a red circle on the left"]
    net, last, _ = encoded(pair[0], captions, length=9)
    _, cond, _ = encoded(pair[0], captions, length=9, clip=dict(skip=1))
    (text_BL, mask_BL), _ = text_encoder.tokenizer(pair[0], 9)(captions)
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    variables = opener.load(pair[0], shapes)
    states = net.apply(variables, text_BL, mask_BL, method="states")
    np.testing.assert_allclose(cond.seq_BLD[mask_BL], states[-3][mask_BL], atol=1e-6)
    np.testing.assert_allclose(cond.pooled_BD, last.pooled_BD, atol=1e-6)
    for options, message in (
        (dict(clip=dict(skip=2)), "skip is 2"),
        (dict(clip=dict(layer=2)), "unknown option 'layer'"),
        (dict(klip=dict()), "did you mean 'clip'"),
        (dict(t5=dict()), "no encoder of the family 't5'"),
        (dict(clip=3), "give a dictionary"),
        (dict(dtype="bf16"), "did you mean 'bfloat16'"),
        (dict(clip=dict(skip=0.5)), "skip is 0.5"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            text_encoder.make(pair[0], **options)


def test_a_run_that_began_with_no_checkpoint_is_no_source_of_an_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"objective": "flow", "load": {}}')
    with pytest.raises(errors.ConfigError, match="began with None"):
        text_encoder.make(str(tmp_path))


def test_each_encoder_is_dropped_on_its_own():
    rng = np.random.default_rng(0)
    cond = Cond(rng.normal(size=(4, 5, 3)), np.ones((4, 5), bool), np.ones((4, 7)))
    drop_BE = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], bool)
    got = condition.drop(cond, drop_BE, ((2, 3), (3, 4)))
    np.testing.assert_array_equal(got.mask_BL, ~np.repeat(drop_BE, [2, 3], 1))
    np.testing.assert_array_equal(got.pooled_BD, ~np.repeat(drop_BE, [3, 4], 1))
    whole = condition.drop(cond, drop_BE[:, 0], ((2, 3), (3, 4)))
    np.testing.assert_array_equal(whole.mask_BL, ~np.repeat(drop_BE[:, :1], 5, 1))


@pytest.mark.slow
def test_a_run_with_several_encoders_trains_and_draws(pair, tmp_path):
    config = shapes_transformer.get_config("debug")
    config.steps = 1
    config.load, config.loss = dict(text=pair), dict(prediction="v", text_dropout=(0.5, 0.2))
    config.text = dict(dtype="bfloat16", clip=dict(skip=1))
    loop.train(config, tmp_path)
    pipe = pipeline.Pipeline.load(str(tmp_path))
    shapes = jax.tree.map(np.shape, weights.abstract_batch(pipe.predictor.objective, 8)["text"])
    assert shapes == {"clip": Tokens((8, 9), (8, 9)), "t5": Tokens((8, 16), (8, 16))}
    assert pipe(["a red circle"], steps=1).shape == (1, 16, 16, 3)
    for shares, message in (((0.5, 0.2, 0.1), "3 shares for 2"), (1.5, "from 0 to 1")):
        config.loss = dict(text_dropout=shares)
        with pytest.raises(errors.ConfigError, match=message):
            objective.make(config)


def test_a_share_for_each_of_one_encoder_is_one_too_many():
    config = runs.config()
    config.loss = dict(text_dropout=(0.1, 0.1))
    with pytest.raises(errors.ConfigError, match="2 shares for 1 encoders"):
        objective.make(config)


@pytest.mark.slow
def test_an_encoder_learns_from_its_pretrained_weights_at_its_own_rate(pair, tmp_path):
    config = shapes_finetune.get_config("debug")
    config.model = shapes_transformer.get_config("debug").model  # compiles faster
    config.load, config.steps, config.ema = dict(text=pair[1]), 3, dict(model=0.5, text=0.5)
    config.optim.text = dict(name="adam", learning_rate=1e-3)  # the first step's gradient is zero
    loop.train(config, tmp_path)
    pipe = pipeline.Pipeline.load(str(tmp_path))
    shapes = weights.abstract_nets(pipe.predictor.objective, config)
    before = opener.load(pair[1], shapes["text"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, pipe.nets["text"])
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # from there, and not far
    row = runs.rows(tmp_path)[-1]
    assert row["text/learning_rate"] == pytest.approx(1e-3)
    assert row["text/grad_norm"] > 0
    learned = shapes_transformer.get_config("debug")
    learned.steps = 1
    learned.load = dict(text=str(tmp_path))  # one net of a run with two, and its tokenizer
    loop.train(learned, tmp_path / "next")
    again = pipeline.Pipeline.load(str(tmp_path / "next")).nets["text"]
    jax.tree.map(np.testing.assert_array_equal, again, pipe.nets["text"])
    config.cache = "encode"
    with pytest.raises(errors.ConfigError, match="cached caption states cannot change"):
        objective.make(config)


@pytest.mark.slow
def test_a_debug_config_takes_an_encoder_by_a_flag_and_its_run_knows_its_files(pair, tmp_path):
    """The files of a frozen encoder may move, but not change, for whoever draws."""
    own = tmp_path / "clip"
    shutil.copytree(pair[0], own)
    config = runs.config(steps=1, prompts=(), save_every=1)
    config.load.text, config.text_length = str(own), 9
    loop.train(config, tmp_path / "run")
    draw = lambda source, **options: pipeline.Pipeline.load(str(source), **options)(
        ["a red circle"], steps=1
    )
    before = draw(tmp_path / "run")
    exported = tmp_path / "model"
    start("-m", "t2i_jax", "export", f"--workdir={tmp_path / 'run'}", f"--output={exported}")
    assert str(own) in (exported / "README.md").read_text()
    own.rename(tmp_path / "moved")
    for source in (tmp_path / "run", exported):
        with pytest.raises(errors.DataError, match="say where it lies now"):
            draw(source)
        with pytest.raises(errors.ConfigError, match="loads no net 'txt'"):
            draw(source, load={"txt": "x"})
        after = draw(source, load={"text": str(tmp_path / "moved")})
        assert np.abs(before.astype(int) - after).max() <= 2  # exports are float16
    weights_file = tmp_path / "moved" / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights_file)
    name = next(n for n in tensors if n.endswith("fc1.weight"))
    safetensors.numpy.save_file(tensors | {name: tensors[name] + 0.5}, weights_file)
    for source in (tmp_path / "run", exported):
        with pytest.raises(errors.ConfigError, match="not those the run was trained with"):
            draw(source, load={"text": str(tmp_path / "moved")})
    (tmp_path / "moved").rename(own)
    other = runs.config()
    other.load.text, other.text_length = str(tmp_path / "run"), 9
    family = objective.make(other)
    with pytest.raises(errors.ConfigError, match="did not train its net 'text'"):
        weights.frozen(family, other)
