"""Families of other inputs than a picture and a caption, through the loop as it is."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax import errors, loop, losses, pipeline, plugins, weights
from t2i_jax.data import folder, inputs, loader
from t2i_jax.objective import Aux, Loss, Objective, Pictures
from t2i_jax.text import tokenize
from tests import runs, test_conditioning, test_loader


class Enlarger(nn.Module):
    """A small image and a caption to an image of twice its side."""

    @nn.compact
    def __call__(self, low_BHWC, tokens):
        byte_BLD = nn.Embed(260, 8)(tokens.ids_BL) * tokens.mask_BL[..., None]
        b, h, w, c = low_BHWC.shape
        x_BHWC = nn.Conv(8, (3, 3))(jax.image.resize(low_BHWC, (b, 2 * h, 2 * w, c), "nearest"))
        return nn.Conv(3, (3, 3))(nn.gelu(x_BHWC + byte_BLD.mean(1)[:, None, None]))


def super_resolution(config) -> Objective:
    """Nets "model"; prediction sample, of "low" and a caption."""
    net = Enlarger()
    apply = lambda nets, batch: net.apply(nets["model"], batch["low"], batch["text"])
    texts = tokenize.open("bytes", config.text_length)

    def loss(nets, batch, key, step):
        error_B = losses.squared_error(apply(nets, batch), batch["image"])
        return losses.weighted_mean(error_B, batch["weight"]), Aux()

    def sample(nets, batch, key) -> Pictures:
        return jnp.clip(apply(nets, batch), -1, 1)

    return Objective(
        lambda key, batch: {"model": net.init(key, batch["low"], batch["text"])},
        (Loss(("model",), loss),),
        {"sample": sample},
        inputs=(inputs.picture(16, augment=("flip",)), inputs.smaller(8), inputs.caption(texts)),
    )


@pytest.mark.parametrize(
    ("shape", "origin"),
    [
        ((20, 30), (20, 30, 0, 10)),  # resized to 24 × 36
        ((60, 16), (60, 16, 18, 0)),  # kept
        ((24, 16), (24, 16, 0, 0)),
        ((480, 800), (480, 800, 0, 12)),  # resized to 24 × 40, decoded smaller
    ],
)
@pytest.mark.parametrize("pad", [False, True])
def test_an_origin_is_of_the_files_picture_and_the_resized_ones_corner(
    shape, origin, pad, tmp_path
):
    """Size and crop as SDXL learned them (arXiv:2307.01952, section 2.2)."""
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a")
    source = folder.make(str(tmp_path), res=(24, 16), pad=pad)
    read = (inputs.origin((24, 16)), inputs.picture((24, 16)))
    made = inputs.arrays(read, [source[0]], [None], [0])
    assert made["image"].shape == (1, 24, 16, 3)
    if pad:  # to the ratio of 3 : 2, of which nothing is cut
        height = max(shape[0], shape[1] * 3 / 2)
        origin = (height, height * 2 / 3, 0, 0)
    np.testing.assert_allclose(made["origin"][0], origin, atol=1.5 if pad else 0)


class Painter(nn.Module):
    """Two captions' tokens to an image."""

    vocabularies: tuple[int, int]

    @nn.compact
    def __call__(self, *tokens):
        vectors = [
            (nn.Embed(size, 8)(one.ids_BL) * one.mask_BL[..., None]).mean(1)
            for size, one in zip(self.vocabularies, tokens, strict=True)
        ]
        return nn.Dense(16 * 16 * 3)(nn.gelu(jnp.concatenate(vectors, 1))).reshape(-1, 16, 16, 3)


def two_tokenizers(folder):
    """A family whose nets "text" and "captioner" read each their own tokens."""

    def make(config) -> Objective:
        text = tokenize.open("bytes", config.text_length)
        captioner = tokenize.open(str(folder), 9)
        net = Painter((text.vocab_size, captioner.vocab_size))
        both = lambda batch: (batch["text"], batch["captioner"])

        def loss(nets, batch, key, step):
            error_B = losses.squared_error(net.apply(nets["model"], *both(batch)), batch["image"])
            return losses.weighted_mean(error_B, batch["weight"]), Aux()

        def sample(nets, batch, key, *, guidance: float = 1.0) -> Pictures:
            image_BHWC = net.apply(nets["model"], *both(batch))
            if "negative_captioner" in batch:
                away = (batch["negative_text"], batch["negative_captioner"])
                image_BHWC += guidance * (image_BHWC - net.apply(nets["model"], *away))
            return jnp.clip(image_BHWC, -1, 1)

        read = (inputs.picture(16), inputs.caption(text))
        return Objective(
            lambda key, batch: {"model": net.init(key, *both(batch))},
            (Loss(("model",), loss),),
            {"sample": sample},
            inputs=(*read, inputs.caption(captioner, "captioner")),
        )

    return make


def install(monkeypatch, name: str, make):
    """The family as if it lay in t2i_jax/objectives."""
    load, module = plugins.load, types.SimpleNamespace(make=make)
    found = lambda kind, asked: module if asked == name else load(kind, asked)
    monkeypatch.setattr(plugins, "load", found)


def config(name, **changes):
    optim = dict(model=dict(name="adamw", learning_rate=1e-3))
    config = runs.config(objective=name, optim=optim, ema={}, load={}, save_every=1, **changes)
    config.model, config.loss, config.sample, config.evaluators = {}, {}, {}, {}
    config.sample_every, config.eval_every, config.cache = 0, 0, ""
    return config


def test_super_resolution_trains_resumes_and_draws(monkeypatch, tmp_path):
    install(monkeypatch, "enlarging", super_resolution)
    loop.train(config("enlarging", steps=2), tmp_path / "whole")
    loop.train(config("enlarging", steps=1), tmp_path / "parts")
    loop.train(config("enlarging", steps=2), tmp_path / "parts")
    whole, parts = (pipeline.Pipeline.load(str(tmp_path / n)) for n in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole.nets, parts.nets)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    batch = whole.predictor.batch(pictures, ["a red circle", ""])
    mean = pictures.reshape(2, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(batch["low"] - (mean / 127.5 - 1)).max() < 0.51 / 127.5
    assert whole.predictor.run("sample", whole.nets, batch).shape == (2, 16, 16, 3)
    both = {"image": pictures, "caption": ["a red circle", ""]}
    assert whole.draw("sample", both).shape == (2, 16, 16, 3)
    for one, other in (("image", "caption"), ("caption", "image")):
        with pytest.raises(errors.ConfigError, match=f"and there is no {other}"):
            whole.draw("sample", {one: both[one]})


def test_two_tokenizers_train_and_draw(monkeypatch, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    test_conditioning.small_tokenizer(folder)
    for name, data in (("config.json", b"{}"), ("model.safetensors", b"")):
        (folder / name).write_bytes(data)
    install(monkeypatch, "two_readers", two_tokenizers(folder))
    loop.train(config("two_readers", steps=2), tmp_path / "run")
    pipe = pipeline.Pipeline.load(str(tmp_path / "run"))
    batch = pipe.predictor.batch(caption=["a red circle"], negative_prompt=["blue"])
    for key, length in (("text", 16), ("captioner", 9)):
        tokenizer = pipe.predictor.tokenizers[key]
        assert batch[key].ids_BL.shape == (1, length)
        assert tokenizer.decode(*batch[f"negative_{key}"]) == ["blue"]
    assert pipe.predictor.tokenizers["captioner"].decode(*batch["captioner"]) == ["a red circle"]
    plain = pipe(["a red circle", "a blue square"])
    assert plain.shape == (2, 16, 16, 3)
    assert np.abs(plain.astype(int) - pipe(["a red circle"] * 2)).max() > 0
    assert pipe.predictor.cuts(["a red circle", "a red circle on the left"]) == [None, "n the left"]
    assert (plain != pipe(["a red circle", "a blue square"], negative_prompt="on the")).any()


def test_the_abstract_batch_is_the_loaders():
    """Shapes of what losses get are those that the loader makes, once images are floats."""
    read = (inputs.picture(4), inputs.smaller(2), inputs.hole(4))
    read += (inputs.stored(np.ones((9, 3)), "latents"),)
    made = loader.Loader(test_loader.Source(9), read, batch_size=8, seed=0).batch(0).arrays
    family = Objective(None, (), {}, inputs=read)
    kind = lambda x: (x.shape, "float32" if x.dtype == np.uint8 else str(x.dtype))
    wanted = jax.tree.map(kind, weights.abstract_batch(family, 8))
    assert jax.tree.map(kind, made) == wanted
