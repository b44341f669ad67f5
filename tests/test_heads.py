"""Every class that transformers has of our families, saved by it: our loader reads the trunk.

Needs torch and transformers, the oracles.
"""

import functools
import importlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors
from t2i_jax.models.types import Cond, Features
from t2i_jax.pretrained import clip, dino, gpt2, hf, opener
from tests import test_text_families as texts
from tests import test_vits as pictures

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ODD = pictures.DINO | dict(image_size=14)  # 3 patches and 2 pixels more
OPTIONS = {
    "bert": texts.BERT,
    "distilbert": texts.DISTIL | dict(max_position_embeddings=texts.LENGTH),
    **dict.fromkeys(("roberta", "xlm_roberta", "camembert"), texts.ROBERTA),
    "gpt2": texts.GPT2 | dict(pad_token_id=0),
    **dict.fromkeys(("t5", "mt5", "umt5"), texts.T5),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), ODD),
}


def classes(family):
    """Names of what can be saved with a trunk of this family."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return [
        name
        for name in sorted(module.__all__)
        if getattr(getattr(module, name), "config_class", None) and "PreTrained" not in name
    ]


def saved(name, options, folder):
    """A model of transformers with random weights, biases and norms, too, as it saves itself."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@functools.partial(jax.jit, static_argnums=0)
def compute(net, variables, *inputs):
    return net.apply(variables, *inputs, method="states")[-1]


def ours(wanted, folder, *inputs):
    """The last states as we compute them."""
    net = opener.open(str(folder)).module(wanted)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    return compute(net, opener.load(str(folder), shapes), *inputs)


def check_text(folder):
    """The encoder that transformers itself finds in the folder gives our states."""
    text_BL, mask_BL = texts.batch()
    text_BL = np.where(mask_BL, text_BL, 1)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    if "T5" in type(model).__name__:
        model = model.encoder
    tokens = torch.tensor(text_BL).long(), torch.tensor(mask_BL).long()
    with torch.inference_mode():
        want = model(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state.numpy()
    got = ours(Cond, folder, text_BL, mask_BL)
    np.testing.assert_allclose(got[mask_BL], want[mask_BL], atol=1e-5 * np.abs(want).max(), rtol=0)


def check_picture(folder, kind, side, mean, std, **options):
    image_BHWC = pictures.picture(side, side)
    pixels = torch.tensor((((image_BHWC + 1) / 2 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        model = kind.from_pretrained(folder).eval()
        want = model(pixels, **options).last_hidden_state.numpy()
    got = ours(Features, folder, image_BHWC)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


TEXTS = [(f, name) for f in OPTIONS if "dino" not in f for name in classes(f)]
PICTURES = [(f, name) for f in OPTIONS if "dino" in f for name in classes(f)]


@pytest.mark.parametrize(("family", "name"), TEXTS)
def test_text_encoders_are_read_from_under_any_head(tmp_path, family, name):
    saved(name, OPTIONS[family], tmp_path)
    check_text(tmp_path)


@pytest.mark.parametrize(("family", "name"), PICTURES)
def test_image_networks_are_read_from_under_any_head(tmp_path, family, name):
    saved(name, OPTIONS[family], tmp_path)
    check_picture(tmp_path, transformers.AutoModel, ODD["image_size"], dino.MEAN, dino.STD)


def test_clips_image_tower_is_read_from_under_a_classifier(tmp_path):
    kinds = dict(text_config=texts.CLIP, vision_config=pictures.CLIP, projection_dim=10)
    saved("CLIPForImageClassification", kinds, tmp_path)
    side = pictures.CLIP["image_size"]
    check_picture(tmp_path, transformers.CLIPVisionModel, side, clip.MEAN, clip.STD)
    with pytest.raises(errors.DataError, match="tensors do not fit"):  # no text tower is there
        ours(Cond, tmp_path, *texts.batch())


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("name", ["EncoderModel", "ForTokenClassification"])
@pytest.mark.parametrize("alike", [True, False])
def test_t5_reads_the_embeddings_that_its_encoder_reads(tmp_path, family, name, alike):
    name = family.upper() + name
    saved(name, OPTIONS[family], tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / hf.WEIGHTS)
    (shared,) = (key for key in tensors if key.endswith("shared.weight"))
    own = shared.replace("shared", "encoder.embed_tokens")
    tensors[own] = tensors[shared] if alike else tensors[shared] * 2
    write(tmp_path, tensors)
    check_text(tmp_path)
    del tensors[shared]
    write(tmp_path, tensors)
    check_text(tmp_path)


def test_dino_with_and_without_the_crop_of_its_preprocessor(tmp_path):
    """Pictures of the side it learned at, which is no multiple of a patch, and of one that is."""
    saved("Dinov2Model", ODD, tmp_path)
    assert opener.open(str(tmp_path)).module().res == 14
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 16}))
    check_picture(tmp_path, transformers.Dinov2Model, 16, dino.MEAN, dino.STD)


def write(folder, tensors):
    (folder / hf.WEIGHTS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))


# --- positions and generation ---


@pytest.mark.parametrize("name", ["RobertaModel", "XLMRobertaModel", "CamembertModel"])
def test_a_padding_token_within_a_caption_takes_no_position(tmp_path, name):
    saved(name, texts.ROBERTA, tmp_path)
    text_BL, mask_BL = texts.batch()
    text_BL[0, [2, 5]] = texts.ROBERTA["pad_token_id"]  # of the text "<pad>"
    text_BL[1] = np.roll(np.where(mask_BL[1], text_BL[1], 1), 3)
    mask_BL[1] = np.roll(mask_BL[1], 3)  # padded on the left
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokens = np.where(mask_BL, text_BL, 1)
    with torch.inference_mode():
        out = model(torch.tensor(tokens).long(), torch.tensor(mask_BL).long())
    got = ours(Cond, tmp_path, tokens, mask_BL)
    want = out.last_hidden_state.numpy()
    np.testing.assert_allclose(got[mask_BL], want[mask_BL], atol=1e-5, rtol=0)


SPEAKER = texts.GPT2 | dict(n_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@functools.partial(jax.jit, static_argnums=0, static_argnames="new")
def say(net, variables, text_BL, mask_BL, new):
    options = dict(new=new, end=texts.VOCAB, temperature=0)
    return gpt2.generate(net, variables, text_BL, mask_BL, jax.random.key(0), **options)[0]


def opened(folder):
    """A text encoder and its variables."""
    net = opener.open(str(folder)).module()
    shapes = jax.eval_shape(net.init, jax.random.key(0), *texts.batch())
    return net, opener.load(str(folder), shapes)


@pytest.mark.parametrize(
    ("name", "tied"),
    [("GPT2LMHeadModel", True), ("GPT2LMHeadModel", False), ("GPT2DoubleHeadsModel", False)],
)
def test_gpt2_goes_on_as_transformers_does(tmp_path, name, tied):
    """By its own head or the embeddings; padded on the left, as transformers wants it, or right."""
    model = saved(name, SPEAKER | dict(tie_word_embeddings=tied), tmp_path)
    text_BL, _ = texts.batch()
    mask_BL = np.arange(texts.LENGTH) >= np.array([0, 5, 8])[:, None]
    text_BL = np.where(mask_BL, text_BL, 0)
    tokens = torch.tensor(text_BL).long(), torch.tensor(mask_BL).long()
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = model.generate(tokens[0], attention_mask=tokens[1], **options)[:, texts.LENGTH :]
    assert len(np.unique(want)) > 3  # not one word for ever
    net, variables = opened(tmp_path)
    np.testing.assert_array_equal(say(net, variables, text_BL, mask_BL, new=20), want)
    lengths = mask_BL.sum(1)
    right = lambda x: np.stack([np.roll(row, n) for row, n in zip(x, lengths, strict=True)])
    tokens = right(text_BL), right(mask_BL)
    np.testing.assert_array_equal(say(net, variables, *tokens, new=20), want)


def test_gpt2_without_a_head_says_nothing(tmp_path):
    saved("GPT2Model", SPEAKER | dict(tie_word_embeddings=False), tmp_path)
    check_text(tmp_path)
    with pytest.raises(errors.ConfigError, match=r"has no head .*GPT2LMHeadModel"):
        say(*opened(tmp_path), *texts.batch(), new=4)
