"""Pictures on disk and the requests that make them."""

import json
import shutil
import types

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from t2i_jax import errors, images, pipeline, weights
from t2i_jax.commands import prompts
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf
from t2i_jax.text import tokenize

DEFAULT = prompts.Request(prompt="", seed=0)


def picture(n=8):
    return np.arange(n * n * 3, dtype=np.uint8).reshape(n, n, 3)


def metadata(**changes):
    found = {
        "prompt": "a red circle",
        "negative_prompt": None,
        "seed": 7,
        "index": 2,
        "options": {"guidance": 3.0, "interval": [0.0, 1.0]},
        "model": "builtin:shapes",
    }
    return found | changes


def test_to_uint8_maps_the_range_and_clips():
    assert images.to_uint8([-1, 0, 1, 5, -9]).tolist() == [0, 128, 255, 255, 0]


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_a_picture_and_its_settings_come_back(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    settings = metadata(prompt='a "rötes" 圆 🔴')
    images.save(path, picture(), settings, 'a "rötes" 圆 🔴\nSeed: 7')
    if extension == "png":
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture())
    assert images.read_metadata(path) == settings
    recorded = prompts.from_picture(path)
    (request,) = recorded.requests
    assert (request.prompt, request.seed, request.first) == (settings["prompt"], 7, 2)
    assert (recorded.model, recorded.grid, recorded.frames) == ("builtin:shapes", False, 0)
    assert dict(request.options) == {"guidance": 3.0, "interval": (0.0, 1.0)}


def test_other_viewers_find_the_text_where_they_look(tmp_path):
    """PNG's "parameters"; EXIF's UserComment, which EXIF 2.3 (4.6.5, table 9) marks as UNICODE."""
    for extension in ("png", "jpg", "webp"):
        images.save(tmp_path / f"a.{extension}", picture(), metadata(), "a röd ring\nSeed: 7")
    assert Image.open(tmp_path / "a.png").text["parameters"] == "a röd ring\nSeed: 7"
    for name in ("a.jpg", "a.webp"):
        with Image.open(tmp_path / name) as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        assert comment[8:].decode("utf-16-be") == "a röd ring\nSeed: 7"


def drawn(*asked):
    """Pictures of (prompt, seed, index), as `prompts.draw` gives them."""
    value = lambda i: np.full((4, 4, 3), 10 * i % 256, np.uint8)
    make = lambda prompt, seed, index: metadata(prompt=prompt, seed=seed, index=index, step=None)
    return [(value(i), make(*one) | {"t2i_jax": "0"}) for i, one in enumerate(asked)]


def test_a_grid_is_a_row_for_each_prompt_and_holds_all_settings(tmp_path):
    asked = [("ring", 1, 0), ("ring", 1, 1), ("ring", 1, 2), ("star", 1, 0), ("ring", 5, 0)]
    *_, path = prompts.save(drawn(*asked), tmp_path, grid=True, metadata=True)
    grid = np.asarray(Image.open(path))[::24, ::24]  # 24 pixels a side for each of them
    assert grid.shape == (4 + 2 + 4, 4 * 4 + 3 * 2, 3)
    assert grid[0, ::6, 0].tolist() == [0, 10, 20, 40]  # of ring, whatever their seed
    assert grid[-1, ::6, 0].tolist() == [30, 255, 255, 255]
    recorded = prompts.from_picture(path)
    jobs = [(r.prompt, r.seed, r.first + k) for r in recorded.requests for k in range(r.count)]
    assert jobs == asked
    assert recorded.grid
    assert len(recorded.requests) == 3
    assert Image.open(path).text["parameters"].startswith("ring | star")


def test_a_grid_of_single_pictures_is_about_square(tmp_path):
    asked = [(f"prompt {i}", 0, 0) for i in range(5)]
    *_, path = prompts.save(drawn(*asked), tmp_path, grid=True, metadata=False)
    assert np.asarray(Image.open(path))[::32, ::32].shape == (2 * 4 + 2, 3 * 4 + 2 * 2, 3)
    assert images.read_metadata(path) is None


def test_settings_of_very_many_pictures_are_left_out_of_a_grid(tmp_path):
    asked = [(f"{i} " + "x" * 400, 0, 0) for i in range(100)]
    for extension in ("png", "jpg", "webp"):
        found = drawn(*asked)
        *_, path = prompts.save(found, tmp_path, grid=True, metadata=True, extension=extension)
        assert images.read_metadata(path)["model"] == "builtin:shapes"
        with pytest.raises(errors.DataError, match="no settings of ours"):
            prompts.from_picture(path)


def test_a_grid_holds_every_picture():
    n = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(5)])
    grid = images.grid(n, columns=3, gap=1)
    assert grid.shape == (9, 14, 3)
    assert set(np.unique(grid)) == {0, 1, 2, 3, 4, 255}


@pytest.mark.parametrize(
    "settings",
    [
        *(None, {"seed": 1}, metadata(seed="7"), metadata(options=[])),
        metadata(image={"name": "a.png", "sha256": [1]}),
        *(metadata(lora=x) for x in ({}, [3], [{"name": "a", "sha256": "b", "weight": "c"}])),
    ],
)
def test_a_picture_without_our_settings_says_so(tmp_path, settings):
    images.save(tmp_path / "a.png", picture(), settings)
    with pytest.raises(errors.DataError, match="no settings of ours"):
        prompts.from_picture(tmp_path / "a.png")


@pytest.mark.parametrize("index", [-1, 2**31, 2**40, 2**70])
def test_a_picture_of_a_number_that_cannot_be_says_so(tmp_path, index):
    images.save(tmp_path / "a.png", picture(), metadata(index=index))
    with pytest.raises(errors.DataError, match="out of bounds"):
        prompts.from_picture(tmp_path / "a.png")


def test_what_is_no_picture_says_so(tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(errors.DataError, match="cannot read it"):
        prompts.from_picture(tmp_path / "a.png")


def test_metadata_stays_small_and_files_are_never_overwritten(tmp_path):
    long = metadata(prompt="x" * 9000)
    for _ in range(2):
        prompts.save([(picture(), long | {"options": {}})], tmp_path, grid=True, metadata=True)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00000_s7.png", "00001_grid.png", "00002_s7.png", "00003_grid.png"]
    for name in names[:2]:
        (request,) = prompts.from_picture(tmp_path / name).requests
        assert request.prompt == "x" * 9000
    assert prompts.PROMPT_KEPT == tokenize.CHARACTERS


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(errors.StorageError, match="choose another --output_dir"):
            prompts.save([(picture(), metadata())], folder, grid=False, metadata=True)
        with pytest.raises(errors.StorageError, match=r"is a file.*choose another --output_dir"):
            images.check_folder(folder, "--output_dir")
    images.check_folder(tmp_path / "new" / "folder", "--output_dir")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "empty"),
        ({"prompt": "x" * 1_000_000}, "1,000,000 characters"),
        ({"prompt": "a \udcff circle"}, "not valid Unicode"),
        ({"prompt": 3}, "give a string"),
        ({"negative_prompt": "\ud800"}, "not valid Unicode"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"count": 0}, "num_images is 0"),
    ],
)
def test_bad_requests_are_refused(change, message):
    with pytest.raises(errors.ConfigError, match=message):
        prompts.check(DEFAULT._replace(prompt="a circle")._replace(**change), "--prompt")


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    line = json.dumps({"prompt": "a star", "num_images": 2, "guidance": 1.5})
    path.write_text(f"# heading\n\na circle\na ring --n blue --d 5 --l 2.5 --s 9\n{line}\n")
    circle, ring, star = prompts.read_file(path, DEFAULT._replace(options=(("steps", 4),)))
    assert circle == DEFAULT._replace(prompt="a circle", options=(("steps", 4),))
    assert (ring.prompt, ring.negative_prompt, ring.seed) == ("a ring", "blue", 5)
    assert dict(ring.options) == {"guidance": 2.5, "steps": 9}
    assert (star.count, dict(star.options)) == (2, {"guidance": 1.5, "steps": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt in the file"),
        ("a circle --q 3", "unknown option --q"),
        ("a circle --d five", "--d is 'five'"),
        ('{"prompt": ', "not a JSON object"),
        ('{"prompt": "x", "seed": -4}', "seed is -4"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, text, message):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(errors.ConfigError, match=message):
        prompts.read_file(tmp_path / "p.txt", DEFAULT)


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(errors.ConfigError, match="UTF-8"):
        prompts.read_file(tmp_path / "p.txt", DEFAULT)


@pytest.mark.parametrize(("shape", "factor"), [((134, 134), 4), ((66, 512), 1), ((700, 9), 1)])
def test_small_pictures_are_enlarged_by_whole_pixels(shape, factor):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = images.enlarged(image)
    assert found.shape == (shape[0] * factor, shape[1] * factor, 3)
    np.testing.assert_array_equal(found[::factor, ::factor], image)
    np.testing.assert_array_equal(found[factor - 1 :: factor, factor - 1 :: factor], image)


def test_a_grid_holds_pictures_of_several_sizes_and_cut_prompts(tmp_path):
    value = lambda *shape: np.zeros((*shape, 3), np.uint8)
    found = drawn(("long", 0, 0), ("short", 0, 0))
    (_, cut), (_, whole) = found
    pictures = [(value(4, 8), cut | {"cut": "r"}), (value(6, 4), whole)]
    *_, path = prompts.save(pictures, tmp_path, grid=True, metadata=True)
    assert np.asarray(Image.open(path)).shape[1] >= 2 * 8 + 2
    assert [r.prompt for r in prompts.from_picture(path).requests] == ["long", "short"]
    assert "Size: 8x4" in Image.open(sorted(tmp_path.glob("*_s0.png"))[0]).text["parameters"]


def test_a_grid_that_a_format_has_no_room_for_is_a_png(tmp_path):
    many = [
        (np.zeros((600, 600, 3), np.uint8), info)
        for _, info in drawn(*[("x", 0, i) for i in range(28)])
    ]
    *_, path = prompts.save(many, tmp_path, grid=True, metadata=False, extension="webp")
    assert path.suffix == ".png"


@pytest.mark.parametrize(
    "prompt",
    [
        "a red star",
        "#1 dad mug",
        "a\ncat",
        " edge ",
        "a --n b",
        "a\t--d 3",
        '{"a"}',
        "a\u2028b",
    ],
)
def test_a_written_line_is_read_as_the_prompt(prompt, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(prompts.line(prompt) + "\n", encoding="utf-8")
    (request,) = prompts.read_file(path, prompts.Request(prompt="", seed=0, count=1))
    assert request.prompt == prompt


def adapter(name, sha256, weight):
    return {"name": name, "sha256": sha256, "weight": weight}


def test_another_adapter_does_not_make_the_picture_again(tmp_path):
    images.save(tmp_path / "a.png", picture(), metadata(lora=[adapter("x.safetensors", "ab", 0.8)]))
    recorded = prompts.from_picture(tmp_path / "a.png")
    prompts.check_adapters(recorded, [adapter("renamed.safetensors", "ab", 0.8)])
    for given in ([], [adapter("x", "ab", 1.0)], [adapter("x", "cd", 0.8)]):
        with pytest.raises(errors.ConfigError, match=r"--lora=x\.safetensors:0\.8"):
            prompts.check_adapters(recorded, given)


@pytest.fixture
def told(monkeypatch):
    """Warnings about a picture that is drawn again."""
    found = []
    monkeypatch.setattr(prompts.logging, "warning", lambda text, *a: found.append(text % a))
    return found


def test_another_model_is_told_of(tmp_path, told):
    images.save(tmp_path / "a.png", picture(), metadata())
    recorded = prompts.from_picture(tmp_path / "a.png")
    pipe = types.SimpleNamespace(source="builtin:shapes", adapters=())
    prompts.check_model(recorded, pipe)
    assert not told
    prompts.check_model(recorded, types.SimpleNamespace(source="runs/other", adapters=()))
    assert "drawn with builtin:shapes, and this is other" in told[0]


def test_nets_from_elsewhere_are_recorded_and_asked_for(tmp_path, told):
    """By what their files hold: their names and places say nothing."""
    (tmp_path / "secret").mkdir()
    for name in ("secret/vae", "moved"):
        shutil.copytree(folders.TINY / "vae", tmp_path / name)
    drawer = pipeline.Pipeline.load(str(folders.TINY), load={"vae": str(tmp_path / "secret/vae")})
    request = prompts.Request("a circle", 0, options=(("steps", 1),))
    drawn = prompts.draw(drawer, [request], batch_size=1)
    (path,) = prompts.save(drawn, tmp_path / "out", grid=False, metadata=True)
    recorded = prompts.from_picture(path)
    assert [(one["net"], one["name"]) for one in recorded.load] == [("vae", "vae")]
    assert "secret" not in json.dumps(images.read_metadata(path))

    def again(vae):
        config = weights.config_at(str(folders.TINY))
        weights.override(config, {"vae": vae} if vae else {})
        return types.SimpleNamespace(source=str(folders.TINY), adapters=(), config=config)

    moved = tmp_path / "moved"
    prompts.check_model(recorded, again(str(moved)))
    stored = safetensors.numpy.load_file(moved / hf.DIFFUSION)
    safetensors.numpy.save_file({k: x + 1 for k, x in stored.items()}, moved / hf.DIFFUSION)
    for other in (str(moved), ""):
        with pytest.raises(errors.ConfigError, match=r"other nets.*give --load=vae=vae of then"):
            prompts.check_model(recorded, again(other))
    assert not told
    prompts.check_model(recorded._replace(load=()), again(str(moved)))
    assert "the picture names none" in told[0]


def test_a_name_that_is_no_utf8_can_be_recorded(tmp_path):
    images.save(
        tmp_path / "a.png", picture(), metadata(image={"name": "\udcff.png", "sha256": "a"})
    )
    assert images.read_metadata(tmp_path / "a.png")["image"]["name"] == "\udcff.png"
