"""A prediction is one function of a family: its options and its kind are all that draws it."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Annotated

import jax
import numpy as np
import pytest
from PIL import Image

from configs import shapes_gan
from t2i_jax import errors, images, objective, objectives, pipeline, weights
from t2i_jax.commands import prompts
from t2i_jax.data import inputs, transforms
from t2i_jax.objective import Objective, Texts
from t2i_jax.pretrained import folder
from t2i_jax.text import tokenize
from tests import runs

ROOT = pathlib.Path(__file__).parent.parent
FAMILY = '''
"""A family of the tests."""

from typing import Annotated

import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.objective import Loss, Objective, Pictures, Texts


def make(config):
    def recolour(nets, batch, key, *, red: fields.Share = 0.5) -> Pictures:
        """An image with another red.

        Args:
          red: share of the new red,
            0 … 1.
        """
        new_BHW = (1 - red) * batch["image"][..., 0] + red * nets["model"]["params"]["w"]
        return batch["image"].at[..., 0].set(new_BHW)

    def echo(nets, batch, key, *, times: Annotated[int, fields.count(3)] = 1) -> Texts:
        """The caption as it was read."""
        return TOKENS(batch)

    def both(nets, batch, key) -> Pictures:
        """Reads image and caption."""
        return batch["image"] * jnp.ones(len(batch["index"]))[:, None, None, None] + ONE(batch)

    init = lambda key, batch: {"model": {"params": {"w": jnp.ones(())}}}
    loss = Loss(("model",), lambda nets, batch, key, step: (0.0, None))
    raw = lambda nets, batch, key: batch["index"]
    return Objective(init, (loss,), dict(recolour=recolour, echo=echo, both=both, raw=raw))
'''
FAMILY = FAMILY.replace("TOKENS(batch)", 'batch["text"]')
FAMILY = FAMILY.replace("ONE(batch)", '0 * batch["text"].ids_BL.sum()')
EVALUATOR = """
def make(predict, *, red=1.0):
    def run(nets, step):
        batch = predict["batch"]([np.zeros((8, 8, 3), np.uint8)], None)
        image_BHWC = predict["recolour"](nets, batch, seed=0, red=red)
        return lambda: {"mean": float(image_BHWC[..., 0].mean())}

    return run
"""
RUN = """
import runpy, sys
from t2i_jax import evaluators, objectives
objectives.__path__.append(sys.argv[1])
evaluators.__path__.append(sys.argv[1])
command = sys.argv[2]
sys.argv = [f"{command}.py", *sys.argv[3:]]
runpy.run_module(f"t2i_jax.commands.{command}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of an exported model of the family, and that of the family."""
    home = tmp_path_factory.mktemp("family")
    (home / "toy_family.py").write_text(textwrap.dedent(FAMILY))
    (home / "redness.py").write_text(f"import numpy as np\n{EVALUATOR}")
    folder = tmp_path_factory.mktemp("model")
    config = runs.config(objective="toy_family", res=8, loss={}, model={}, optim={}, ema={})
    config.optim = dict(model=dict(learning_rate=0.1))
    nets = {"model": {"params": {"w": np.ones((), np.float32)}}}
    weights.export(folder, nets, config, card="", dtype="float32")
    objectives.__path__.append(str(home))
    yield folder, home
    objectives.__path__.remove(str(home))


@pytest.fixture(scope="module")
def pipe(model):
    return pipeline.Pipeline.load(str(model[0]))


@pytest.fixture
def photo(tmp_path):
    image_HWC = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
    Image.fromarray(image_HWC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png", image_HWC


def start(model, *arguments, code=0, command="sample"):
    folder, home = model
    done = subprocess.run(
        [sys.executable, "-c", RUN, home, command, f"--checkpoint={folder}", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines() if code == 0 else done.stderr.splitlines()[-1]


def test_a_new_prediction_is_drawn_and_drawn_again_by_the_command(model, photo, tmp_path):
    path, image_HWC = photo
    out = f"--output_dir={tmp_path / 'out'}"
    (drawn,) = start(model, "--predict=recolour", f"--image={path}", "--set=red=.25", out)
    wanted = transforms.to_float(transforms.square(image_HWC, 8))
    wanted[..., 0] = 0.75 * wanted[..., 0] + 0.25
    np.testing.assert_array_equal(np.asarray(Image.open(drawn)), images.to_uint8(wanted))
    found = images.read_metadata(drawn)
    assert (found["prediction"], found["options"]) == ("recolour", {"red": 0.25})
    assert found["image"]["name"] == "photo.png"
    (again,) = start(model, f"--reproduce={drawn}", f"--image={path}", out)
    assert pathlib.Path(again).read_bytes() == pathlib.Path(drawn).read_bytes()
    Image.fromarray(image_HWC[::-1]).save(tmp_path / "other.png")
    for other in ((), (f"--image={tmp_path / 'other.png'}",)):
        said = start(model, f"--reproduce={drawn}", *other, out, code=78)
        assert "it was drawn from photo.png, which is not given" in said
        assert "--image=photo.png" in said
    assert "red is 2 (at --set red)" in start(
        model, "--predict=recolour", f"--image={path}", "--set=red=2", out, code=78
    )


def test_a_text_is_printed_and_written(model, tmp_path):
    out = f"--output_dir={tmp_path / 'out'}"
    path, text = start(model, "--predict=echo", "--prompt=a red ring", out)
    assert text == "a red ring"
    assert pathlib.Path(path).name == "00000_s0.txt"
    assert pathlib.Path(path).read_text() == "a red ring\n"


def test_help_lists_what_a_model_predicts(model):
    said = "\n".join(start(model, "--help"))
    assert "--predict=recolour  An image with another red." in said
    assert "--set red=0.5  share of the new red, 0 … 1." in said
    assert "--predict=echo" in said
    assert "--predict=raw" not in said
    assert "--num_images" in said
    listed = said[said.index("predictions of") :]
    assert not [line for line in listed.splitlines() if line != line.rstrip()]


def test_an_evaluator_gets_the_options_that_it_takes(model):
    ask = lambda *more, **code: start(
        model, "--evaluators=redness", *more, command="evaluate", **code
    )
    (row,) = map(json.loads, ask())
    assert (row["redness/mean"], row["redness/options"]) == (1.0, {})
    assert "unknown option 'batch_size'" in ask("--batch_size=2", code=78)


@pytest.mark.parametrize(
    ("name", "examples", "options", "message"),
    [
        ("recolor", {}, {}, "has no prediction 'recolor' .* it has recolour, echo, both, raw"),
        ("recolour", {"image": 1}, dict(blue=1), "unknown option 'blue' .at --set blue"),
        ("recolour", {"image": 1}, dict(red=1.5), "a finite number from 0 to 1"),
        ("echo", {"caption": 1}, dict(times=4), "a whole number from 1 to 3"),
        (
            "recolour",
            {"caption": 1},
            {},
            r"'recolour' reads 'image', and there is no image .*--image",
        ),
        ("both", {"image": 1}, {}, r"'both' reads 'text', and there is no caption .*--prompt"),
        ("recolour", {"image": 1, "caption": 1}, {}, r"does not read the caption .at --prompt"),
        ("echo", {"image": 1, "caption": 1}, {}, r"does not read the image .at --image"),
        ("echo", {"captions": 1}, {}, "unknown option 'captions'.*did you mean 'caption'"),
    ],
)
def test_what_does_not_fit_a_prediction_is_said(pipe, name, examples, options, message):
    values = {"image": [np.zeros((8, 8, 3), np.uint8)]}
    examples = {key: values.get(key, ["a ring"]) for key in examples} or {"caption": ["a"]}
    with pytest.raises(errors.ConfigError, match=message):
        pipe.draw(name, examples, **options)


IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ({"caption": "a red ring"}, {}, "give a list of strings"),
        ({"caption": 3}, {}, "give a list of strings"),
        ({"caption": [IMAGE]}, {}, "give a list of strings"),
        ({"caption": []}, {}, "or there are none: 0 of 'caption'"),
        ({}, {}, "or there are none: none"),
        ({"caption": ["a"], "image": [IMAGE] * 2}, {}, "1 of 'caption', 2 of 'image'"),
        ({"image": IMAGE}, {}, "give a list of uint8 arrays"),
        ({"image": [IMAGE.astype(np.float32)]}, {}, "give a list of uint8 arrays"),
        ({"image": [IMAGE[..., :1]]}, {}, "give a list of uint8 arrays"),
        ({"caption": ["a", "b"], "negative_prompt": "grey"}, {}, "give a list of strings"),
        ({"caption": ["a"]}, dict(index=[0, 1]), "2 of them for 1 examples .at index"),
        ({"caption": ["a"]}, dict(seed=[0, 1]), "2 of them for 1 examples .at seed"),
    ],
)
def test_examples_that_cannot_be_read_are_told_before_anything_is_compiled(
    pipe, examples, options, message
):
    with pytest.raises(errors.ConfigError, match=message):
        pipe.draw("raw", examples, **options)


@pytest.mark.parametrize("write", ["sharpness=1.0", "*, seed=1.0", "*, index: int = 1"])
def test_a_predictions_options_stand_after_a_star_under_free_names(write):
    space = {}
    exec(f"def predict(nets, batch, key, {write}): ...", space)
    with pytest.raises(errors.ConfigError, match="write options after `\\*`"):
        pipeline._check_signature("predict", space["predict"])


@pytest.mark.parametrize(
    ("mark", "text"),
    [(None, None), ("long", "long: a red ring"), ("both/short", "short: a r"), ("both", None)],
)
def test_texts_are_read_by_the_tokenizer_that_a_prediction_names(monkeypatch, mark, text):
    """Of several tokenizers none is taken for the right one by its place."""

    def named(name, length):
        one = tokenize.open("bytes", length)
        says = lambda *tokens: [
            f"{name}: {text}" for text in tokenize.Tokenizer.decode(one, *tokens)
        ]
        monkeypatch.setattr(one, "decode", says)
        return one

    both = {name: named(name, n) for name, n in (("short", 5), ("other", 32))}
    read = inputs.caption(named("long", 16), "long"), inputs.caption(both, "both")

    def echo(nets, batch, key):
        return batch["both"]["short"] if mark == "both/short" else batch["long"]

    echo.__annotations__["return"] = Annotated[Texts, mark] if mark else Texts
    family = Objective(lambda key, batch: {}, (), {"echo": echo}, inputs=read)
    monkeypatch.setattr(objective, "make", lambda config: family)
    if text is None:
        message = r"which tokenizer reads .*'echo'.*\['both/other', 'both/short', 'long'\]"
        with pytest.raises(errors.ConfigError, match=message):
            pipeline.Predictor(runs.config())
    else:
        drawn = pipeline.Predictor(runs.config()).draw("echo", {}, {"caption": ["a red ring"]})
        assert drawn == [text]


def test_arrays_come_from_python_alone(pipe):
    np.testing.assert_array_equal(pipe.draw("raw", {"caption": ["a", "b"]}, index=[4, 2]), [4, 2])
    with pytest.raises(errors.ConfigError, match=r"'raw' gives arrays.*pipeline\.Pipeline\.draw"):
        prompts.check_options(pipe, [prompts.Request("a", 0, prediction="raw")])


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [
        (runs.config, "loss_at_times", 8),
        (lambda: weights.config_at(str(folder.TINY)), "loss_at_times", 8),
        (lambda: shapes_gan.get_config("debug"), "gap", 1),
    ],
)
def test_means_of_as_many_numbers_as_examples_are_not_taken_for_theirs(make, name, count):
    """Eight losses at eight times, one gap: refused by what they declare, no net is read."""
    predictor = pipeline.Predictor(make())
    examples = {"caption": ["a ring"] * count, "image": [IMAGE] * count}
    with pytest.raises(errors.ConfigError, match=f"'{name}' gives no array with an entry for each"):
        predictor.draw(name, {}, examples)


def test_images_are_one_for_all_or_one_for_each():
    one, other = (prompts.Source(name, name) for name in "ab")
    ask = [prompts.Request("a", 0), prompts.Request("b", 0)]
    named = lambda requests: [r.source.name for r in requests]
    assert named(prompts.starting_from(ask, [one])) == ["a", "a"]
    assert named(prompts.starting_from(ask, [one, other])) == ["a", "b"]
    assert named(prompts.starting_from(ask[:1], [one, other])) == ["a", "b"]
    with pytest.raises(errors.ConfigError, match="3 images for 2 prompts"):
        prompts.starting_from(ask, [one] * 3)


def test_img2img_is_that_of_the_family(run):
    """Of a picture of the right size; padding and batches change nothing."""
    pipe = pipeline.Pipeline.load(str(run))
    image_BHWC = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    examples = {"caption": ["a ring", "a star", "a circle"], "image": list(image_BHWC)}
    drawn = pipe.draw("img2img", examples, strength=0.6, steps=2, seed=3)
    batch = pipe.predictor.batch(examples["image"], examples["caption"])
    fn = pipe.predictor.objective.predict["img2img"]
    direct = jax.jit(lambda nets, batch: fn(nets, batch, jax.random.key(3), strength=0.6, steps=2))
    wanted = images.to_uint8(direct(pipe.nets, batch)).astype(int)
    assert np.abs(drawn.astype(int) - wanted).max() <= 1
    small = pipe.draw("img2img", examples, strength=0.6, steps=2, seed=3, batch_size=2)
    assert np.abs(drawn.astype(int) - small).max() <= 1
    np.testing.assert_array_equal(pipe.draw("img2img", examples, strength=0.0, steps=2), image_BHWC)


def test_settings_that_are_no_settings_are_data_errors(tmp_path):
    path = tmp_path / "p.png"
    row = dict(prompt="a", seed=0, index=0, options={}, model="m", image={"name": "x"})
    for change in ({}, {"image": 3}, {"prediction": 3}):
        images.save(path, np.zeros((2, 2, 3), np.uint8), json.loads(json.dumps(row | change)))
        with pytest.raises(errors.DataError, match="no settings of ours"):
            prompts.from_picture(path)
