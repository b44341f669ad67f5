"""Pictures on disk: PNG with metadata, grids, file names that never come from a prompt."""

import io
import json
import os
import pathlib
import re

import numpy as np
from PIL import Image, PngImagePlugin

METADATA_KEY = "t2i_jax"
_METADATA_LIMIT = 8192  # bytes of JSON written or read


def to_uint8(image):
    """[-1, 1] float -> uint8, clipped; any shape."""
    image = np.asarray(image, np.float32)
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(images_BHWC, columns: int | None = None, gap: int = 2):
    """uint8 pictures of one size -> one uint8 picture, row by row on a white ground."""
    n, h, w, c = images_BHWC.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    out = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(images_BHWC):
        y, x = divmod(i, columns)
        out[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return out


def save(path, image_HWC, metadata: dict | None = None, parameters: str | None = None) -> None:
    """Writes a uint8 picture, whole or not at all, in the format of its extension.

    PNG files also hold `metadata` as JSON and `parameters`, the text that other viewers show.
    """
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        text = json.dumps(metadata)
        if len(text) > _METADATA_LIMIT:
            text = json.dumps({**metadata, "prompt": str(metadata.get("prompt"))[:1024]})
        info.add_itxt(METADATA_KEY, text)
    if parameters is not None:
        info.add_itxt("parameters", parameters[:_METADATA_LIMIT])
    buffer = io.BytesIO()
    kind = {"jpg": "jpeg"}.get(extension := str(path).rpartition(".")[2], extension)
    Image.fromarray(image_HWC).save(buffer, kind, **({"pnginfo": info} if kind == "png" else {}))
    write_whole(path, buffer.getvalue())


def save_animation(path, images_NHWC, seconds: float = 0.08) -> None:
    """Writes uint8 pictures as a WebP that shows each so long, again and again."""
    first, *rest = map(Image.fromarray, images_NHWC)
    buffer = io.BytesIO()
    timing = dict(duration=round(seconds * 1000), loop=0)
    first.save(buffer, "webp", save_all=True, append_images=rest, lossless=True, **timing)
    write_whole(path, buffer.getvalue())


def read_metadata(path) -> dict | None:
    """The JSON that `save` wrote, or None; parsed as JSON and nothing else."""
    with Image.open(path, formats=["PNG"]) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None or len(text) > 4 * _METADATA_LIMIT:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def write_whole(path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def claim(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A new, empty file `<number>_<name>` under the next free number, ours alone."""
    matches = (re.match(r"(\d{5,})_", entry.name) for entry in folder.iterdir())
    number = max((int(match[1]) + 1 for match in matches if match), default=0)
    while True:
        path = folder / f"{number:05d}_{name}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:  # another process was faster
            number += 1
        else:
            return path
