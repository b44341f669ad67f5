"""Every config trains, resumes and predicts as :debug; every objective keeps the contract."""

import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from configs import coco_gan, common, folder_flow
from t2i_jax import errors, images, loop, objective, pipeline, weights
from t2i_jax.data import loader
from tests import runs

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
CONFIGS = [name for name in CONFIGS if name not in ("__init__", "common")]
TRAINED = (pytest.param("folder_flow", marks=pytest.mark.slow), "shapes_transformer")
OBJECTIVES = sorted(p.stem for p in (ROOT / "t2i_jax" / "objectives").glob("[!_]*.py"))


def debug(name):
    return importlib.import_module(f"configs.{name}").get_config("debug")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve captioned pictures in a folder."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as f:
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i}.png")
            f.write(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n")
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_a_config_trains_resumes_and_predicts(name, tmp_path, pictures):
    config = debug(name)
    config.model = debug("shapes_transformer").model  # compiles faster; test_loop has the other
    if config.data.source == "folder":
        config.data.path = str(pictures)
    config.optim.model.decay = "constant"  # one program, however many the steps
    config.steps = 3
    loop.train(config, tmp_path)
    config.steps = 4
    loop.train(config, tmp_path)
    assert [row["step"] for row in runs.rows(tmp_path)] == [1, 2, 3, 4]
    images = pipeline.Pipeline.load(str(tmp_path))(["a red circle"], steps=2)
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_own_pictures_are_drawn_and_held_out_by_one_option(tmp_path, pictures):
    """Captions of the data in samples/, and the loss of pictures that training does not see."""
    config = folder_flow.get_config(f"path={pictures},holdout=0.3")
    assert config.sample_every
    assert config.eval_every
    judges = config.evaluators.to_dict()
    config = common.shrink(config)
    config.model, config.evaluators = debug("shapes_transformer").model, judges
    config.steps = config.sample_every = config.eval_every = 2
    config.sample.steps = 1
    loop.train(config, tmp_path)
    trained, kept = (
        set(loader.make_source(config, split=split).captions()) for split in ("train", "test")
    )
    assert len(trained) + len(kept) == 12
    assert kept
    drawn = images.read_metadata(tmp_path / "samples" / "step_00000002.png")["prompts"]
    assert len(drawn) == 4
    assert set(drawn) <= trained
    (row,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    pipe = pipeline.Pipeline.load(str(tmp_path))
    assert pipe.evaluate("held_out_loss")["mean"] == pytest.approx(row["held_out_loss/mean"])
    asked = pipe.predictor.evaluator_options("held_out_loss", {"seed": 1})
    assert asked["seed"] == 1
    assert asked["data"] == {**config.data, "split": "test", "res": 16}
    other = {"data": {"source": "shapes"}}
    assert pipe.predictor.evaluator_options("retrieval", other) == other
    assert pipe.predictor.evaluator_options("shapes", {}) == {}


def test_a_gan_holds_own_pictures_out_by_one_option(pictures):
    config = coco_gan.get_config(f"path={pictures},holdout=0.3")
    trained, kept = (
        set(loader.make_source(config, split=split).captions()) for split in ("train", "test")
    )
    assert (len(trained | kept), len(trained & kept)) == (12, 0)
    assert kept
    assert config.eval_every
    judges = config.evaluators.to_dict()
    config = common.shrink(config)
    for name, options in judges.items():
        pipeline.Predictor(config).evaluator(name, **options)  # raises where one does not fit
    assert not coco_gan.get_config(f"path={pictures}").evaluators


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_the_common_keys_and_one_optimiser_per_trained_net(name):
    config = debug(name)
    assert set(config) == set(common.base())
    assert (ROOT / "t2i_jax" / "data" / f"{config.data.source}.py").exists()
    family = objective.make(config)
    assert set(config.optim) == set(family.trained)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_keeps_the_contract(name):
    config = next(c for c in map(debug, CONFIGS) if c.objective == name)
    family = objective.make(config)
    shapes = weights.abstract_nets(family, config)
    assert set(family.trained) <= set(shapes)
    assert all("params" in net for net in shapes.values())
    batch = weights.abstract_batch(family, config.batch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for loss in family.losses:
        step = jax.ShapeDtypeStruct((), "int32")
        value, aux = jax.eval_shape(loss.fn, shapes, batch, key, step)
        assert value.shape == ()
        assert all(metric.shape == () for metric in aux.metrics.values())
        assert set(aux.mutated) <= set(shapes)
    if "sample" in family.predict:
        sample = jax.eval_shape(family.predict["sample"], shapes, batch, key)
        assert sample.shape == (config.batch_size, config.res, config.res, 3)


def test_an_unknown_option_of_a_config_names_the_nearest():
    with pytest.raises(errors.ConfigError, match="did you mean 'res'"):
        common.parse_arg("rse=3", res=32)
    with pytest.raises(errors.ConfigError, match="is no int"):
        common.parse_arg("res=big", res=32)
    with pytest.raises(errors.ConfigError, match="debug='maybe' is no bool"):
        common.parse_arg("debug=maybe", debug=False)
    assert common.parse_arg("debug=no", debug=True).debug is False
    parsed = common.parse_arg("path=/a,b/c, d,debug", debug=False, path="")
    assert parsed.to_dict() == {"debug": True, "path": "/a,b/c, d"}
    parsed = common.parse_arg("debug,res=64", debug=False, res=32)
    assert parsed.to_dict() == {"debug": True, "res": 64}
