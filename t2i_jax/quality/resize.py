"""Images from files, and their resizing for image networks by the rules of published metrics.

H W pixels · C channels · N side of the square result
"""

import os
import pathlib

import numpy as np
from PIL import Image

from t2i_jax import errors
from t2i_jax.data import transforms

RULES = ("clean", "legacy_pytorch", "legacy_tensorflow")


def load(path: str | os.PathLike) -> np.ndarray:
    """A PNG, JPEG or WebP file -> uint8 RGB HWC, decoded by `transforms.decode`.

    Alpha is composited over white. Other programs differ here: clean-fid drops it.

    Raises:
      DataError: no such file, another format, a broken file, or more than 64 million pixels.
    """
    fix, of = "give a file that can be read, as PNG, JPEG or WebP", (OSError, transforms.BadExample)
    with errors.explained(errors.DataError, "no picture can be read", where=path, fix=fix, of=of):
        return transforms.decode(pathlib.Path(path).read_bytes())


def resize(image_HWC: np.ndarray, side: int, rule: str = "clean") -> np.ndarray:
    """A uint8 image, stretched to a square.   -> float32 NNC in [0, 255]

    Args:
      side: N, in pixels.
      rule: one of RULES.

        - "clean": bicubic with antialiasing, channel by channel in float32 by Pillow. Values are
          clipped to 0 … 255 but not rounded (Parmar et al. 2022, arXiv:2104.11222).
        - "legacy_pytorch": the rule of pytorch-fid. Bilinear without antialiasing; the centres of
          pixels lie at halves.
        - "legacy_tensorflow": the rule of the first FID code. Bilinear without antialiasing; pixels
          lie at their upper left corners, as in TensorFlow 1.
    Raises:
      ConfigError: an unknown rule.
      DataError: no uint8 image.
    """
    check(rule)
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or not image_HWC.size:
        raise errors.DataError(
            f"a picture is {image_HWC.dtype}{list(image_HWC.shape)}",
            where="quality.resize",
            fix="give uint8 of height, width and channels",
        )
    if rule == "clean":
        return _clean(image_HWC, side)
    return _bilinear(image_HWC, side, centred=rule == "legacy_pytorch")


def check(rule: str) -> None:
    """Raises ConfigError unless it is one of RULES."""
    errors.check_known("rule", rule, RULES, where="quality.resize")


def _clean(image_HWC, side):
    # Channel by channel, as Pillow resizes float32 only in images of one channel.
    channels = [
        Image.fromarray(image_HW).resize((side, side), Image.Resampling.BICUBIC)
        for image_HW in np.moveaxis(image_HWC, -1, 0).astype(np.float32)
    ]
    # Bicubic weights may be negative, so values overshoot the range at edges.
    return np.stack(channels, axis=-1).clip(0, 255)


def _bilinear(image_HWC, side, *, centred):
    places = (_places(n, side, centred=centred) for n in image_HWC.shape[:2])
    (top_N, bottom_N, down_N), (left_N, right_N, across_N) = places
    down_N11, across_N1 = down_N[:, None, None], across_N[:, None]
    at = lambda y_N, x_N: image_HWC[np.ix_(y_N, x_N)].astype(np.float32)
    mix = lambda a, b, t: a + (b - a) * t
    return mix(
        mix(at(top_N, left_N), at(top_N, right_N), across_N1),
        mix(at(bottom_N, left_N), at(bottom_N, right_N), across_N1),
        down_N11,
    )


def _places(n: int, side: int, *, centred: bool):
    """For each of `side` pixels: its two neighbours among n, and its distance from the first."""
    # In float32, as TensorFlow and torch compute these places.
    half = np.float32(0.5 if centred else 0)
    at_N = (np.arange(side, dtype=np.float32) + half) * np.float32(n / side) - half
    # Places before the first centre are moved onto it, as torch does.
    at_N = np.maximum(at_N, 0)
    first_N = np.minimum(at_N.astype(int), n - 1)
    return first_N, np.minimum(first_N + 1, n - 1), at_N - first_N.astype(np.float32)
