"""A judge that needs no network: reads coloured shapes out of a picture and compares them with a caption.

Classical vision: the ground is the median colour, objects are connected regions that differ from it, and
each is compared with every shape of the set drawn at its place (soft intersection over union).
"""

import functools
import itertools

import numpy as np

from t2i_jax.data import shapes

CONTRAST = 45.0  # RGB distance from the ground at which a pixel belongs to an object
MIN_AREA = 0.006  # share of the picture below which a region is a speck
MIN_OVERLAP = 0.6  # a region that fits no shape better than this has none
MIN_DISTANCE = 0.3  # between centres, as a share of the side, for a relation to hold
ATTRIBUTES = ("count", "colour", "shape", "size", "position", "relation", "background")


def read(image_HWC: np.ndarray) -> shapes.Scene:
    """What is in a picture, uint8 (res, res, 3): the background and every object, relation left out.

    An object that looks like no shape of the set has shape and size None.
    """
    pixels = image_HWC.astype(np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    regions = _regions(contrast > CONTRAST)
    objects = [
        _object(pixels, ground, contrast, region)
        for region in regions
        if region.sum() >= MIN_AREA * region.size
    ]
    return shapes.Scene(tuple(objects), _nearest(ground, shapes.BACKGROUNDS))


def judge(image_HWC: np.ndarray, caption: str) -> dict[str, float]:
    """Attribute -> share of what the caption says of it that the picture shows; `full_match` 0 or 1.

    Only attributes the caption speaks of are there. `count` is 1 where as many objects are there as said.
    """
    said, seen = shapes.parse(caption), read(image_HWC)
    orders = itertools.permutations([*seen.objects, *[None] * len(said.objects)], len(said.objects))
    found = max((_compare(said, order) for order in set(orders)), key=lambda f: sum(f.values()))
    found["count"] = float(len(seen.objects) == len(said.objects))
    if said.background:
        found["background"] = float(seen.background == said.background)
    return {**found, "full_match": float(all(value == 1 for value in found.values()))}


def make(
    predict, *, num_images: int = 512, batch_size: int = 64, seed: int = 0, splits=None, **options
):
    """The evaluator: draws captions of "test" (pairs seen in training) and "heldout", half each.

    Args:
      predict: name -> host function; "sample" draws uint8 pictures for captions.
      num_images: in all.
      splits: of the data set; both by default.
      options: for the sampler.
    Returns:
      run(nets, step) -> accuracy per attribute and `full_match`, over all, over "seen" and "heldout"
      captions, and over single objects and pairs.
    """
    splits = tuple(splits or ("test", "heldout"))
    captions, split_of = [], []
    for i, split in enumerate(splits):
        size = num_images // len(splits) + (i < num_images % len(splits))
        captions += [shapes.example_caption(split, seed, index) for index in range(size)]
        split_of += [{"test": "seen"}.get(split, split)] * size

    def run(nets, step) -> dict:
        images = predict["sample"](nets, captions, seed=seed, batch_size=batch_size, **options)
        judged = [judge(image, text) for image, text in zip(images, captions, strict=True)]
        kinds = ["pair" if shapes.parse(text).relation else "single" for text in captions]
        result = {"num_images": len(captions), **_means(judged, ("full_match", *ATTRIBUTES))}
        for labels in (split_of, kinds):
            for label in dict.fromkeys(labels):
                part = [f for f, of in zip(judged, labels, strict=True) if of == label]
                means = _means(part, ("full_match", *ATTRIBUTES))
                result |= {f"{label}/{name}": value for name, value in means.items()}
        return result

    return run


def _means(judged, names) -> dict[str, float]:
    values = {name: [f[name] for f in judged if name in f] for name in names}
    return {name: round(float(np.mean(v)), 4) for name, v in values.items() if v}


def _compare(said: shapes.Scene, objects) -> dict[str, float]:
    """Shares of what is said, with the i-th object said being objects[i] (None: it is not there)."""
    pairs = list(zip(said.objects, objects, strict=True))
    hits = {
        "colour": [b is not None and a.colour == b.colour for a, b in pairs],
        "shape": [b is not None and a.shape == b.shape for a, b in pairs],
        "size": [b is not None and a.size == b.size for a, b in pairs if a.size],
        "position": [b is not None and a.cell == b.cell for a, b in pairs if a.cell is not None],
    }
    found = {name: float(np.mean(values)) for name, values in hits.items() if values}
    if said.relation:
        found["relation"] = float(None not in objects and _relation(*objects) == said.relation)
    return found


def _relation(first: shapes.Object, second: shapes.Object) -> str | None:
    dx, dy = np.subtract(second.centre, first.centre)
    if max(abs(dx), abs(dy)) < MIN_DISTANCE:
        return None
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def _nearest(colour, palette) -> str:
    return min(palette, key=lambda name: np.linalg.norm(np.subtract(colour, palette[name])))


def _object(pixels, ground, contrast, region) -> shapes.Object:
    """Colour from the region's core; shape, size and centre from the best of all drawn shapes."""
    strong = region & (contrast >= 0.8 * np.quantile(contrast[region], 0.9))
    colour = pixels[strong].mean(0)
    direction = (colour - ground) / np.square(colour - ground).sum()
    alpha = np.clip((pixels - ground) @ direction, 0, 1) * _grown(region)
    res = len(alpha)
    grid = (np.arange(res) + 0.5) / res
    x, y = np.array([grid @ alpha.sum(0), grid @ alpha.sum(1)]) / alpha.sum()
    best = (MIN_OVERLAP, None, None, (x, y))
    for shape, size in itertools.product(shapes.SHAPES, shapes.SIZES):
        lift = _centroid(shape) * shapes.SIZES[size]
        drawn = shapes.coverage(shape, (x, y - lift), shapes.SIZES[size], res)
        overlap = np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum()
        best = max(best, (overlap, shape, size, (x, y - lift)), key=lambda b: b[0])
    _, shape, size, (x, y) = best
    row, column = (int(np.argmin(np.abs(np.subtract(shapes.CENTRES, v)))) for v in (y, x))
    offset = (x - shapes.CENTRES[column], y - shapes.CENTRES[row])
    name = _nearest(colour, shapes.COLOURS)
    return shapes.Object(name, shape, size, row * 3 + column, offset)


@functools.cache
def _centroid(shape: str) -> float:
    """How far a shape's centre of mass lies below its centre, in diameters."""
    drawn = shapes.coverage(shape, (0.5, 0.5), 0.8, 256)
    return float((((np.arange(256) + 0.5) / 256 - 0.5) @ drawn.sum(1)) / drawn.sum() / 0.8)


def _grown(mask):
    """The mask and its eight neighbours."""
    wide = np.pad(mask, 1)
    h, w = mask.shape
    shifts = [wide[i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.logical_or.reduce(shifts)


def _regions(mask) -> list[np.ndarray]:
    """Connected regions (eight neighbours) as masks."""
    left, found = mask.copy(), []
    while left.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(np.argmax(left), left.shape)] = True
        while True:
            grown = _grown(region) & left
            if (grown == region).all():
                break
            region = grown
        found.append(region)
        left &= ~region
    return found
