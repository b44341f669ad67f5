"""Prior preservation: a subject's pictures and its class's by turns, the latter by their weight."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import finetune
from t2i_jax import errors, images, losses
from t2i_jax.data import cache, folder, inputs, loader, subject

SHADES = {"own": (10, 20), "class": (110, 120, 130, 140, 150)}
PROMPTS = {"own": "a photo of sks dog", "class": "a photo of a dog"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two photographs with .txt files; five PNGs of ours, whose captions are their prompts."""
    root = tmp_path_factory.mktemp("both")
    for kind, shades in SHADES.items():
        (root / kind).mkdir()
        for shade in shades:
            path, image = root / kind / f"{shade}.png", np.full((8, 8, 3), shade, np.uint8)
            if kind == "class":
                images.save(path, image, {"prompt": PROMPTS[kind]})
            else:
                Image.fromarray(image).save(path)
                path.with_suffix(".txt").write_text(PROMPTS[kind])
    return root


def make(both, **options):
    return subject.make(str(both / "own"), prior=str(both / "class"), **options)


def test_each_picture_of_the_subject_is_followed_by_one_of_its_class(both):
    source = make(both, prior_weight=0.25, res=8)
    examples = [source[i] for i in range(len(source))]
    shades = [int(e["image"][0, 0, 0]) for e in examples]
    assert shades == [10, 110, 20, 120, 10, 130, 20, 140, 10, 150]
    assert [e["caption"] for e in examples] == list(source.captions()) == 5 * [*PROMPTS.values()]
    assert [e.get("weight", 1.0) for e in examples] == 5 * [1.0, 0.25]
    assert [cache.Captioned(source)[i] for i in (2, 3)] == [
        {"caption": PROMPTS["own"]},
        {"caption": PROMPTS["class"], "weight": 0.25},
    ]
    assert source.where(3).endswith("class/120.png")


def test_the_class_weighs_lambda_in_a_batch_and_a_broken_picture_nothing(both, tmp_path):
    (tmp_path / "own").symlink_to(both / "own")
    (tmp_path / "class").mkdir()
    for path in (both / "class").iterdir():
        (tmp_path / "class" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "class/130.png").write_bytes((both / "class/130.png").read_bytes()[:-30])
    (tmp_path / "class/130.txt").write_text(PROMPTS["class"])
    read = (inputs.picture(8),)
    source = make(tmp_path, prior_weight=0.25)
    arrays = loader.Loader(source, read, batch_size=10, seed=0).batch(0).arrays
    weight = {int(x[0, 0, 0]): w for x, w in zip(arrays["image"], arrays["weight"], strict=True)}
    assert weight.pop(0) == 0  # the broken one
    assert weight == dict.fromkeys(SHADES["own"], 1.0) | dict.fromkeys((110, 120, 140, 150), 0.25)


def test_what_is_held_out_is_of_the_subject(both):
    whole = folder.make(str(both / "own"), holdout=0.9, split="test").captions()
    assert make(both, holdout=0.9, split="test").captions() == whole
    other = subject.make(str(both / "own"), prior=str(both / "own"))
    assert make(both).fingerprint != other.fingerprint


def test_the_config_names_both_folders(both):
    config = finetune.get_config(f"path={both / 'own'},prior={both / 'class'},prior_weight=0.5")
    source = loader.make_source(config)
    assert [source.caption(i).get("weight") for i in (0, 1)] == [None, 0.5]
    config.data.prior = ""
    with pytest.raises(errors.DataError, match="no such folder"):
        loader.make_source(config)


@pytest.mark.parametrize("weight", [[0.25], [0.25, 0.0]])
def test_a_weight_counts_in_a_batch_of_one(weight):
    value = losses.weighted_mean(jnp.array([3.0, 1.0])[: len(weight)], jnp.array(weight))
    assert value == 0.75
