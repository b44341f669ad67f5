"""The shapes data set: what its pictures and captions promise."""

import itertools
import re
import sys

import numpy as np
import pytest

from t2i_jax import errors, plugins
from t2i_jax.data import shapes, shapes_tfds, tfds

GOLDEN = {
    "captions": [
        "a large yellow triangle on a white background",
        "a small orange triangle at the left on a grey background",
        "there is a large cyan triangle",
    ],
    "means": [
        [30.594, 17.135, 30.497],
        [250.628, 226.957, 226.957],
        [139.424, 132.057, 150.993],
    ],
}


def scenes(split, count=400):
    return [shapes.scene(split, 0, index) for index in range(count)]


def kinds(scene):
    return {(thing.colour, thing.shape) for thing in scene.objects}


def test_pictures_and_captions_stay_as_published():
    """Trained models and their judged numbers hang on these: change them with VERSION alone."""
    assert [shapes.make(split=split)[3]["caption"] for split in shapes.SPLITS] == GOLDEN["captions"]
    things = shapes.make(seed=1, res=24)
    means = [things[index]["image"].mean((0, 1)) for index in range(3)]
    np.testing.assert_allclose(means, GOLDEN["means"], atol=0.02)


def test_an_example_depends_on_seed_split_and_index_alone():
    def captions(**options):
        return shapes.make(size=8, **options).captions()

    first = shapes.make(size=8)
    np.random.seed(5)
    again = shapes.make(size=16)
    again[9]
    for index in reversed(range(8)):
        np.testing.assert_array_equal(again[index]["image"], first[index]["image"])
        assert again[index]["caption"] == first[index]["caption"] == first.captions()[index]
    assert first.captions() != captions(seed=1)
    assert first.captions() != captions(split="test")
    assert len(set(first.captions())) > 4


def test_the_scene_of_an_example_is_what_its_picture_shows():
    example = shapes.make(split="test", res=16)[5]
    drawn = shapes.render(shapes.scene("test", 0, 5), 16)
    np.testing.assert_array_equal(drawn, example["image"])


def test_held_out_pairs_are_kept_from_training():
    for split in ("train", "test"):
        assert not any(kinds(scene) & shapes.HELD_OUT for scene in scenes(split, 2000))
    assert all(kinds(scene) & shapes.HELD_OUT for scene in scenes("heldout"))
    assert sorted(colour for colour, _ in shapes.HELD_OUT) == sorted(shapes.COLOURS)
    seen = set().union(*map(kinds, scenes("train", 2000)))
    assert seen == set(itertools.product(shapes.COLOURS, shapes.SHAPES)) - shapes.HELD_OUT
    held_out_both_ways = [kinds(scene) <= shapes.HELD_OUT for scene in scenes("heldout")]
    assert 0.4 < np.mean(held_out_both_ways) < 0.7  # singles; beside it stands a seen pair


def test_objects_lie_apart_in_the_picture_and_relations_are_plain():
    pairs = [scene for scene in scenes("train") if scene.relation]
    assert {scene.relation for scene in pairs} == set(shapes.RELATIONS)
    for scene in pairs:
        first, second = scene.objects
        dx, dy = np.subtract(second.centre, first.centre)
        along, across = (dy, dx) if scene.relation in ("above", "below") else (dx, dy)
        assert (along > 0) == (scene.relation in ("above", "left of"))
        assert abs(along) > 1.4 * abs(across)
        covered = [
            shapes.coverage(thing.shape, thing.centre, shapes.SIZES[thing.size], 32) > 0
            for thing in scene.objects
        ]
        assert not np.logical_and(*covered).any()


def test_captions_say_as_much_as_promised():
    found = shapes.make(size=3000).captions()
    said = [shapes.parse(caption) for caption in found]
    singles = [scene.objects[0] for scene in said if not scene.relation]
    things = [thing for scene in said for thing in scene.objects]
    shares = {
        "pair": np.mean([len(scene.objects) == 2 for scene in said]),
        "size": np.mean([thing.size is not None for thing in things]),
        "place": np.mean([thing.cell is not None for thing in singles]),
        "ground": np.mean([scene.background is not None for scene in said]),
    }
    wanted = {"pair": 0.5, "size": 0.5, "place": 0.5, "ground": 0.7}
    assert shares == pytest.approx(wanted, abs=0.04)
    # all words are in BERT's vocabulary: word pieces are words and commas, with two special ones
    assert max(len(re.findall(r"\w+|,", caption)) for caption in found) <= 26


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_every_caption_is_parsed_back_to_its_scene(split):
    for index, caption in enumerate(shapes.make(split=split, size=1500).captions()):
        scene, said = shapes.scene(split, 0, index), shapes.parse(caption)
        assert said.relation == scene.relation
        assert said.background in (None, scene.background)
        for thing, words in zip(scene.objects, said.objects, strict=True):
            assert (words.colour, words.shape) == (thing.colour, thing.shape)
            assert words.size in (None, thing.size)
            assert words.cell in (None, thing.cell)
        words = f" {caption} "
        assert (said.background is not None) == ("background" in caption)
        assert (said.objects[0].cell is not None) == bool(re.search(" (at|in) the ", words))
        sizes = sum(words.count(f" {size} ") for size in shapes.SIZES)
        assert sizes == sum(thing.size is not None for thing in said.objects)


def test_a_caption_may_be_written_freely():
    said = shapes.parse("On a grey background,  a Large RING in yellow below an orange star.")
    ring = shapes.Object("yellow", "ring", "large")
    assert said == shapes.Scene((ring, shapes.Object("orange", "star")), "grey", "below")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog on the beach",
        "a red hexagon",
        "a teal circle",
        "a circle",
        "a red circle and a blue square",
        "a red circle above",
        "a red circle on a green background",
        "on a white background, a red circle on a black background",
        "a red circle, large",
    ],
)
def test_a_caption_of_another_world_is_an_error(caption):
    with pytest.raises(errors.ConfigError, match="not a caption of coloured shapes"):
        shapes.parse(caption)


def test_pictures_of_all_sizes_show_the_same():
    """Antialiasing: fewer pixels hold the means of more."""
    for shape, size in itertools.product(shapes.SHAPES, shapes.SIZES):
        scene = shapes.Scene((shapes.Object("blue", shape, size, 2, (0.013, -0.007)),), "white")
        fine = shapes.render(scene, 256).reshape(32, 8, 32, 8, 3).mean((1, 3))
        coarse = shapes.render(scene, 32)
        assert np.abs(coarse - fine).max() < 80  # the distance is the coverage but for corners
        assert np.abs(coarse - fine).mean() < 0.5


def test_shapes_have_their_size_and_place():
    for shape, size in itertools.product(shapes.SHAPES, shapes.SIZES):
        rows, columns = np.nonzero(
            shapes.coverage(shape, (0.4, 0.6), shapes.SIZES[size], 200) > 0.5
        )
        extent = max(np.ptp(rows), np.ptp(columns)) / 200
        assert extent == pytest.approx(shapes.SIZES[size], rel=0.15)
        assert (columns.min() + columns.max()) / 400 == pytest.approx(0.4, abs=0.01)
        assert (rows.min() + rows.max()) / 400 == pytest.approx(0.6, abs=0.025)


def test_colours_are_far_from_one_another_and_from_every_background():
    palette = [*shapes.COLOURS.values(), *shapes.BACKGROUNDS.values()]
    for one, other in itertools.combinations(palette, 2):
        assert np.linalg.norm(np.subtract(one, other)) > 80


def test_a_source_is_a_sequence_named_by_its_content():
    source = shapes.make(split="test", res=16, size=3)
    assert len(source) == 3
    assert len(list(source)) == 3
    image = source[np.int64(2)]["image"]
    assert (image.shape, image.dtype) == ((16, 16, 3), np.uint8)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]
    assert (len(shapes.make()), len(shapes.make(split="heldout"))) == (65_536, 4096)
    options = [{}, {"split": "test"}, {"res": 64}, {"size": 9}, {"seed": 1}]
    assert len({shapes.make(**o).fingerprint for o in options}) == len(options)
    assert shapes.make().fingerprint == shapes.make().fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tets"}, "did you mean 'test'"),
        ({"size": 0}, "size is 0"),
        ({"res": 4}, "a whole number, 8 or more"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        plugins.source({"source": "shapes", **options}, where="config.data")


def test_tfds_holds_every_example_as_it_is_drawn(tmp_path):
    config = shapes_tfds.Config(name="tiny", res=16, size=5, seed=2)
    builder = shapes_tfds.Shapes(config=config, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for split in shapes.SPLITS:
        wanted = {
            e["caption"]: e["image"] for e in shapes.make(split=split, res=16, size=5, seed=2)
        }
        stored = tfds.make("shapes/tiny", split=split, res=16, data_dir=str(tmp_path))
        examples = [stored[index] for index in range(len(stored))]
        assert {e["caption"] for e in examples} == set(wanted)
        for example in examples:
            np.testing.assert_array_equal(example["image"], wanted[example["caption"]])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("res", [32, 64, 128])
def test_tfds_has_a_configuration_per_resolution(tmp_path, res):
    builder = shapes_tfds.Shapes(config=f"res{res}", data_dir=tmp_path)
    assert builder.info.features["image"].shape == (res, res, 3)
    assert builder.info.full_name == f"shapes/res{res}/{shapes.VERSION}.0.0"
