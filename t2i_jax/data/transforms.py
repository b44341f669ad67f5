"""Pictures from bytes to arrays, in numpy and Pillow: safe decoding, squares, augmentation.

H W pixels · C channels
"""

import io

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
PIXEL_LIMIT = 64_000_000
SIDE_LIMIT = 20_000


class BadExample(ValueError):
    """A picture or caption that cannot be used; the loader gives its slot weight 0.

    Reasons read "<kind>: <detail>", so that they can be counted by kind.
    """


def decode(data: bytes, res: int = SIDE_LIMIT) -> np.ndarray:
    """PNG, JPEG or WebP -> uint8 RGB HWC.

    The first frame, upright by its EXIF orientation; transparency over white; grey, palette and
    CMYK as RGB; 16-bit grey divided by 257 and rounded, 16-bit colours by their upper byte; colour
    profiles are ignored. The size is read from the header before any pixel is.

    Args:
      data: the file.
      res: the side wanted in the end. A JPEG of several times that is decoded at a half, a quarter
        or an eighth, but no side below 2 × res: five times as fast for a photograph.
    Raises:
      BadExample: another format, a broken file, or more than 64 million pixels.
    """
    # What Pillow warns of is let through: a filter for it would be one for all threads.
    if not data:
        raise BadExample("empty file: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            w, h = image.size
            if w * h > PIXEL_LIMIT or max(w, h) > SIDE_LIMIT:
                raise BadExample(f"too many pixels: {w} × {h}")
            image.draft(None, (2 * res, 2 * res))
            return _rgb(ImageOps.exif_transpose(image))
    except BadExample:
        raise
    except Image.UnidentifiedImageError as e:
        raise BadExample(f"unreadable as PNG, JPEG or WebP: starts with {data[:12]!r}") from e
    except Image.DecompressionBombError as e:
        raise BadExample(f"too many pixels: {e}") from e
    except Exception as e:  # Pillow raises nearly every kind for a broken file
        raise BadExample(f"broken picture: {type(e).__name__} {e}") from e


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        grey_HW1 = np.round(np.asarray(image) / 257).astype(np.uint8)[..., None]
        return np.repeat(grey_HW1, 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
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


def pad(image_HWC: np.ndarray) -> np.ndarray:
    """White bars make it a square, so that nothing is cut off.   -> uint8 HWC, H = W"""
    h, w, _ = image_HWC.shape
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    out_HWC = np.full((side, side, 3), 255, np.uint8)
    out_HWC[top : top + h, left : left + w] = image_HWC
    return out_HWC


def to_float(image_HWC: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]"""
    return image_HWC.astype(np.float32) / 127.5 - 1


def flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors half of the pictures; not for captions that say left and right, nor for letters."""
    return image_HWC[:, ::-1] if rng.random() < 0.5 else image_HWC


AUGMENTATIONS = {"flip": flip}  # name -> (image u8 HWC, numpy generator) -> image
