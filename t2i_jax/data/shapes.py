"""Coloured shapes with captions: a small world in which every word of a caption can be checked.

An image shows one or two objects of 8 colours × 6 shapes × 2 sizes × 9 places on 3 backgrounds. Two
objects stand in a relation. Images are computed from signed distances, so edges are equally soft at
any resolution. An example depends on (seed, split, index) alone.
"""

import hashlib
import re
from typing import Annotated, NamedTuple

import numpy as np

from t2i_jax import errors, fields
from t2i_jax.text import words

VERSION = 1  # of images and captions, part of the fingerprint
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "yellow": (245, 215, 30),
    "orange": (250, 130, 20),
    "purple": (130, 40, 160),
    "pink": (255, 140, 190),
    "cyan": (40, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.26, "large": 0.40}  # diameter, as a share of the image's side
CENTRES = (0.22, 0.5, 0.78)  # of the three rows and columns, as shares of the side
JITTER = 0.02  # largest offset from a centre, as a share of the side
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)  # row by row
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUNDS = {"white": (255, 255, 255), "black": (10, 10, 10), "grey": (150, 150, 150)}
HELD_OUT = frozenset(
    {
        *(("red", "triangle"), ("green", "ring"), ("blue", "star"), ("yellow", "square")),
        *(("orange", "circle"), ("purple", "cross"), ("pink", "star"), ("cyan", "triangle")),
    }
)  # pairs of colour and shape that training never shows
SPLITS = {"train": 65_536, "test": 4096, "heldout": 4096}


class Object(NamedTuple):
    """One object. Size and cell are None where a caption does not say them."""

    colour: str
    shape: str
    size: str | None = None
    cell: int | None = None  # 0 … 8, row by row
    offset: tuple[float, float] = (0.0, 0.0)  # of the centre, as a share of the side

    @property
    def centre(self) -> tuple[float, float]:
        """x and y as shares of the image's side."""
        return (
            CENTRES[self.cell % 3] + self.offset[0],
            CENTRES[self.cell // 3] + self.offset[1],
        )


class Scene(NamedTuple):
    """The content of an image, or of a caption. A field that it does not say is None."""

    objects: tuple[Object, ...]
    background: str | None = None
    relation: str | None = None  # of the first object to the second


def scene(split: str, seed: int, index: int) -> Scene:
    """The scene of an example."""
    return _scene(_generator(split, seed, index), split)


def _generator(split, seed, index):
    # A counter-based generator: any example is drawn without those before it. The key holds 64 bits
    # for the seed, 16 for the split and 48 for the index.
    key = [seed, (list(SPLITS).index(split) << 48) + index]
    # With its type, as numpy makes float64 of a list that has one number above 2⁶³.
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def _scene(rng, split) -> Scene:
    # The order of draws is part of VERSION: another order would draw other scenes.
    background = _pick(rng, tuple(BACKGROUNDS))
    kinds, cells, relation = [_pair(rng, held_out=split == "heldout")], [int(rng.integers(9))], None
    if rng.random() < 0.5:
        # Before or behind: in "heldout" the held-out pair can be either object.
        kinds.insert(int(rng.integers(2)), _pair(rng, held_out=False))
        cells, relation = _related_cells(rng)
    sizes = [_pick(rng, tuple(SIZES)) for _ in kinds]
    offsets = [tuple(np.round(rng.uniform(-JITTER, JITTER, 2), 4).tolist()) for _ in kinds]
    objects = tuple(
        Object(colour, shape, size, cell, offset)
        for (colour, shape), size, cell, offset in zip(kinds, sizes, cells, offsets, strict=True)
    )
    return Scene(objects, background, relation)


def _pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def _pair(rng, *, held_out: bool):
    if held_out:
        # Sorted, as the order of a set of strings changes from process to process.
        return _pick(rng, sorted(HELD_OUT))
    # Drawing again keeps all other pairs equally likely.
    while (pair := (_pick(rng, tuple(COLOURS)), _pick(rng, SHAPES))) in HELD_OUT:
        pass
    return pair


def _related_cells(rng):
    """Two cells and the relation of the first to the second.

    They are two cells apart along the relation's axis and at most one across it. So the relation is
    never in doubt, and nothing overlaps.
    """
    relation = _pick(rng, RELATIONS)
    along = (0, 2) if relation in ("above", "left of") else (2, 0)
    while abs(np.subtract(*(across := rng.integers(3, size=2)))) > 1:
        pass
    pairs = zip(along, across.tolist(), strict=True)
    if relation in ("above", "below"):
        return [row * 3 + column for row, column in pairs], relation
    return [row * 3 + column for column, row in pairs], relation


# ---- Images ----


def render(scene: Scene, res: int) -> np.ndarray:
    """Draws a scene.   -> uint8 (res, res, 3)"""
    image = np.empty((res, res, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        alpha = coverage(thing.shape, thing.centre, SIZES[thing.size], res)[..., None]
        image += alpha * (np.array(COLOURS[thing.colour], np.float32) - image)
    return np.round(image).astype(np.uint8)


def coverage(shape: str, centre, diameter: float, res: int) -> np.ndarray:
    """The share of each pixel that a shape covers.   -> float32 (res, res) in [0, 1]

    Args:
      shape: one of SHAPES.
      centre, diameter: as shares of the image's side.
      res: pixels a side.
    """
    grid = (np.arange(res, dtype=np.float32) + 0.5) / res
    x, y = np.meshgrid(grid - centre[0], grid - centre[1])
    # In pixels: the share falls from 1 to 0 within half a pixel on both sides of the edge.
    return np.clip(0.5 - _DISTANCES[shape](x, y, diameter / 2) * res, 0, 1)


# Each takes coordinates from the centre and a radius, and gives the signed distance to the edge,
# negative inside. Some are distances to the nearest line alone, which is exact near an edge.


def _circle(x, y, r):
    return np.sqrt(x * x + y * y) - r


def _square(x, y, r):
    return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r


def _triangle(x, y, r):
    # The normal (2, −1) of a side has the length √5.
    side = (2 * np.abs(x) - y - r) / np.sqrt(5, dtype=np.float32)  # as high as wide, the tip up
    return np.maximum(side, np.abs(y) - r)


def _star(x, y, r):
    """Five points, one of them up."""
    # Folding the plane into half a sector leaves one edge, from a tip to the next inner corner.
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, -y)  # 0 at the upper point
    angle = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.sqrt(x * x + y * y)
    tip = np.array([1.1 * r, 0.0])
    edge = 0.5 * r * np.array([np.cos(sector / 2), np.sin(sector / 2)]) - tip
    outward = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    across = (radius * np.cos(angle) - tip[0]) * outward[0]
    return (across + radius * np.sin(angle) * outward[1]).astype(np.float32)


def _cross(x, y, r):
    x, y = np.abs(x), np.abs(y)
    # Of signed distances the minimum is a union and the maximum an intersection: two bars.
    return np.minimum(np.maximum(x - r, y - r / 3), np.maximum(x - r / 3, y - r))


def _ring(x, y, r):
    # The edges lie at r and at 0.56 r.
    return np.abs(np.sqrt(x * x + y * y) - 0.78 * r) - 0.22 * r


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}

# ---- Captions ----

_PLACES = {p: f"in the {p} corner" if " " in p else f"at the {p}" for p in POSITIONS}
_PLACES["center"] = "in the center"
_LINKS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}


def caption(scene: Scene, rng) -> str:
    """A natural caption of a scene.

    It always says colours, shapes and relation. It says each size in half of the cases, the place
    of a single object in half, and the background in 70 %.
    """
    things = []
    for thing in scene.objects:
        size = thing.size if rng.random() < 0.5 else None
        things.append(_noun(rng, thing._replace(size=size)))
    if scene.relation:
        text = f"{things[0]} {_pick(rng, _LINKS[scene.relation])} {things[1]}"
    else:
        place = _PLACES[POSITIONS[scene.objects[0].cell]]
        text = f"{things[0]} {place}" if rng.random() < 0.5 else things[0]
    opening = rng.random()
    if opening < 0.15:
        text = f"a picture of {text}"
    elif opening < 0.3 and not scene.relation:
        text = f"there is {text}"
    if rng.random() < 0.7:
        ground = f"{_article(scene.background)} {scene.background} background"
        text = f"{text} on {ground}" if rng.random() < 0.75 else f"on {ground}, {text}"
    return text


def _noun(rng, thing: Object) -> str:
    if thing.size and rng.random() < 0.15:
        return f"{_article(thing.size)} {thing.size} {thing.shape} in {thing.colour}"
    words = [thing.size, thing.colour, thing.shape] if thing.size else [thing.colour, thing.shape]
    return f"{_article(words[0])} {' '.join(words)}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# The grammar of `caption` as one regular expression. {0} is the number of the object.
_NOUN = (
    rf"an? (?:(?P<size{{0}}>{'|'.join(SIZES)}) )?"
    # A name may occur once in an expression, hence colour and colour_.
    rf"(?:(?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})"
    rf"|(?P<shape_{{0}}>{'|'.join(SHAPES)}) in (?P<colour_{{0}}>{'|'.join(COLOURS)}))"
)
_WORDS = {phrase: relation for relation, phrases in _LINKS.items() for phrase in phrases}
_GROUND = rf"on an? (?P<{{}}>{'|'.join(BACKGROUNDS)}) background"
_GRAMMAR = re.compile(
    rf"(?:{_GROUND.format('ground1')},? )?(?:a picture of |there is )?{_NOUN.format(1)}"
    rf"(?: (?P<link>{'|'.join(sorted(_WORDS, key=len, reverse=True))}) {_NOUN.format(2)}"
    rf"| (?:at|in) the (?P<place>{'|'.join(sorted(POSITIONS, key=len, reverse=True))})"
    r"(?: corner)?)?"
    rf"(?:,? {_GROUND.format('ground2')})?\.?"
)


def parse(caption: str) -> Scene:
    """The scene that a caption describes, with None for what it does not say.

    It is the inverse of `caption`, without regard to case and white space.

    Raises:
      ConfigError: the caption does not follow the grammar of `caption`.
    """
    match = _GRAMMAR.fullmatch(" ".join(caption.lower().split()))
    if not match or (match["ground1"] and match["ground2"]):
        raise errors.ConfigError(
            "not a caption of coloured shapes",
            where=f"caption {caption[:80]!r}",
            fix='write for example "a small red circle above a blue square on a white background"',
        )
    said = match.groupdict()
    objects = [
        Object(
            said[f"colour{n}"] or said[f"colour_{n}"],
            said[f"shape{n}"] or said[f"shape_{n}"],
            said[f"size{n}"],
        )
        for n in ("1", "2")
        if said[f"shape{n}"] or said[f"shape_{n}"]
    ]
    if said["place"]:
        objects[0] = objects[0]._replace(cell=POSITIONS.index(said["place"]))
    relation = _WORDS[said["link"]] if said["link"] else None
    return Scene(tuple(objects), said["ground1"] or said["ground2"], relation)


# ---- The source ----


class Source:
    """Examples {"image": uint8 (res, res, 3), "caption": str}, drawn on access."""

    def __init__(self, split: str, res: int, size: int, seed: int):
        self._split, self._res, self._size, self._seed = split, res, size, seed
        name = f"shapes v{VERSION} {split} {res} {size} {seed}"
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict:
        # A loop over the source, as in `shapes_tfds`, ends by this error alone.
        if not 0 <= index < self._size:
            raise IndexError(index)
        drawn, text = self._example(index)
        return {"image": render(drawn, self._res), "caption": text}

    def captions(self) -> list[str]:
        """All captions. No image is drawn."""
        return [self._example(index)[1] for index in range(self._size)]

    def words(self) -> set[str]:
        """All words of the captions. A few hundred captions hold each of them."""
        return {w for i in range(min(self._size, 2048)) for w in words.of(self._example(i)[1])}

    def _example(self, index) -> tuple[Scene, str]:
        rng = _generator(self._split, self._seed, int(index))
        # The scene is drawn first, so that `scene` finds it without the caption's draws.
        drawn = _scene(rng, self._split)
        return drawn, caption(drawn, rng)


def make(
    *,
    split: Annotated[str, fields.one_of(SPLITS)] = "train",
    res: Annotated[int, fields.at_least(8)] = 32,
    size: Annotated[int | None, fields.at_least(1)] = None,
    seed: Annotated[int, fields.between(0, 2**64 - 1)] = 0,
) -> Source:
    """The data set of coloured shapes.

    Args:
      split: "train", "test" or "heldout". "test" has the same pairs of colour and shape as "train".
        In "heldout" one object has a pair that training never shows.
      res: pixels a side, at least 8.
      size: number of examples, by default 65,536 in "train" and 4,096 in the others.
      seed: each seed gives another data set.
    Raises:
      ConfigError: an unknown split, or a number out of range.
    """
    size = SPLITS[split] if size is None else size
    return Source(split, res, size, seed)
