"""From a trained run to pictures on disk: the command lines, exported models, --reproduce."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from configs import shapes_clip
from t2i_jax import errors, images, loop, pipeline, weights
from t2i_jax.commands import prompts
from t2i_jax.quality import protocol
from tests.runs import config

ROOT = pathlib.Path(__file__).parent.parent
CAPTIONS = ["a red circle", "a blue square"]


def start(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def pipe(run):
    return pipeline.Pipeline.load(str(run))


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    nets = {name: pipe.nets[name] for name in pipe.predictor.objective.trained}
    weights.export(folder, nets, pipe.config, card="# A card\n", dtype="float32")
    return folder


def test_sample_writes_pictures_that_can_be_made_again(run, tmp_path):
    command = ["sample.py", f"--workdir={run}", "--steps=2", f"--output_dir={tmp_path}"]
    paths = start(
        *command, "--int8=model", *[f"--prompt={c}" for c in CAPTIONS], "--num_images=2", "--grid"
    )
    names = [pathlib.Path(path).name for path in paths]
    assert names == [*(f"{i:05d}_s0.png" for i in range(4)), "00004_grid.png"]
    assert images.read_metadata(paths[3])["step"] == 6
    (again,) = start(*command[:2], f"--reproduce={paths[3]}", f"--output_dir={tmp_path}")
    assert pathlib.Path(again).name == "00005_s0.png"
    ours, theirs = (np.asarray(Image.open(path), int) for path in (paths[3], again))
    assert np.abs(ours - theirs).max() <= 1
    assert images.read_metadata(again)["options"]["steps"] == 2
    assert images.read_metadata(again)["int8"] == "model"


def test_evaluate_prints_one_json_object_and_keeps_it(run, tmp_path):
    options = (f"--workdir={run}", "--num_images=4", "--steps=1")
    kept = tmp_path / "rows.jsonl"
    for way in ("--protocol=shapes", "--evaluators=shapes"):
        *_, line = start("-m", "t2i_jax", "evaluate", way, f"--output={kept}", *options)
        row = json.loads(line)
        assert json.loads(kept.read_text().splitlines()[-1]) == row
        assert row["step"] == 6
        if way == "--protocol=shapes":
            assert row["protocol"] == "shapes num_images=4 sample={'steps': 1}"
            assert (row["num_images"], row["sample"]["steps"]) == (4, 1)
            first = row["full_match"]
    assert row["shapes/num_images"] == 4
    assert row["shapes/full_match"] == first
    assert row["sample"]["steps"] == row["shapes/options"]["sample"]["steps"] == 1


def test_an_exported_model_draws_what_the_run_draws(pipe, exported):
    again = pipeline.Pipeline.load(str(exported))
    np.testing.assert_array_equal(pipe(CAPTIONS, steps=2), again(CAPTIONS, steps=2))
    assert (again.step, pipe.step) == (None, 6)
    with pytest.raises(errors.ConfigError, match="has no step 3"):
        pipeline.Pipeline.load(str(exported), step=3)


def test_a_damaged_export_says_what_to_do(exported, tmp_path):
    for name in (weights.EXPORTED, "config.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    file = tmp_path / weights.EXPORTED
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(errors.DataError, match="not a whole safetensors file"):
        pipeline.Pipeline.load(str(tmp_path))
    file.write_bytes((exported / weights.EXPORTED).read_bytes())
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["model"]["model"]["width"] = 24
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(errors.DataError, match="tensors do not fit"):
        pipeline.Pipeline.load(str(tmp_path))


def test_training_leaves_an_exported_model_alone(exported):
    before = (exported / "config.json").read_text()
    with pytest.raises(errors.ConfigError, match="an exported model lies there"):
        loop.train(config(), exported)
    assert (exported / "config.json").read_text() == before


def test_a_prompts_file_sets_options_a_flag_has_not(pipe, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        json.dumps({"prompt": "a red circle", "interval": [0.2, 0.8], "steps": 1, "seed": 5})
        + "\n# a comment\na blue square --d 5 --s 1\n"
    )
    default = prompts.Request(prompt="", seed=0)
    drawn = prompts.draw(pipe, prompts.read_file(path, default), batch_size=4)
    assert [info["seed"] for _, info in drawn] == [5, 5]
    assert [info["options"]["interval"] for _, info in drawn] == [(0.2, 0.8), (0.0, 1.0)]


def test_a_negative_prompt_that_is_too_long_is_refused_where_asked():
    predictor = pipeline.Predictor(weights.config_at("builtin:shapes"))
    drawer = types.SimpleNamespace(predictor=predictor, config=predictor.config)
    request = prompts.Request("a circle", seed=0, negative_prompt="red " * 300)
    with pytest.raises(errors.ConfigError, match=r"that the model reads; cut off.*prompt 'red red"):
        prompts.draw(drawer, [request], batch_size=1, strict=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "steps": "ten"}', "steps is 'ten'"),
        ('{"prompt": "a", "steps": Infinity}', "steps is inf"),
        ('{"prompt": "a", "top_k": 3}', "unknown option 'top_k'"),
        ('{"prompt": ["a"]}', "a prompt is"),
        ('{"prompt": "a"', "not a JSON object"),
        ('a circle --d 5"', "--d is"),
        ("a circle --q 5", "unknown option --q"),
    ],
)
def test_a_bad_line_of_a_prompts_file_is_named(pipe, tmp_path, line, message):
    path = tmp_path / "prompts.txt"
    path.write_text(line)
    with pytest.raises(errors.ConfigError, match=message):
        prompts.draw(pipe, prompts.read_file(path, prompts.Request("", seed=0)), batch_size=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a caf\xe9", "codec"),
        (b"a red circle\n" * 2, "it has 26 bytes, more than 25"),
        ("folder", "Is a directory"),
        ("nothing", "No such file"),
        (b"\n# a comment\n", "no prompt in the file"),
    ],
)
def test_a_file_of_no_prompts_is_a_clear_error(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(prompts, "FILE_LIMIT", 25)
    path = tmp_path / "prompts.txt"
    if content == "folder":
        path.mkdir()
    elif content != "nothing":
        path.write_bytes(content)
    with pytest.raises(errors.ConfigError, match=rf"{message}.*prompts\.txt"):
        prompts.read_file(path, prompts.Request("", seed=0))


def test_a_prompts_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('\ufeff{"prompt": "a circle"}\r\na star'.encode())
    found = prompts.read_file(path, prompts.Request("", seed=0))
    assert [request.prompt for request in found] == ["a circle", "a star"]


def test_a_string_is_one_prompt(pipe):
    one = pipe("a red circle", steps=2)
    assert one.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(one, pipe(["a red circle"], steps=2))


def test_a_list_of_seeds_draws_each_picture_as_if_alone(pipe):
    several = pipe(CAPTIONS[0], seed=[3, 4], steps=2).astype(int)
    for i, seed in enumerate((3, 4)):
        first, _ = pipe([CAPTIONS[0]] * 2, seed=seed, steps=2).astype(int)
        assert np.abs(several[i] - first).max() <= 1
    assert np.abs(several[0] - several[1]).max() > 1


def test_few_programs_draw_any_number_of_pictures_all_the_same(pipe):
    whole = pipe([CAPTIONS[0]] * 8, seed=5, steps=2).astype(int)
    pipe([CAPTIONS[0]] * 2, seed=5, steps=2)
    programs = len(pipe.predictor._announced)
    for n in (5, 6, 7):
        assert np.abs(pipe(CAPTIONS[0], num_images=n, seed=5, steps=2) - whole[:n]).max() <= 1
    again = pipe(CAPTIONS[0], num_images=5, seed=5, steps=2, batch_size=2)
    assert np.abs(again - whole[:5]).max() <= 1
    assert len(pipe.predictor._announced) == programs


@pytest.fixture
def batches(pipe, monkeypatch):
    """The (batch, seeds) that are asked for, in place of drawing them."""
    asked = []

    def run(name, nets, batch, *, seed, **options):
        asked.append((batch, seed.tolist()))
        return np.zeros((len(seed), 2, 2, 3))

    monkeypatch.setattr(pipe.predictor, "run", run)
    return asked


def test_a_batch_is_computed_while_the_one_before_is_fetched(pipe, batches, monkeypatch):
    order, run, fetch = [], pipe.predictor.run, pipeline.jax.device_get
    said = lambda word, fn: lambda *args, **options: order.append(word) or fn(*args, **options)
    monkeypatch.setattr(pipe.predictor, "run", said("run", run))
    monkeypatch.setattr(pipeline.jax, "device_get", said("fetch", fetch))
    assert len(pipe(CAPTIONS[0], num_images=5, batch_size=2)) == 5
    assert order == ["run", "run", "fetch", "run", "fetch", "fetch"]


def test_seeds_are_for_prompts_or_for_pictures(pipe, batches):
    for seed in (7, [7, 8], [7, 7, 8, 9]):
        assert pipe(CAPTIONS, seed=seed, num_images=2).shape[0] == 4
    numbers = [(seeds, batch["index"].tolist()) for batch, seeds in batches]
    assert numbers == [
        ([7, 7, 7, 7], [0, 1, 2, 3]),
        ([7, 7, 8, 8], [0, 1, 0, 1]),
        ([7, 7, 8, 9], [0, 0, 0, 0]),
    ]
    for batch, _ in batches:  # pictures of a prompt stand beside each other
        text = batch["text"].ids_BL
        assert (text[0] == text[1]).all()
        assert (text[2] == text[3]).all()
        assert (text[1] != text[2]).any()


def test_negative_prompts_are_one_for_all_or_one_for_each(pipe, batches):
    for negative in ("blue", ["blue", "red"], ["", None], None):
        pipe(CAPTIONS, negative_prompt=negative)
    all_alike, each, *without = (batch for batch, _ in batches)
    tokens, _ = pipe.predictor.tokenizers["text"](["blue", "red"])
    np.testing.assert_array_equal(all_alike["negative_text"].ids_BL, tokens.ids_BL[[0, 0]])
    np.testing.assert_array_equal(each["negative_text"].ids_BL, tokens.ids_BL)
    assert all("negative_text" not in batch for batch in without)
    pipe(CAPTIONS, negative_prompt=["blue", None])
    some, _ = batches[-1]
    np.testing.assert_array_equal(some["negative_text"].ids_BL[0], tokens.ids_BL[0])
    assert not some["negative_text"].mask_BL[1].any()


def test_it_says_when_it_compiles(pipe, batches, capsys, monkeypatch):
    # Another test may have turned the log on, whose handler keeps the stderr of that test.
    monkeypatch.setattr(pipeline.logging, "level_info", lambda: False)
    for _ in range(2):
        pipe(CAPTIONS, steps=5)
    said = capsys.readouterr().err
    assert said.count("compiling for 2 pictures at once") == 1
    assert said.count("compiled, and drew") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[]), "no prompt"),
        (dict(prompts=None), "prompts is None"),
        (dict(prompts={"a": 1}), "give a string or a list of strings"),
        (dict(prompts=["a", 3]), "a prompt is 3"),
        (dict(prompts=" "), "a prompt is empty"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(seed=True), "seed is True"),
        (dict(seed=[1, -2]), "seed is -2"),
        (dict(seed=[1, 2, 3], num_images=2), r"it has 3 entries .at seed.*give one, or 1 or 2"),
        (dict(num_images=0), "num_images is 0"),
        (dict(num_images=2.0), "num_images is 2.0"),
        (dict(negative_prompt=3), "negative_prompt is 3"),
        (dict(negative_prompt=["a", "b"]), "it has 2 entries"),
        (dict(index=3), "index is 3"),
        (dict(index=[0.5]), "a place is 0.5"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(num_inference_steps=5), "say 'steps'"),
        (dict(guidanse=5), "did you mean 'guidance'"),
    ],
)
def test_a_wrong_argument_gets_one_clear_error(pipe, arguments, message):
    with pytest.raises(errors.ConfigError, match=message):
        pipe(**{"prompts": "a red circle", **arguments})


def test_what_a_family_does_not_draw_is_said(pipe):
    one = prompts.Request("a red circle", seed=0, count=2)
    with pytest.raises(
        errors.ConfigError, match=r"no prediction 'between'.*it has sample, img2img"
    ):
        prompts.draw_between(pipe, [one], 4)
    judge = pipeline.Predictor(shapes_clip.get_config("debug"))
    with pytest.raises(errors.ConfigError, match="'clip' has no prediction 'sample'"):
        judge.check("sample")
    with pytest.raises(errors.ConfigError, match="has no prediction 'smple'"):
        judge.check("smple")


def test_guidance_may_be_none_at_all(pipe):
    assert pipe(CAPTIONS, guidance=0, steps=1).shape == (2, 16, 16, 3)


def test_pictures_that_are_not_finite_are_an_error(pipe, monkeypatch):
    broken = lambda *args, **options: np.full((2, 16, 16, 3), np.nan, np.float32)
    monkeypatch.setattr(pipe.predictor, "run", broken)
    with pytest.raises(errors.DataError, match="not finite"):
        pipe(CAPTIONS, steps=2)


@pytest.mark.parametrize("shift", [0.0, 0, 1e-40, -1.0, 1e39, 10**400, float("nan")])
def test_a_shift_without_a_grid_is_refused_before_anything_is_compiled(pipe, monkeypatch, shift):
    monkeypatch.setattr(pipe.predictor, "_compiled", None)
    with pytest.raises(errors.ConfigError, match=r"shift is .* .at --shift.*number above 0"):
        pipe(CAPTIONS, shift=shift)


@pytest.mark.parametrize("options", [dict(guidance=1e39), dict(interval=(0.0, 1e39))])
def test_a_number_that_float32_does_not_hold_is_refused(pipe, options):
    with pytest.raises(errors.ConfigError, match="0 or more"):
        pipe.predictor.check("sample", **options)


def test_evaluate_writes_a_protocols_captions(tmp_path):
    path = tmp_path / "captions.txt"
    start("-m", "t2i_jax", "evaluate", "--protocol=shapes", "--num_images=5", f"--captions={path}")
    assert path.read_text().splitlines() == protocol.read("shapes", num_images=5).captions()


def test_pictures_are_not_compared_with_those_of_other_captions(tmp_path):
    """Behind a broken picture each would be compared with the next one's."""
    (tmp_path / "drawn").mkdir()
    for i in range(3):
        images.save(tmp_path / "drawn" / f"{i}.png", np.full((32, 32, 3), 80 * i, np.uint8))
    (tmp_path / "drawn" / "1.png").write_bytes(b"no picture")
    data = [{"source": "shapes", "split": "test", "size": 3}]
    ask = {"data": data, "num_images": 3, "metrics": {"psnr": {}}}
    (tmp_path / "own.json").write_text(json.dumps(ask))
    command = ["-m", "t2i_jax", "evaluate", f"--protocol={tmp_path}/own.json"]
    done = subprocess.run(
        [sys.executable, *command, f"--images={tmp_path}/drawn"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 65, done.stderr
    assert "1.png cannot be read" in done.stderr


def test_values_that_the_type_of_an_export_has_no_room_for_are_named(pipe, tmp_path):
    nets = {"model": {"params": {"scale": np.float32([1, 1e6])}}}
    with pytest.raises(errors.ConfigError, match="no room for values of model/params/scale"):
        weights.export(tmp_path / "new", nets, pipe.config, card="")
    assert not (tmp_path / "new").exists()


def test_a_model_may_be_named_by_a_path(run):
    assert pipeline.Pipeline.load(run).step == 6
