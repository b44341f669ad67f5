"""Pictures from bytes to arrays, in numpy and Pillow: safe decoding, squares, augmentation."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
PIXEL_LIMIT = 64_000_000
SIDE_LIMIT = 20_000


class BadExample(ValueError):
    """A picture or caption that cannot be used; the loader gives its slot weight 0."""


def decode(data: bytes) -> np.ndarray:
    """PNG, JPEG or WebP -> uint8 RGB HWC.

    The first frame, upright by its EXIF orientation; transparency over white; grey, palette and CMYK as
    RGB; 16-bit grey by its upper byte. Sizes are read from the header before any pixel is.

    Raises:
      BadExample: another format, a broken file, or more than 64 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's own, about sizes and EXIF; we have our limits
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                w, h = image.size
                if w * h > PIXEL_LIMIT or max(w, h) > SIDE_LIMIT:
                    raise BadExample(f"{w} × {h} pixels are too many")
                return _rgb(ImageOps.exif_transpose(image))
    except BadExample:
        raise
    except Exception as e:  # Pillow raises nearly every kind for a broken file
        raise BadExample(f"cannot be decoded: {type(e).__name__}: {e}") from e


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        return np.repeat((np.clip(wide, 0, 65535) >> 8).astype(np.uint8)[..., None], 3, -1)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def square(image_HWC: np.ndarray, res: int) -> np.ndarray:
    """The middle square, resized with antialiasing.   -> uint8 (res, res, 3)"""
    h, w, _ = image_HWC.shape
    if (h, w) == (res, res):
        return image_HWC
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    box = (left, top, left + side, top + side)
    image = Image.fromarray(image_HWC).resize((res, res), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)


def to_float(image_HWC: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]"""
    return image_HWC.astype(np.float32) / 127.5 - 1


def flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors half of the pictures; not for captions that say left and right."""
    return image_HWC[:, ::-1] if rng.random() < 0.5 else image_HWC


AUGMENTATIONS = {"flip": flip}
