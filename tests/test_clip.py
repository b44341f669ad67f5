"""The dual encoder: its losses, its temperature, what it reads, and how retrieval is measured."""

import itertools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from scipy.special import log_softmax

from configs import shapes_clip
from t2i_jax import errors, loop, losses, objective, pipeline, weights
from t2i_jax.data import shapes
from t2i_jax.evaluators import retrieval
from t2i_jax.models.types import Tokens
from tests import runs, test_conditioning, test_vits
from tests import test_text_families as families

HELD_OUT = dict(source="shapes", split="test", size=48, res=16)


def config(**changes):
    config = shapes_clip.get_config("debug")
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 4)).astype(np.float32), ~np.eye(4, dtype=bool)


@pytest.mark.parametrize("name", ["info_nce", "pairwise"])
def test_equal_captions_and_examples_without_weight_are_no_negatives(scores, name):
    fn, (logits, apart), ones = getattr(losses, name), scores, np.ones(4, np.float32)
    whole = fn(logits, apart, ones)
    fewer = np.array([1, 1, 1, 0], np.float32)
    np.testing.assert_allclose(
        fn(logits, apart, fewer), fn(logits[:3, :3], apart[:3, :3], ones[:3]), rtol=1e-5
    )
    twins = apart.copy()
    twins[0, 1] = twins[1, 0] = False
    assert fn(logits, twins, ones) < whole
    assert fn(np.eye(4) * 200 - 100, apart, ones) == pytest.approx(0, abs=1e-5)


def test_contrastive_losses_are_their_formulas(scores):
    (logits, apart), ones = scores, np.ones(4, np.float32)
    diagonals = [np.diagonal(log_softmax(logits, axis)) for axis in (0, 1)]
    np.testing.assert_allclose(losses.info_nce(logits, apart, ones), -np.mean(diagonals), rtol=1e-5)
    sign = 2 * np.eye(4) - 1
    wanted = np.log1p(np.exp(-sign * logits)).sum() / 4  # SigLIP, eq. 1
    np.testing.assert_allclose(losses.pairwise(logits, apart, ones), wanted, rtol=1e-5)


def test_captions_are_apart_by_tokens_and_mask():
    text = np.array([[1, 2], [1, 2], [1, 3]])
    mask = np.array([[True, True], [True, True], [True, True]])
    apart = losses.different_captions(Tokens(text, mask))
    assert not apart[0, 1]
    assert apart[0, 2]
    mask[1, 1] = False
    assert losses.different_captions(Tokens(text, mask))[0, 1]


def test_captions_are_told_apart_as_if_token_by_token():
    """Captions that differ least: in one token, in their order, in the mask; and copies."""
    rng = np.random.default_rng(0)
    near = np.array(list(itertools.product(range(6), repeat=4)), np.int32)
    far = rng.integers(0, 60_000, (500, 4)).astype(np.int32)
    text = np.concatenate([near, far, far[:, ::-1], far + (1 << 16), near[:100]])
    mask = np.concatenate([np.ones(text.shape, bool), np.tri(4, dtype=bool)[text[:, 0] % 4]])
    text = np.concatenate([text, text])
    rows = np.concatenate([text, mask], 1)
    _, number = np.unique(rows, axis=0, return_inverse=True)
    wanted_BB = number[:, None] != number
    np.testing.assert_array_equal(losses.different_captions(Tokens(text, mask)), wanted_BB)
    alone = losses.different_captions(Tokens(np.array([[3, 4]]), np.ones((1, 2), bool)))
    assert alone.tolist() == [[False]]


@pytest.mark.parametrize("changes", [{}, {"lora": dict(caption=dict(rank=2))}])
def test_a_run_that_would_cut_the_batch_is_refused(changes, tmp_path):
    """Adapters compare as the losses do that train them."""
    refused = config(accumulate=2, **changes)
    if changes:
        refused.optim = dict(image=refused.optim.image, caption_lora=refused.optim.caption)
        refused.ema = {}
    with pytest.raises(errors.ConfigError, match="would see it in 2 parts"):
        loop.train(refused, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid"])
def test_a_step_learns_both_towers_and_the_temperature_is_bounded(kind):
    family = objective.make(config(loss=dict(kind=kind)))
    assert family.trained == ("image", "caption")
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), runs.abstract_batch(config()))
    nets, ids_BL = runs.filled(family.init, jax.random.key(0), zeros), zeros["text"].ids_BL
    batch = zeros | {
        "image": np.random.default_rng(0).normal(size=zeros["image"].shape).astype(np.float32),
        "text": Tokens(np.arange(ids_BL.size).reshape(ids_BL.shape) % 200, ids_BL == 0),
        "weight": np.ones_like(zeros["weight"]),
    }
    (loss,) = family.losses

    def value(params):
        seen = nets | {name: {"params": params[name]} for name in loss.nets}
        return loss.fn(seen, batch, jax.random.key(0), 0)[0]

    params = {name: nets[name]["params"] for name in loss.nets}
    slope = jax.jit(jax.grad(value))
    grads = slope(params)
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(g).max() > 0 and "k_norm" not in str(path)
    ]
    # a block's second convolution is zero at first, and so is what reaches its first
    assert all("Conv_0" in path for path in still), still
    nets["image"]["params"]["logit_scale"]["value"] = np.float32(20)
    assert slope(params)["image"]["logit_scale"]["value"] != 0  # so that it can come back
    cosines = (
        family.predict["image_emb"](nets, batch, None)
        @ family.predict["text_emb"](nets, batch, None).T
    )
    bias = nets["image"]["params"].get("logit_bias", {"value": 0.0})["value"]
    np.testing.assert_allclose(
        family.predict["logits"](nets, batch, None), 100 * cosines + bias, atol=1e-3
    )


def test_hugging_faces_clip_gives_its_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    test_vits.torch_model("clip, both towers").save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    families.write(folder, settings, {name: x.shape for name, x in saved.items()})
    test_conditioning.small_tokenizer(folder)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    ours = config(
        res=14, text_length=families.LENGTH, load=dict.fromkeys(["image", "text"], folder)
    )
    ours.load = {name: str(folder) for name in ("image", "text")}
    ours.model = dict(image={}, caption=False)
    family = objective.make(ours)
    assert family.trained == ("image",)
    nets = weights.pretrained(family, ours) | weights.frozen(family, ours)
    text_BL, mask_BL = families.batch()
    image = test_vits.picture(14, 14)[[0, 1, 0]]
    batch = {"image": image, "text": Tokens(text_BL, mask_BL), "index": np.arange(3)}
    found = family.predict["logits"](nets, batch, None)
    mean, std = np.array(test_vits.clip.MEAN), np.array(test_vits.clip.STD)
    pixels = (((image + 1) / 2 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        wanted = model(
            input_ids=torch.tensor(text_BL, dtype=torch.long),
            attention_mask=torch.tensor(mask_BL, dtype=torch.long),
            pixel_values=torch.tensor(pixels),
        ).logits_per_image.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss=dict(kind="sigmoids")), "did you mean 'sigmoid'"),
        (dict(model=dict(image=dict(tower="vti"))), "did you mean 'vit'"),
        (dict(model=dict(images={})), "did you mean 'image'"),
        (dict(model=dict(image=dict(width=0))), "width is 0"),
        (dict(model=dict(caption=dict(projected=999))), "vectors of 999 numbers"),
        (dict(res=24), "res is 24"),
    ],
)
def test_what_no_dual_encoder_can_be_is_said(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        objective.make(config(**changes))


def test_an_image_network_without_a_projection_is_no_tower(tmp_path):
    test_vits.by_golden("dino", tmp_path)
    ours = config(load=dict(text="", image=str(tmp_path)))
    ours.model = dict(image={}, caption={})
    with pytest.raises(errors.ConfigError, match="has no projection"):
        objective.make(ours)


# --- retrieval ------------------------------------------------------------------------------------


def dual(noise):
    """Predictions that know which pair is which, less well the more noise."""
    names, rng = {}, np.random.default_rng(0)
    axis = lambda caption: names.setdefault(caption, np.eye(256)[len(names)])
    near = lambda captions: np.stack(list(map(axis, captions)))
    return {
        "batch": lambda pictures, captions: captions,
        "text_emb": lambda nets, captions: near(captions),
        "image_emb": lambda nets, captions: (
            near(captions) + noise * rng.normal(size=(len(captions), 256))
        ),
    }


def test_retrieval_falls_with_noise_and_leaves_out_equal_captions():
    found = [
        retrieval.make(dual(noise), data=HELD_OUT, candidates=16)({}, 0)()
        for noise in (0, 0.3, 100)
    ]
    assert found[0]["num_images"] % 16 == 0
    assert found[0]["num_images"] > 16
    more = HELD_OUT | {"size": 208}
    options = {name: value for name, value in more.items() if name != "source"}
    different = len(set(shapes.make(**options).captions()))
    assert different < 208
    judged = retrieval.make(dual(0), data=more, candidates=16)({}, 0)()
    assert judged["num_images"] == different // 16 * 16
    for key in ("image_to_text_at_1", "text_to_image_at_1", "r_precision"):
        assert found[0][key] == 1
        assert found[0][key] > found[1][key] > found[2][key]
        assert found[2][key] < 0.3
    assert (
        found[1]["image_to_text_at_10"]
        >= found[1]["image_to_text_at_5"]
        > found[1]["image_to_text_at_1"]
    )


def test_retrieval_leaves_out_broken_pictures(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"number {i}")
    (tmp_path / "03.png").write_bytes(b"<html>")
    own = dict(source="folder", path=str(tmp_path))
    assert retrieval.make(dual(0), data=own, candidates=11)({}, 0)()["num_images"] == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(candidates=64), "64 candidates of"),
        (dict(candidates=10), "more than 10"),
        (dict(data=dict(source="shape")), "did you mean 'shapes'"),
    ],
)
def test_what_retrieval_cannot_measure_is_said(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        retrieval.make(dual(0), **dict(data=HELD_OUT, candidates=16) | changes)
    with pytest.raises(errors.ConfigError, match="no prediction 'image_emb'"):
        retrieval.make({}, data=HELD_OUT)


def test_the_loop_trains_and_judges_a_family_that_draws_nothing(tmp_path):
    evaluators = dict(retrieval=dict(data=HELD_OUT, candidates=16, batch_size=16))
    changes = dict(evaluators=evaluators, eval_every=4, steps=4, best="retrieval/r_precision")
    loop.train(config(**changes), tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert 0 <= row["retrieval/text_to_image_at_5"] <= 1
    pipe = pipeline.Pipeline.load(str(tmp_path), step="best")
    again = pipe.evaluate("retrieval", **evaluators["retrieval"])
    assert again["r_precision"] == pytest.approx(row["retrieval/r_precision"])
    with pytest.raises(errors.ConfigError, match="has no prediction 'sample'"):
        pipe(["a red circle"])
