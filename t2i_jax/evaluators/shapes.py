"""A judge that needs no network: reads coloured shapes out of pictures and checks the captions.

Classical vision: the ground is the median colour, objects are connected regions that differ from
it. A region's colour is the one that, mixed with the ground, explains its pixels best; its shape is
the one that, drawn at its place, as large and as soft, correlates best with that mixture.
H W pixels · C channels · N pixels of a region · K colours · S shapes
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from t2i_jax import errors
from t2i_jax.data import shapes

CONTRAST = 45.0  # RGB distance from the ground at which a pixel belongs to an object
MIN_AREA = 0.006  # share of the picture below which a region is a speck
MAX_MISFIT = 45.0  # RGB distance from the best mixture, or from a ground, to be any of ours
MIN_ALPHA = 0.5  # a colour must be that undiluted somewhere
MIN_MATCH = 0.95  # correlation with the best shape to be one of ours; clear pictures reach 0.99
BLURS = 2  # passes of a blur of 0.7 pixels that still leave a shape sharp enough
MAX_RATIO = 1.25  # of a diameter to that of its size; just over half way from one to the other
MAX_OFFSET = 0.11  # from the centre of a cell, as a share of the side, to be in its place
MIN_DISTANCE = 0.15  # between centres, as a share of the side, for a relation to hold
FIELDS = {"colour": "colour", "shape": "shape", "size": "size", "position": "cell"}
ATTRIBUTES = (*FIELDS, "relation", "background", "count")


class Seen(NamedTuple):
    """An object in a picture; None where it is like nothing of the set."""

    colour: str | None
    shape: str | None
    size: str | None
    cell: int | None  # 0 … 8, row by row
    centre: tuple[float, float]  # x, y as shares of the picture's side


class Reading(NamedTuple):
    """All that is in a picture."""

    objects: tuple[Seen, ...]
    background: str | None


def read(image_HWC: np.ndarray) -> Reading:
    """The background and every object of a square uint8 RGB picture."""
    pixels_HWC = image_HWC.astype(np.float32)
    ground_C = np.median(pixels_HWC.reshape(-1, 3), axis=0)
    from_ground_HWC = pixels_HWC - ground_C
    regions = _regions(np.linalg.norm(from_ground_HWC, axis=-1) > CONTRAST)
    seen = [_object(from_ground_HWC, ground_C, region_HW) for region_HW in regions]
    misfit = {n: np.linalg.norm(ground_C - rgb) for n, rgb in shapes.BACKGROUNDS.items()}
    background = min(misfit, key=misfit.get)
    return Reading(tuple(seen), background if misfit[background] <= MAX_MISFIT else None)


def judge(image_HWC: np.ndarray, caption: str) -> dict[str, bool]:
    """Attribute -> whether the picture shows what the caption says of it, for all it speaks of.

    An attribute of two objects must be right for both. Objects are matched to the caption as suits
    it best. `count` fails for an object too many or too few; `full_match` is all of it.
    """
    said, seen = shapes.parse(caption), read(image_HWC)
    number = len(said.objects)
    orders = itertools.permutations([*seen.objects, *[None] * number], number)
    hits = max((_hits(said, order) for order in orders), key=lambda hits: sum(h for _, h in hits))
    hits += [("count", len(seen.objects) == number)]
    if said.background:
        hits += [("background", seen.background == said.background)]
    found = {name: all(hit for n, hit in hits if n == name) for name, _ in hits}
    return {**found, "full_match": all(found.values())}


def make(
    predict,
    *,
    num_images: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    splits=("test", "heldout"),
    sample=None,
):
    """The evaluator: draws captions of the splits, equally many of each, and judges the pictures.

    Args:
      predict: name -> host function; "sample" draws uint8 pictures for captions.
      num_images: in all.
      batch_size: pictures drawn together.
      seed: of the captions and the noise.
      splits: of the data set; "test" holds pairs of colour and shape seen in training.
      sample: options for the sampler; the model's own by default.
    Returns:
      run(nets, step) -> a function that gives `num_images`, and the share of right pictures per
      attribute and as `full_match`, with the number of captions that speak of the attribute as
      `num_<attribute>` where not all do: over all, and after "seen/", "heldout/", "single/" and
      "pair/" over these alone.
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
        size = len(range(place, num_images, len(splits)))
        captions += shapes.make(split=split, size=size, seed=seed).captions()

    def run(nets, step):
        images = predict["sample"](
            nets, captions, seed=seed, batch_size=batch_size, **(sample or {})
        )
        return lambda: shares(
            [judge(image, text) for image, text in zip(images, captions, strict=True)], captions
        )

    return run


def shares(found, captions) -> dict[str, float]:
    """What `judge` found of pictures of captions as shares of right pictures, see `make`."""
    groups: dict[str, list] = {}
    for judged, text in zip(found, captions, strict=True):
        said = shapes.parse(text)
        pairs = {(thing.colour, thing.shape) for thing in said.objects}
        groups.setdefault("heldout" if pairs & shapes.HELD_OUT else "seen", []).append(judged)
        groups.setdefault("pair" if said.relation else "single", []).append(judged)
    result = _shares(found)
    for group, part in sorted(groups.items()):
        result |= {f"{group}/{name}": value for name, value in _shares(part).items()}
    return result


def _shares(found) -> dict[str, float]:
    values = {name: [f[name] for f in found if name in f] for name in ATTRIBUTES}
    values = {"full_match": [f["full_match"] for f in found], **values}
    result = {"num_images": float(len(found))}
    for name, right in values.items():
        if right:
            result[name] = float(np.mean(right))
            if len(right) < len(found):
                result[f"num_{name}"] = float(len(right))
    return result


def _hits(said: shapes.Scene, objects) -> list[tuple[str, bool]]:
    """What is said of objects, and whether it holds of the given ones (None: it is not there)."""
    hits = [
        (name, _shows(there, name, field) == getattr(wanted, field))
        for wanted, there in zip(said.objects, objects, strict=True)
        for name, field in FIELDS.items()
        if getattr(wanted, field) is not None
    ]
    if said.relation:
        known = all(map(_known, objects))
        hits += [("relation", known and _relation(*objects) == said.relation)]
    return hits


def _known(there: Seen | None) -> bool:
    """Whether it is of our colours and shapes: among fragments, some lie as any caption says."""
    return there is not None and None not in (there.colour, there.shape)


def _shows(there: Seen | None, name: str, field: str):
    seen = there is not None if name in ("colour", "shape") else _known(there)
    return getattr(there, field) if seen else None


def _relation(first: Seen, second: Seen) -> str | None:
    dx, dy = np.subtract(second.centre, first.centre)
    if max(abs(dx), abs(dy)) < MIN_DISTANCE:
        return None
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def _object(from_ground_HWC, ground_C, region_HW) -> Seen:
    """What a region shows, its soft rim included."""
    res = len(region_HW)
    margin = res // 8  # a drawn shape that is larger must count in full against it
    crop = tuple(
        slice(max(i.min() - margin, 0), i.max() + margin + 1) for i in np.nonzero(region_HW)
    )
    near_HW = _spread(region_HW[crop])
    colour, alpha_N = _unmixed(from_ground_HWC[crop][near_HW], ground_C)
    alpha_HW = np.zeros(near_HW.shape, np.float32)
    alpha_HW[near_HW] = alpha_N
    area = alpha_HW.sum()
    y, x = ((np.arange(n) + 0.5) @ alpha_HW.sum(1 - a) / area for a, n in enumerate(near_HW.shape))
    diameter_S = np.sqrt(area / _moments()[:, 1])
    centre_S2 = np.stack([np.full_like(diameter_S, x), y - _moments()[:, 0] * diameter_S], -1)
    side = max(near_HW.shape)  # shapes.coverage measures in sides of a square
    drawn_SHW = np.stack(
        [
            shapes.coverage(shape, centre / side, diameter / side, side)
            for shape, centre, diameter in zip(shapes.SHAPES, centre_S2, diameter_S, strict=True)
        ]
    )
    match_S = _correlation(alpha_HW, drawn_SHW[:, : len(alpha_HW), : alpha_HW.shape[1]])
    best = int(match_S.argmax())
    diameter = diameter_S[best] / res
    centre = (centre_S2[best] + [crop[1].start, crop[0].start]) / res
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

    Without one, a pixel's share is its distance from the ground against that of the clearest.
    """
    axis_KC = np.array(list(shapes.COLOURS.values()), np.float32) - ground_C
    alpha_NK = np.clip(from_ground_NC @ axis_KC.T / np.square(axis_KC).sum(-1), 0, 1)
    misfit_NK = np.linalg.norm(from_ground_NC[:, None] - alpha_NK[..., None] * axis_KC, axis=-1)
    misfit_K = np.sqrt(np.square(misfit_NK).mean(0))
    best = int(misfit_K.argmin())
    alpha_N = alpha_NK[:, best]
    if misfit_K[best] <= MAX_MISFIT and np.quantile(alpha_N, 0.95) >= MIN_ALPHA:
        return list(shapes.COLOURS)[best], alpha_N
    distance_N = np.linalg.norm(from_ground_NC, axis=-1)
    return None, np.minimum(distance_N / np.quantile(distance_N, 0.95), 1)


def _correlation(alpha_HW, drawn_SHW):
    """Uncentred correlation of a region with each shape, drawn as soft as suits it best.   -> S"""
    matches = []
    for passes in range(BLURS + 1):
        if passes:
            drawn_SHW = _blurred(drawn_SHW)
        power_S = np.square(drawn_SHW).sum((1, 2)) * np.square(alpha_HW).sum()
        matches.append((drawn_SHW * alpha_HW).sum((1, 2)) / np.sqrt(np.maximum(power_S, 1e-6)))
    return np.max(matches, axis=0)


@functools.cache
def _moments():
    """By shape: how far the centre of mass lies below the centre, in diameters; area in their
    squares.   -> S2
    """
    rows = (np.arange(256) + 0.5) / 256 - 0.5
    found = []
    for shape in shapes.SHAPES:
        drawn_HW = shapes.coverage(shape, (0.5, 0.5), 0.8, 256)
        area = drawn_HW.sum()
        found.append((rows @ drawn_HW.sum(1) / area / 0.8, area / (0.8 * 256) ** 2))
    return np.array(found)


def _regions(mask_HW) -> list[np.ndarray]:
    """Connected regions (eight neighbours) as masks, without specks."""
    label_HW = np.arange(1, mask_HW.size + 1).reshape(mask_HW.shape) * mask_HW
    while (spread_HW := _spread(label_HW) * mask_HW).sum() != label_HW.sum():
        label_HW = spread_HW
    labels, sizes = np.unique(label_HW[mask_HW], return_counts=True)
    return [label_HW == n for n in labels[sizes >= MIN_AREA * mask_HW.size]]


def _spread(array_HW):
    """The largest of each pixel and its eight neighbours."""
    wide = np.pad(array_HW, 1)
    rows = np.maximum(np.maximum(wide[:-2], wide[1:-1]), wide[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _blurred(array_SHW):
    """Weights 1 2 1 along height and width."""
    wide = np.pad(array_SHW, ((0, 0), (1, 1), (1, 1)))
    rows = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
