"""Pictures on disk and the requests that make them."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax import errors, images, requests

DEFAULT = requests.Request(prompt="", seed=0)


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


def test_a_picture_and_its_settings_come_back(tmp_path):
    path = tmp_path / "a.png"
    images.save(path, picture(), metadata(), "a red circle\nSeed: 7")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture())
    assert images.read_metadata(path) == metadata()
    assert Image.open(path).text["parameters"].startswith("a red circle")
    request, model, _ = requests.from_picture(path)
    assert (request.prompt, request.seed, request.first, model) == (
        "a red circle",
        7,
        2,
        "builtin:shapes",
    )
    assert dict(request.options) == {"guidance": 3.0, "interval": (0.0, 1.0)}


def test_a_grid_holds_every_picture():
    n = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(5)])
    grid = images.grid(n, columns=3, gap=1)
    assert grid.shape == (9, 14, 3)
    assert set(np.unique(grid)) == {0, 1, 2, 3, 4, 255}


@pytest.mark.parametrize("settings", [None, {"seed": 1}, metadata(seed="7"), metadata(options=[])])
def test_a_picture_without_our_settings_says_so(tmp_path, settings):
    images.save(tmp_path / "a.png", picture(), settings)
    with pytest.raises(errors.DataError, match="no settings of ours"):
        requests.from_picture(tmp_path / "a.png")


def test_what_is_no_picture_says_so(tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(errors.DataError, match="cannot read it"):
        requests.from_picture(tmp_path / "a.png")


def test_metadata_stays_small_and_files_are_never_overwritten(tmp_path):
    long = metadata(prompt="x" * 9000)
    for _ in range(2):
        requests.save([(picture(), long | {"options": {}})], tmp_path, grid=True, metadata=True)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00000_s7.png", "00001_grid.png", "00002_s7.png", "00003_grid.png"]
    assert len(images.read_metadata(tmp_path / "00000_s7.png")["prompt"]) == 1024


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="choose --output_dir"):
        requests.save([(picture(), metadata())], tmp_path / "file" / "x", grid=False, metadata=True)


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
        requests.check(DEFAULT._replace(prompt="a circle")._replace(**change), "--prompt")


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    line = json.dumps({"prompt": "a star", "num_images": 2, "guidance": 1.5})
    path.write_text(f"# heading\n\na circle\na ring --n blue --d 5 --l 2.5 --s 9\n{line}\n")
    circle, ring, star = requests.read_file(path, DEFAULT._replace(options=(("steps", 4),)))
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
        requests.read_file(tmp_path / "p.txt", DEFAULT)


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(errors.ConfigError, match="UTF-8"):
        requests.read_file(tmp_path / "p.txt", DEFAULT)
