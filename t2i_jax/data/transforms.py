"""Images from bytes to arrays, in numpy and Pillow: safe decoding, squares, augmentation.

H W pixels · C channels
"""

import io

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
PIXEL_LIMIT = 64_000_000  # 256 MB as RGBA: a file of a few kilobytes may claim far more
SIDE_LIMIT = 20_000


class BadExample(ValueError):
    """An image or caption that cannot be used. The loader gives its slot weight 0.

    Its text reads "<kind>: <detail>", so that failures can be counted by kind.
    """


def decode(data: bytes, res: int = SIDE_LIMIT) -> np.ndarray:
    """PNG, JPEG or WebP -> uint8 RGB HWC. See `decode_scaled`."""
    return decode_scaled(data, res)[0]


def decode_scaled(
    data: bytes, res: int = SIDE_LIMIT, background="white"
) -> tuple[np.ndarray, float]:
    """PNG, JPEG or WebP -> uint8 RGB HWC, and how much larger its sides are in the file.

    - Of an animation the first frame is taken. EXIF's orientation is applied.
    - Transparency is composited over the background. Grey, palettes and CMYK become RGB.
    - 16-bit grey is divided by 257 and rounded. 16-bit colours keep their upper byte.
    - Colour profiles are ignored.

    Args:
      data: the content of the file.
      res: the longer side of the final picture. A much larger JPEG is decoded at a half, a quarter
        or an eighth of its size, but no side below 2 × res. For a photograph this is five times as
        fast.
    Raises:
      BadExample: another format, a broken file, or more than 64 million pixels.
    """
    # Warnings of Pillow are let through: a filter for them would act on all threads.
    if not data:
        raise BadExample("empty file: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            w, h = image.size  # from the header: no pixel is decoded before the check
            if w * h > PIXEL_LIMIT or max(w, h) > SIDE_LIMIT:
                raise BadExample(f"too many pixels: {w} × {h}")
            # Only JPEG has drafts, and other formats ignore it. The default `res` reduces nothing,
            # as no side may be that long.
            image.draft(None, (2 * res, 2 * res))
            return _rgb(ImageOps.exif_transpose(image), background), max(w, h) / max(image.size)
    # A BadExample is an Exception, too, and the last clause would rename it.
    except BadExample:
        raise
    except Image.UnidentifiedImageError as e:
        raise BadExample(f"unreadable as PNG, JPEG or WebP: starts with {data[:12]!r}") from e
    except Image.DecompressionBombError as e:
        raise BadExample(f"too many pixels: {e}") from e
    except Exception as e:  # Pillow raises nearly every kind for a broken file
        raise BadExample(f"broken picture: {type(e).__name__} {e}") from e


def _rgb(image: Image.Image, background) -> np.ndarray:
    # Pillow's own conversion of 16-bit grey clips it at 255.
    # The factor: 65,535 / 257 = 255.
    if image.mode.startswith("I"):
        grey_HW1 = np.round(np.asarray(image) / 257).astype(np.uint8)[..., None]
        return np.repeat(grey_HW1, 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return np.asarray(image.convert("RGB"))


def square(image_HWC: np.ndarray, res: int, kernel=Image.Resampling.LANCZOS) -> np.ndarray:
    """The middle square, resized with antialiasing.   -> uint8 (res, res, 3)"""
    return fit(image_HWC, (res, res), kernel)


def fit(image_HWC: np.ndarray, size, kernel=Image.Resampling.LANCZOS) -> np.ndarray:
    """The largest part in the middle with the sides' ratio of a size (height, width), resized to it
    with antialiasing.   -> uint8 (height, width, 3)
    """
    (h, w, _), (height, width) = image_HWC.shape, size
    if (h, w) == (height, width):
        return image_HWC
    tall, wide = min(h, w * height / width), min(w, h * width / height)
    top, left = (h - tall) // 2, (w - wide) // 2
    box = (left, top, left + wide, top + tall)
    image = Image.fromarray(image_HWC).resize((width, height), kernel, box=box)
    return np.asarray(image)


def shrink(image_HWC: np.ndarray, res: int) -> np.ndarray:
    """The middle square at a lower resolution, by averaging areas.   -> uint8 (res, res, 3)"""
    h, w, c = image_HWC.shape
    # The exact mean where areas are whole pixels. Pillow rounds after rows and again after columns.
    if h == w and h % res == 0:
        mean_HWC = image_HWC.reshape(res, h // res, res, h // res, c).mean((1, 3))
        return np.rint(mean_HWC).astype(np.uint8)
    return square(image_HWC, res, Image.Resampling.BOX)


def pad(image_HWC: np.ndarray, size=(1, 1)) -> np.ndarray:
    """The image with white bars, so that `fit` to a size (height, width), by default a square, cuts
    nothing off.   -> uint8 HWC
    """
    (h, w, _), (height, width) = image_HWC.shape, size
    tall, wide = max(h, -(-w * height // width)), max(w, -(-h * width // height))
    top, left = (tall - h) // 2, (wide - w) // 2
    out_HWC = np.full((tall, wide, 3), 255, np.uint8)
    out_HWC[top : top + h, left : left + w] = image_HWC
    return out_HWC


def to_float(image_HWC: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]"""
    # `sharding._to_float` gives the same bits on devices (ADR 17): change both together.
    return image_HWC.astype(np.float32) / 127.5 - 1


def flip(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors half of the images. Not for captions that say left or right, nor for letters."""
    return image_HWC[:, ::-1] if rng.random() < 0.5 else image_HWC


AUGMENTATIONS = {"flip": flip}  # name -> (image u8 HWC, numpy generator) -> image
