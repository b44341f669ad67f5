"""Handwritten digits with captions: 1,797 images of 8 × 8 pixels, enlarged.

They come with scikit-learn. They are the test set of Alpaydin and Kaynak's Optical Recognition of
Handwritten Digits (UCI Machine Learning Repository, CC BY 4.0).
"""

import functools
import hashlib
import importlib.util
from typing import Annotated

import numpy as np
from PIL import Image

from t2i_jax import errors, fields

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, BRIGHTEST = 8, 16  # pixels a side and largest value in the files
TEST_EVERY = 5  # every fifth digit is in the test split
SPLITS = ("train", "test")


class Source:
    """Examples {"image": uint8 (res, res, 3), "caption": str}. For the arguments see `make`."""

    def __init__(self, split: str, res: int):
        self._images_NHW, self._labels_N = read(split)
        self._res = res
        identity = hashlib.sha256(f"digits 1 {split} {res}".encode())
        identity.update(self._images_NHW.tobytes() + self._labels_N.tobytes())
        self.fingerprint = identity.hexdigest()

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitem__(self, index: int) -> dict:
        grey_HW = np.round(self._images_NHW[index] * (255 / BRIGHTEST)).astype(np.uint8)
        large = Image.fromarray(grey_HW).resize((self._res, self._res), Image.Resampling.BICUBIC)
        image_HWC = np.repeat(np.asarray(large)[..., None], 3, axis=-1)
        return {"image": image_HWC, "caption": caption(self._labels_N[index])}

    def captions(self) -> list[str]:
        """All captions. No image is enlarged."""
        return [caption(label) for label in self._labels_N]


def caption(label: int) -> str:
    """The caption of a digit, such as "a handwritten three"."""
    return f"a handwritten {NAMES[label]}"


@functools.cache
def _data():
    if not importlib.util.find_spec("sklearn"):
        raise errors.DataError(
            "package missing: scikit-learn",
            where="data source digits",
            fix="pip install -e '.[digits]'",
        )
    from sklearn import datasets

    data = datasets.load_digits()
    return data.images.astype(np.float32), data.target.astype(np.int64)


def read(split: str):
    """The images and labels of a split.   -> float32 (N, 8, 8) in 0 … 16, int64 N"""
    images_NHW, labels_N = _data()
    test_N = np.arange(len(labels_N)) % TEST_EVERY == TEST_EVERY - 1
    chosen_N = test_N if split == "test" else ~test_N
    return images_NHW[chosen_N], labels_N[chosen_N]


def make(
    *, split: Annotated[str, fields.one_of(SPLITS)] = "train", res: fields.Size = 28
) -> Source:
    """The data set of handwritten digits, white on black.

    Args:
      split: "train", or "test" with every fifth digit.
      res: pixels a side.
    Raises:
      ConfigError: an unknown split.
      DataError: scikit-learn is missing.
    """
    return Source(split, res)
