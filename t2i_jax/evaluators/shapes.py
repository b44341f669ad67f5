"""A judge without a network: reads coloured shapes from images and checks the captions.

The ground is the median colour. Objects are connected regions that differ from it. The colour of a
region is the one whose mixtures with the ground explain its pixels best. Its shape is the one that
correlates best with that mixture, drawn at the same place, as large and as soft.

H W pixels · C channels · N pixels of a region · K colours · S shapes
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from t2i_jax import errors, fields
from t2i_jax.data import shapes

CONTRAST = 45.0  # RGB distance from the ground at which a pixel belongs to an object
MIN_AREA = 0.006  # share of the image; a smaller region is a speck
MAX_MISFIT = 45.0  # largest RGB distance from the best mixture, or from a known background
MIN_ALPHA = 0.5  # a colour must have this share in some pixels of the region
MIN_MATCH = 0.95  # least correlation with the best shape; clear images reach 0.99
BLURS = 2  # largest number of blurs (0.7 pixels each) under which a shape still counts
MAX_RATIO = 1.25  # largest ratio of a diameter to a size's; half way between two sizes is 1.24
MAX_OFFSET = 0.11  # largest offset from the centre of a cell, as a share of the side
MIN_DISTANCE = 0.15  # least distance of two centres in a relation, as a share of the side
FIELDS = {"colour": "colour", "shape": "shape", "size": "size", "position": "cell"}
ATTRIBUTES = (*FIELDS, "relation", "background", "count")
# Captions decide which of them there are, so the rest is left to the first evaluation.
NAMES = ("full_match", *ATTRIBUTES, "num_images", *(f"num_{name}" for name in ATTRIBUTES))
NAMES += tuple(
    f"{group}/{name}" for group in ("seen", "heldout", "single", "pair") for name in NAMES
)


class Seen(NamedTuple):
    """An object in an image. A field is None where the object is like nothing in the data set."""

    colour: str | None
    shape: str | None
    size: str | None
    cell: int | None  # 0 … 8, row by row
    centre: tuple[float, float]  # x, y as shares of the image's side


class Reading(NamedTuple):
    """The content of an image."""

    objects: tuple[Seen, ...]
    background: str | None


def read(image_HWC: np.ndarray) -> Reading:
    """Reads the background and every object from a square uint8 RGB image."""
    pixels_HWC = image_HWC.astype(np.float32)
    ground_C = np.median(pixels_HWC.reshape(-1, 3), axis=0)
    from_ground_HWC = pixels_HWC - ground_C
    regions = _regions(np.linalg.norm(from_ground_HWC, axis=-1) > CONTRAST)
    seen = [_object(from_ground_HWC, ground_C, region_HW) for region_HW in regions]
    misfit = {n: np.linalg.norm(ground_C - rgb) for n, rgb in shapes.BACKGROUNDS.items()}
    background = min(misfit, key=misfit.get)
    return Reading(tuple(seen), background if misfit[background] <= MAX_MISFIT else None)


def judge(image_HWC: np.ndarray, caption: str) -> dict[str, bool]:
    """Attribute -> whether the image shows what the caption says. Others are left out.

    An attribute of two objects must be right for both. `count` fails for an object too many or too
    few. `full_match` is True if all attributes are right.

    Raises:
      ConfigError: the caption is not of coloured shapes.
    """
    said, seen = shapes.parse(caption), read(image_HWC)
    number = len(said.objects)
    # Objects have no order. The assignment with the most right attributes counts.
    # The Nones stand for objects that are missing.
    orders = itertools.permutations([*seen.objects, *[None] * number], number)
    hits = max((_hits(said, order) for order in orders), key=lambda hits: sum(h for _, h in hits))
    hits += [("count", len(seen.objects) == number)]
    if said.background:
        hits += [("background", seen.background == said.background)]
    right = {name: all(hit for n, hit in hits if n == name) for name, _ in hits}
    return {**right, "full_match": all(right.values())}


def make(
    predict,
    *,
    num_images: fields.Size = 512,
    batch_size: fields.Size = 64,
    seed: fields.Seed = 0,
    splits=("test", "heldout"),
    sample=None,
):
    """The evaluator of coloured shapes. It draws equally many captions of each split.

    Args:
      predict: name -> host function; "sample" draws uint8 images for captions.
      num_images: in all.
      batch_size: images drawn together.
      seed: of the captions and the noise.
      splits: of the data set. "test" has the pairs of colour and shape of the training.
      sample: options of the sampler, by default the model's own.
    Returns:
      run(nets, step) -> a function that gives these metrics:

        - <attribute> and "full_match": the share of right images.
        - "num_images", and "num_<attribute>" where not all captions mention the attribute.
        - The same with the prefixes "seen/", "heldout/", "single/" and "pair/", over these
          captions alone.
    Raises:
      ConfigError: fewer images than splits, or an unknown split.
    """
    splits = tuple(splits)
    if not splits or num_images < len(splits):
        raise errors.ConfigError(
            f"{num_images} images of splits {list(splits)}",
            where="evaluator shapes",
            fix="judge one picture of a split at least",
        )
    captions = []
    for place, split in enumerate(splits):
        # Where the number does not divide, the first splits have one more.
        size = len(range(place, num_images, len(splits)))
        options = dict(split=split, size=size, seed=seed)
        captions += fields.build(shapes.make, options, where="evaluator shapes").captions()

    def run(nets, step):
        images = predict["sample"](
            nets, captions, seed=seed, batch_size=batch_size, **(sample or {})
        )
        return lambda: shares(
            [judge(image, text) for image, text in zip(images, captions, strict=True)], captions
        )

    run.names = NAMES
    return run


def shares(results, captions) -> dict[str, float]:
    """The metrics of `make`, from the results of `judge` and the captions of the images."""
    groups: dict[str, list] = {}
    for judged, text in zip(results, captions, strict=True):
        said = shapes.parse(text)
        pairs = {(thing.colour, thing.shape) for thing in said.objects}
        groups.setdefault("heldout" if pairs & shapes.HELD_OUT else "seen", []).append(judged)
        groups.setdefault("pair" if said.relation else "single", []).append(judged)
    result = _shares(results)
    for group, part in sorted(groups.items()):
        result |= {f"{group}/{name}": value for name, value in _shares(part).items()}
    return result


def _shares(results) -> dict[str, float]:
    values = {name: [r[name] for r in results if name in r] for name in ATTRIBUTES}
    values = {"full_match": [r["full_match"] for r in results], **values}
    result = {"num_images": float(len(results))}
    for name, right in values.items():
        if right:
            result[name] = float(np.mean(right))
            if len(right) < len(results):
                result[f"num_{name}"] = float(len(right))
    return result


def _hits(said: shapes.Scene, objects) -> list[tuple[str, bool]]:
    """(attribute, whether it is right) of everything said. An object that is missing is None."""
    hits = [
        (name, _shows(seen, name, field) == getattr(wanted, field))
        for wanted, seen in zip(said.objects, objects, strict=True)
        for name, field in FIELDS.items()
        if getattr(wanted, field) is not None
    ]
    if said.relation:
        clear = all(map(_is_clear, objects))
        hits += [("relation", clear and _relation(*objects) == said.relation)]
    return hits


def _is_clear(seen: Seen | None) -> bool:
    """Whether an object has one of our colours and one of our shapes.

    Size, place and relation count for these alone. A noisy image has fragments everywhere, so some
    of them would lie as any caption says.
    """
    return seen is not None and None not in (seen.colour, seen.shape)


def _shows(seen: Seen | None, name: str, field: str):
    """The value of an attribute of an object, or None."""
    counts = seen is not None if name in ("colour", "shape") else _is_clear(seen)
    return getattr(seen, field) if counts else None


def _relation(first: Seen, second: Seen) -> str | None:
    """The relation of the first to the second; None if their centres are too near."""
    dx, dy = np.subtract(second.centre, first.centre)
    if max(abs(dx), abs(dy)) < MIN_DISTANCE:
        return None
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def _object(from_ground_HWC, ground_C, region_HW) -> Seen:
    """The object that a region with its soft rim shows."""
    # ---- Colour: the share of it in each pixel of the region and its neighbours ----
    res = len(region_HW)
    # A candidate shape that is larger than the region must lose by all of its pixels. So the crop
    # has a margin for them.
    margin = res // 8
    crop = tuple(
        slice(max(i.min() - margin, 0), i.max() + margin + 1) for i in np.nonzero(region_HW)
    )
    near_HW = _spread(region_HW[crop])
    colour, alpha_N = _unmixed(from_ground_HWC[crop][near_HW], ground_C)
    alpha_HW = np.zeros(near_HW.shape, np.float32)
    alpha_HW[near_HW] = alpha_N
    # ---- Shape: each candidate has the region's centre of mass and area ----
    area = alpha_HW.sum()
    y, x = ((np.arange(n) + 0.5) @ alpha_HW.sum(1 - a) / area for a, n in enumerate(near_HW.shape))
    diameter_S = np.sqrt(area / _moments()[:, 1])
    centre_S2 = np.stack([np.full_like(diameter_S, x), y - _moments()[:, 0] * diameter_S], -1)
    side = max(near_HW.shape)  # `shapes.coverage` draws squares
    drawn_SHW = np.stack(
        [
            shapes.coverage(shape, centre / side, diameter / side, side)
            for shape, centre, diameter in zip(shapes.SHAPES, centre_S2, diameter_S, strict=True)
        ]
    )
    match_S = _correlation(alpha_HW, drawn_SHW[:, : len(alpha_HW), : alpha_HW.shape[1]])
    # ---- Size and place ----
    best = int(match_S.argmax())
    diameter = diameter_S[best] / res
    centre = (centre_S2[best] + [crop[1].start, crop[0].start]) / res
    # The larger diameter over the smaller: too large and too small count alike.
    ratio = {n: np.exp(abs(np.log(diameter / d))) for n, d in shapes.SIZES.items()}
    size = min(ratio, key=ratio.get)
    column, row = (int(np.argmin(np.abs(np.subtract(shapes.CENTRES, v)))) for v in centre)
    offset = centre - [shapes.CENTRES[column], shapes.CENTRES[row]]
    return Seen(
        colour,
        shapes.SHAPES[best] if match_S[best] >= MIN_MATCH else None,
        size if ratio[size] <= MAX_RATIO else None,
        row * 3 + column if np.abs(offset).max() <= MAX_OFFSET else None,
        tuple(centre.tolist()),
    )


def _unmixed(from_ground_NC, ground_C):
    """The colour that explains the pixels best, and its share in each.   -> name | None, alpha_N

    If no colour does, a pixel's share is its distance from the ground. The 95th percentile of the
    distances counts as 1.
    """
    axis_KC = np.array(list(shapes.COLOURS.values()), np.float32) - ground_C
    # Least squares: a pixel's projection on the line from the ground to a colour.
    # A ground that is one of the colours has no line to it, and a divisor of 0.
    length_K = np.maximum(np.square(axis_KC).sum(-1), 1e-6)
    alpha_NK = np.clip(from_ground_NC @ axis_KC.T / length_K, 0, 1)
    misfit_NK = np.linalg.norm(from_ground_NC[:, None] - alpha_NK[..., None] * axis_KC, axis=-1)
    misfit_K = np.sqrt(np.square(misfit_NK).mean(0))
    best = int(misfit_K.argmin())
    alpha_N = alpha_NK[:, best]
    if misfit_K[best] <= MAX_MISFIT and np.quantile(alpha_N, 0.95) >= MIN_ALPHA:
        return list(shapes.COLOURS)[best], alpha_N
    distance_N = np.linalg.norm(from_ground_NC, axis=-1)
    return None, np.minimum(distance_N / np.quantile(distance_N, 0.95), 1)


def _correlation(alpha_HW, drawn_SHW):
    """Uncentred correlation of a region with each shape, at the best of several blurs.   -> S"""
    matches = []
    for passes in range(BLURS + 1):
        if passes:
            drawn_SHW = _blurred(drawn_SHW)
        power_S = np.square(drawn_SHW).sum((1, 2)) * np.square(alpha_HW).sum()
        matches.append((drawn_SHW * alpha_HW).sum((1, 2)) / np.sqrt(np.maximum(power_S, 1e-6)))
    return np.max(matches, axis=0)


@functools.cache
def _moments():
    """Two numbers of each shape, measured on a large drawing.   -> S2

    They are the offset of its centre of mass below its centre, in diameters, and its area, in
    squared diameters.
    """
    rows = (np.arange(256) + 0.5) / 256 - 0.5
    moments = []
    for shape in shapes.SHAPES:
        # A diameter of 0.8 leaves room for the star's tips, which reach 1.1 of the radius.
        drawn_HW = shapes.coverage(shape, (0.5, 0.5), 0.8, 256)
        area = drawn_HW.sum()
        moments.append((rows @ drawn_HW.sum(1) / area / 0.8, area / (0.8 * 256) ** 2))
    return np.array(moments)


def _regions(mask_HW) -> list[np.ndarray]:
    """Connected regions (of eight neighbours) as masks, without specks."""
    # Every pixel starts with a label of its own, and the largest label spreads until nothing
    # changes.
    label_HW = np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape) * mask_HW
    # No label ever falls, so equal sums mean equal labels.
    while (spread_HW := _spread(label_HW) * mask_HW).sum() != label_HW.sum():
        label_HW = spread_HW
    labels, sizes = np.unique(label_HW[mask_HW], return_counts=True)
    return [label_HW == n for n in labels[sizes >= MIN_AREA * mask_HW.size]]


def _spread(array_HW):
    """The maximum over each pixel and its eight neighbours."""
    wide = np.pad(array_HW, 1)
    rows = np.maximum(np.maximum(wide[:-2], wide[1:-1]), wide[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _blurred(array_SHW):
    """A blur with the weights 1 2 1 along height and width, about 0.7 pixels."""
    wide = np.pad(array_SHW, ((0, 0), (1, 1), (1, 1)))
    rows = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
