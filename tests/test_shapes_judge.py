"""The shapes judge: sees what is there, and lets nothing else pass."""

import itertools

import numpy as np
import pytest

from t2i_jax import errors
from t2i_jax.data import shapes as world
from t2i_jax.evaluators import shapes

CAPTION = "a large red circle in the center on a white background"
PAIR = "a large red circle above a small blue square on a white background"
CIRCLE = world.Object("red", "circle", "large", 4)
SCENE = world.Scene((CIRCLE,), "white")
PAIR_SCENE = world.Scene(
    (CIRCLE._replace(cell=1), world.Object("blue", "square", "small", 7)), "white", "above"
)


def share(images, captions, name="full_match"):
    pairs = zip(images, captions, strict=True)
    return np.mean([shapes.judge(image, caption)[name] for image, caption in pairs])


def examples(count, res=32, splits=tuple(world.SPLITS)):
    found = [world.make(split=s, res=res, seed=7)[i] for s in splits for i in range(count)]
    return [e["image"] for e in found], [e["caption"] for e in found]


def blurred(image, sigma):
    reach = np.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2)
    weights = np.exp(-0.5 * (reach / sigma) ** 2)
    wide = np.pad(image.astype(float), [(-reach[0],) * 2] * 2 + [(0, 0)], mode="edge")
    for axis in (0, 1):
        wide = np.apply_along_axis(np.convolve, axis, wide, weights / weights.sum(), "valid")
    return wide.round().astype(np.uint8)


def noisy(image, std, seed=0):
    noise = np.random.default_rng(seed).normal(0, std, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def wrong(image, caption=CAPTION):
    return {name for name, right in shapes.judge(image, caption).items() if not right}


def drawn(covered, colour=world.COLOURS["red"], ground=(255, 255, 255)):
    """A picture of what `covered(x, y)` says, in radii of a large object from the middle."""
    grid = ((np.arange(256) + 0.5) / 256 - 0.5) / (world.SIZES["large"] / 2)
    inside = covered(*np.meshgrid(grid, grid)).reshape(32, 8, 32, 8).mean((1, 3))[..., None]
    return (inside * colour + (1 - inside) * ground).round().astype(np.uint8)


@pytest.mark.parametrize(("res", "count"), [(32, 100), (48, 20), (64, 40), (128, 10)])
def test_real_pictures_match_their_captions(res, count):
    assert share(*examples(count, res)) >= 0.99


def test_another_pictures_caption_hardly_ever_matches():
    images, captions = examples(100)
    assert share(images, captions[1:] + captions[:1]) < 0.03


@pytest.mark.parametrize("spoil", [lambda i: blurred(i, 1.0), lambda i: noisy(blurred(i, 0.7), 12)])
def test_slightly_soft_and_noisy_pictures_still_match(spoil):
    images, captions = examples(40)
    assert share(map(spoil, images), captions) >= 0.97


@pytest.mark.parametrize(
    ("spoil", "most"),
    [
        (lambda i: blurred(i, 2.0), 0.7),
        (lambda i: blurred(i, 4.0), 0.05),
        (lambda i: noisy(i, 80), 0.0),
    ],
)
def test_spoiled_pictures_do_not_match(spoil, most):
    images, captions = examples(40)
    assert share(map(spoil, images), captions) <= most


def test_only_what_the_caption_speaks_of_is_judged():
    image = world.render(SCENE, 32)
    assert shapes.judge(image, "a red circle") == dict(
        colour=True, shape=True, count=True, full_match=True
    )
    assert set(shapes.judge(image, CAPTION)) == {*shapes.ATTRIBUTES, "full_match"} - {"relation"}
    assert set(shapes.judge(world.render(PAIR_SCENE, 32), PAIR)) == {
        *shapes.ATTRIBUTES,
        "full_match",
    } - {"position"}


def test_a_reading_gives_the_centre_of_every_shape():
    for shape, size in itertools.product(world.SHAPES, world.SIZES):
        thing = world.Object("blue", shape, size, 3, (0.02, -0.01))
        (seen,) = shapes.read(world.render(world.Scene((thing,), "grey"), 32)).objects
        assert seen[:4] == thing[:4]
        assert seen.centre == pytest.approx(thing.centre, abs=0.01)


def changed(attribute):
    """(scene, caption): the caption is of a single object and wrong in that attribute alone."""
    kinds = itertools.product(world.COLOURS, world.SHAPES, world.SIZES, world.BACKGROUNDS)
    for number, (colour, shape, size, ground) in enumerate(kinds):
        thing = world.Object(colour, shape, size, number % 9)
        choices = dict(
            colour=world.COLOURS, shape=world.SHAPES, size=world.SIZES, background=world.BACKGROUNDS
        )[attribute]
        was = ground if attribute == "background" else getattr(thing, attribute)
        other = [choice for choice in choices if choice != was][number % (len(choices) - 1)]
        said = ground if attribute != "background" else other
        words = thing if attribute == "background" else thing._replace(**{attribute: other})
        caption = f"a {words.size} {words.shape} in {words.colour} on a {said} background"
        yield world.Scene((thing,), ground), caption


@pytest.mark.parametrize("attribute", ["colour", "shape", "size", "background"])
def test_one_wrong_attribute_is_caught_and_no_other(attribute):
    for scene, caption in changed(attribute):
        assert wrong(world.render(scene, 32), caption) == {attribute, "full_match"}, (
            scene,
            caption,
        )


def test_every_wrong_shape_is_caught_whatever_the_softness():
    for shape, size in itertools.product(world.SHAPES, world.SIZES):
        image = world.render(world.Scene((world.Object("green", shape, size, 4),), "white"), 32)
        soft = blurred(image, 0.8)
        right = {said for said in world.SHAPES if not wrong(soft, f"a green {said}")}
        assert right == {shape}


def test_every_wrong_place_is_caught():
    for cell, place in itertools.product(range(9), range(9)):
        image = world.render(world.Scene((CIRCLE._replace(cell=cell),), "black"), 32)
        caption = f"a red circle at the {world.POSITIONS[place]}"
        assert wrong(image, caption) == (set() if cell == place else {"position", "full_match"})


def test_every_wrong_relation_is_caught():
    cells = {"above": (1, 7), "below": (7, 1), "left of": (3, 5), "right of": (5, 3)}
    for relation, said in itertools.product(cells, cells):
        things = (
            world.Object(*kind, "small", cell)
            for kind, cell in zip(
                [("cyan", "star"), ("pink", "ring")], cells[relation], strict=True
            )
        )
        image = world.render(world.Scene(tuple(things), "black"), 32)
        caught = wrong(image, f"a cyan star {said} a pink ring")
        assert caught == (set() if said == relation else {"relation", "full_match"})


def test_objects_round_one_middle_stand_in_no_relation():
    ring = drawn(lambda x, y: abs(np.hypot(x, y) - 0.78) < 0.22)
    inner = drawn(lambda x, y: np.hypot(x, y) < 0.25, world.COLOURS["blue"])
    both = np.minimum(ring, inner)
    for relation in world.RELATIONS:
        assert wrong(both, f"a red ring {relation} a blue circle") == {"relation", "full_match"}


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (dict(objects=PAIR_SCENE.objects[::-1]), set()),  # only their order in the scene
        (
            dict(objects=PAIR_SCENE.objects[:1]),
            {*shapes.FIELDS, "relation", "count"} - {"position"},
        ),
        (dict(objects=()), {*shapes.FIELDS, "relation", "count"} - {"position"}),
        (dict(objects=(*PAIR_SCENE.objects, CIRCLE._replace(cell=3, size="small"))), {"count"}),
        (dict(objects=(*PAIR_SCENE.objects, PAIR_SCENE.objects[1]._replace(cell=8))), {"count"}),
    ],
)
def test_an_object_too_many_or_too_few_is_caught(change, caught):
    image = world.render(PAIR_SCENE._replace(**change), 32)
    assert wrong(image, PAIR) - {"full_match"} == caught


def test_attributes_of_two_objects_may_not_be_exchanged():
    first, second = PAIR_SCENE.objects
    for name in ("colour", "shape", "size"):
        things = (
            first._replace(**{name: getattr(second, name)}),
            second._replace(**{name: getattr(first, name)}),
        )
        assert name in wrong(world.render(PAIR_SCENE._replace(objects=things), 32), PAIR)


@pytest.mark.parametrize("rgb", [(110, 70, 30), (128, 128, 0), (0, 0, 0), (245, 190, 190)])
def test_a_colour_that_is_none_of_ours_is_not_taken_for_the_nearest(rgb):
    image = drawn(lambda x, y: np.hypot(x, y) < 1, rgb)
    for colour in world.COLOURS:
        assert wrong(image, f"a {colour} circle") == {"colour", "full_match"}


def test_an_object_of_two_colours_has_none():
    halves = world.render(SCENE, 32)
    halves[:, 16:] = world.render(world.Scene((CIRCLE._replace(colour="blue"),), "white"), 32)[
        :, 16:
    ]
    for colour in world.COLOURS:
        assert wrong(halves, f"a {colour} circle") == {"colour", "full_match"}


@pytest.mark.parametrize(
    "ground", [(255, 255, 120), (200, 200, 200), (80, 80, 80), (255, 190, 190)]
)
def test_a_background_that_is_none_of_ours_is_not_taken_for_the_nearest(ground):
    image = drawn(lambda x, y: np.hypot(x, y) < 1, world.COLOURS["blue"], ground)
    for said in world.BACKGROUNDS:
        assert wrong(image, f"a blue circle on a {said} background") == {"background", "full_match"}


SHAPES_OF_NONE = {
    "bar": lambda x, y: (abs(x) < 0.4) & (abs(y) < 1),
    "half a circle": lambda x, y: (np.hypot(x, y) < 1) & (y < 0),
    "a triangle upside down": lambda x, y: (2 * abs(x) + y < 1) & (y > -1),
    "an ellipse": lambda x, y: x**2 + (1.7 * y) ** 2 < 1,
    "a cross turned": lambda x, y: (
        (abs(x) + abs(y) < 1.4) & (np.minimum(abs(x + y), abs(x - y)) < 0.45)
    ),
    "a ring with a gap": lambda x, y: (abs(np.hypot(x, y) - 0.78) < 0.22) & (x < 0.5),
    "a thin ring": lambda x, y: abs(np.hypot(x, y) - 0.9) < 0.1,
    "a thick ring": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.35),
    "a square ring": lambda x, y: (lambda r: (r < 0.88) & (r > 0.45))(np.maximum(abs(x), abs(y))),
}


@pytest.mark.parametrize("name", SHAPES_OF_NONE)
def test_a_shape_that_is_none_of_ours_is_not_taken_for_the_nearest(name):
    image = drawn(SHAPES_OF_NONE[name])
    for shape in world.SHAPES:
        assert "shape" in wrong(image, f"a red {shape}")


def test_an_object_between_two_places_is_in_none():
    image = world.render(world.Scene((CIRCLE._replace(offset=(0.14, 0.0)),), "white"), 32)
    for place in world.POSITIONS:
        assert wrong(image, f"a red circle at the {place}") == {"position", "full_match"}


@pytest.mark.parametrize("radius", [0.4, 1.3])
def test_an_object_much_too_small_or_large_has_no_size(radius):
    image = drawn(lambda x, y: np.hypot(x, y) < radius)
    for size in world.SIZES:
        assert wrong(image, f"a {size} red circle") == {"size", "full_match"}


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_matches_nothing(value):
    image = np.full((32, 32, 3), value, np.uint8)
    assert wrong(image, "a red circle") == {"colour", "shape", "count", "full_match"}


def painter(change=lambda scene: scene):
    """A sampler that draws what captions say, after a change; what they leave open is fixed."""

    def sample(nets, captions, **options):
        sample.calls.append((nets, list(captions), options))
        return np.stack([paint(change(world.parse(caption))) for caption in captions])

    sample.calls = []
    return sample


def paint(said):
    cells = {"above": (1, 7), "below": (7, 1), "left of": (3, 5), "right of": (5, 3), None: (4,)}
    things = [
        thing._replace(size=thing.size or "large", cell=cell if thing.cell is None else thing.cell)
        for thing, cell in zip(said.objects, cells[said.relation], strict=True)
    ]
    return world.render(
        said._replace(objects=tuple(things), background=said.background or "grey"), 32
    )


def test_fragments_stand_in_no_relation():
    """Among many regions that are like nothing, some lie as any caption says."""
    rng = np.random.default_rng(0)
    image = np.full((32, 32, 3), 255, np.uint8)
    for y, x in rng.integers(2, 28, (14, 2)):
        image[y : y + 3, x : x + 2] = rng.integers(0, 120, (3, 2, 3))
    found = shapes.judge(image, PAIR)
    assert len(shapes.read(image).objects) > 3
    assert not any(found[name] for name in ("relation", "size", "full_match"))


def test_the_evaluator_reports_every_attribute_of_every_group():
    run = shapes.make({"sample": painter()}, num_images=61)
    result = run({}, 0)()
    assert result["num_images"] == 61.0
    names = {"full_match", *shapes.ATTRIBUTES}
    both = {f"{group}/{name}" for group in ("seen", "heldout") for name in names}
    single = {f"single/{name}" for name in names - {"relation"}}
    pair = {f"pair/{name}" for name in names - {"position"}}
    counts = {name: value for name, value in result.items() if "num_" in name}
    assert set(result) == {*counts, *names, *both, *single, *pair}
    assert {value for name, value in result.items() if name not in counts} == {1.0}
    captions = [t for s in ("test", "heldout") for t in world.make(split=s, size=31).captions()][
        :61
    ]
    spoken = sum(world.parse(caption).relation is not None for caption in captions)
    assert counts["num_relation"] == counts["pair/num_images"] == spoken
    assert counts["single/num_images"] == 61 - spoken
    assert not {"num_full_match", "num_count"} & set(counts)
    assert all(type(value) is float for value in result.values())


def test_the_evaluator_tells_groups_and_attributes_apart():
    def change(scene):
        if any((thing.colour, thing.shape) in world.HELD_OUT for thing in scene.objects):
            things = tuple(t._replace(shape="circle", colour="red") for t in scene.objects)
            return scene._replace(objects=things)
        opposite = {
            "above": "below",
            "below": "above",
            "left of": "right of",
            "right of": "left of",
        }
        return scene._replace(relation=opposite.get(scene.relation))

    result = shapes.make({"sample": painter(change)}, num_images=64)({}, 0)()
    assert (result["seen/shape"], result["seen/colour"], result["seen/background"]) == (1, 1, 1)
    assert result["seen/relation"] == 0
    assert result["heldout/shape"] < 0.3
    assert result["heldout/colour"] < 0.3
    assert result["heldout/full_match"] == result["pair/full_match"] == 0
    assert 0 < result["single/full_match"] < 1
    mean = (result["seen/full_match"] + result["heldout/full_match"]) / 2
    assert result["full_match"] == pytest.approx(mean)


def test_the_evaluator_asks_for_the_captions_of_its_splits():
    sample, nets = painter(), object()
    options = dict(num_images=4, batch_size=2, seed=3, sample=dict(guidance=2.0))
    shapes.make({"sample": sample}, **options)(nets, 10)
    shapes.make({"sample": sample}, **options, splits=["heldout"])(nets, 20)
    test, heldout = (world.make(split=s, size=4, seed=3).captions() for s in ("test", "heldout"))
    passed = dict(batch_size=2, seed=3, guidance=2.0)
    assert sample.calls == [(nets, [*test[:2], *heldout[:2]], passed), (nets, heldout, passed)]


@pytest.mark.parametrize(
    "options", [dict(splits=()), dict(num_images=1), dict(splits=("tets",)), dict(seed=-1)]
)
def test_the_evaluator_refuses_what_it_cannot_judge(options):
    with pytest.raises(errors.ConfigError):
        shapes.make({"sample": painter()}, **options)


def test_a_ground_that_is_a_colour_hides_no_other():
    """The line from the ground to a colour has no length there."""
    blue, red = (np.float32(world.COLOURS[name]) for name in ("blue", "red"))
    found, alpha_N = shapes._unmixed(np.stack([red - blue, 0 * blue]), blue)
    assert found == "red"
    np.testing.assert_allclose(alpha_N, [1, 0], atol=1e-6)
