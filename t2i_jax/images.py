"""Pictures on disk: files with metadata, grids, file names that never come from a prompt.

B pictures · H W pixels · C channels
"""

import contextlib
import errno
import io
import json
import os
import pathlib
import re

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from t2i_jax import errors

METADATA_KEY = "t2i_jax"
FORMATS = ("PNG", "JPEG", "WEBP")
_METADATA_LIMIT = 32_768  # bytes of JSON written or read: a JPEG has room for twice that
_PROMPTS = ("prompt", "negative_prompt", "prompts", "pictures")  # keys of what can be long
_PARAMETERS_LIMIT = 8192  # characters of the text for other viewers
_UNICODE = b"UNICODE\0"  # how EXIF marks a comment in UTF-16


def to_uint8(image):
    """[-1, 1] float -> uint8, clipped; any shape."""
    image = np.asarray(image, np.float32)
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(images_BHWC, columns: int | None = None, gap: int = 2):
    """uint8 pictures of one size -> one uint8 picture, row by row on a white ground."""
    n = len(images_BHWC)
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    return rows([images_BHWC[i : i + columns] for i in range(0, n, columns)], gap)


def rows(pictures, gap: int = 2):
    """As `grid`, of rows that may be of unequal lengths: a list of BHWC or of lists of HWC."""
    h, w, c = pictures[0][0].shape
    columns = max(map(len, pictures))
    size = (len(pictures) * (h + gap) - gap, columns * (w + gap) - gap, c)
    out = np.full(size, 255, np.uint8)
    for y, row in enumerate(pictures):
        for x, image in enumerate(row):
            out[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return out


def enlarged(image_HWC, side: int = 512):
    """The uint8 picture with every pixel as a square of them, its longer side at least `side`."""
    factor = -(-side // max(image_HWC.shape[:2]))
    return image_HWC.repeat(factor, 0).repeat(factor, 1)


def save(path, image_HWC, metadata: dict | None = None, parameters: str | None = None) -> None:
    """Writes a uint8 picture, whole or not at all, in the format of its extension.

    The file also holds `metadata` as JSON and `parameters`, the text that other viewers show: a PNG
    as text of these names, JPEG and WebP as EXIF's MakerNote and UserComment.
    """
    extension = str(path).rpartition(".")[2]
    kind = {"jpg": "jpeg"}.get(extension, extension)
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        if metadata is not None:
            info.add_itxt(METADATA_KEY, _to_json(metadata))
        if parameters is not None:
            info.add_itxt("parameters", parameters[:_PARAMETERS_LIMIT])
        options = {"pnginfo": info}
    else:
        options = {"exif": _exif(metadata, parameters)}
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, kind, **options)
    write_whole(path, buffer.getvalue())


def save_animation(path, images_NHWC, metadata=None, parameters=None, seconds=0.08) -> None:
    """Writes uint8 pictures as a WebP that shows each so long, again and again; as `save`."""
    first, *rest = map(Image.fromarray, images_NHWC)
    buffer = io.BytesIO()
    options = dict(duration=round(seconds * 1000), loop=0, exif=_exif(metadata, parameters))
    first.save(buffer, "webp", save_all=True, append_images=rest, lossless=True, **options)
    write_whole(path, buffer.getvalue())


def _to_json(metadata: dict) -> str:
    """The metadata, without prompts if they are too long to keep."""
    text = json.dumps(metadata, ensure_ascii=False)
    if len(text.encode()) <= _METADATA_LIMIT:
        return text
    return json.dumps({k: v for k, v in metadata.items() if k not in _PROMPTS})


def _exif(metadata: dict | None, parameters: str | None) -> Image.Exif:
    exif = Image.Exif()
    own = exif.get_ifd(ExifTags.IFD.Exif)
    if metadata is not None:
        own[ExifTags.Base.MakerNote] = f"{METADATA_KEY}\0{_to_json(metadata)}".encode()
    if parameters is not None:
        text = parameters[: _PARAMETERS_LIMIT - 1]
        own[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be", "replace")
    return exif


def read_metadata(path) -> dict | None:
    """The JSON that `save` wrote, or None; parsed as JSON and nothing else.

    Raises:
      OSError: the file cannot be read, or is no picture.
      ValueError: it is a broken one, or claims more pixels than Pillow decodes.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))  # a pipe would block
    try:
        with Image.open(path, formats=FORMATS) as image:
            text = _note(image)
    except (OSError, ValueError):
        raise
    except Exception as e:  # Pillow raises nearly every kind for a broken file
        raise ValueError(f"broken picture: {type(e).__name__} {e}") from e
    if text is None or len(text) > 4 * _METADATA_LIMIT:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _note(image: Image.Image) -> str | None:
    """The JSON of a file of ours as text."""
    if image.format == "PNG":
        return getattr(image, "text", {}).get(METADATA_KEY)
    note = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    name, _, data = note.partition(b"\0") if isinstance(note, bytes) else (b"", b"", b"")
    return data.decode(errors="replace") if name == METADATA_KEY.encode() else None


def check_folder(path, flag: str) -> None:
    """Raises StorageError unless pictures could go there, as far as can be told without writing."""
    path = pathlib.Path(path)
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as e:
        raise _unwritable(path, e.strerror, flag) from e
    if not there.is_dir():
        raise _unwritable(path, f"{there} is a file", flag)
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(path, f"{there} is read-only", flag)


def check_file(path, flag: str) -> None:
    """`check_folder` for one file, which may be there already."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise _unwritable(path, "it is a folder", flag)
    check_folder(path.parent, flag)
    if not path.parent.is_dir():
        raise _unwritable(path, f"{path.parent} is not there", flag)


def make_folder(path, flag: str) -> None:
    """Makes the folder and proves that it can be written.

    Raises:
      StorageError: it cannot.
    """
    probe = pathlib.Path(path) / f".probe.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        write_whole(probe, b"")
        probe.unlink()
    except OSError as e:
        raise _unwritable(path, e.strerror, flag) from e


def _unwritable(path, reason: str, flag: str) -> errors.StorageError:
    return errors.StorageError(
        f"cannot write there: {reason}", where=str(path), fix=f"choose another {flag}"
    )


def write_whole(path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it.

    An OSError names the path, and no temporary file stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        e.filename, e.filename2 = str(path), None  # `write` names none, the others the temporary
        raise


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
