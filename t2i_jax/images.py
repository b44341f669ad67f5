"""Images on disk: files with metadata, grids, and whole writes of any file.

B images · H W pixels · C channels
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
LONGEST = {"webp": 16_383, "jpg": 65_500}  # pixels of a side that a format has room for
_METADATA_LIMIT = 32_768  # bytes of JSON: the EXIF segment of a JPEG has room for twice that
_PROMPTS = ("prompt", "negative_prompt", "prompts", "pictures")  # keys whose values can be long
_PARAMETERS_LIMIT = 8192  # characters of the text for other viewers
_UNICODE = b"UNICODE\0"  # EXIF's mark of a comment in UTF-16


def to_uint8(image):
    """Floats in [-1, 1], of any shape -> uint8. Values beyond are clipped."""
    image = np.asarray(image, np.float32)
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(images_BHWC, columns: int | None = None, gap: int = 2):
    """uint8 images of one size -> one uint8 image, row by row on white.   -> HWC

    columns: images in a row; by default the grid is about square.   gap: pixels between images.
    """
    n = len(images_BHWC)
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    return rows([images_BHWC[i : i + columns] for i in range(0, n, columns)], gap)


def rows(pictures, gap: int = 2):
    """The same as `grid`, for rows of unequal lengths: a list of BHWC or of lists of HWC. Images of
    several sizes get as much room as the largest.
    """
    h, w, c = np.max([image.shape for row in pictures for image in row], axis=0)
    columns = max(map(len, pictures))
    size = (len(pictures) * (h + gap) - gap, columns * (w + gap) - gap, c)
    out = np.full(size, 255, np.uint8)
    for y, row in enumerate(pictures):
        for x, image in enumerate(row):
            top, left = y * (h + gap), x * (w + gap)
            out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def enlarged(image_HWC, side: int = 512):
    """The uint8 image with each pixel repeated, until its longer side is at least `side`."""
    factor = -(-side // max(image_HWC.shape[:2]))
    return image_HWC.repeat(factor, 0).repeat(factor, 1)


def save(path, image_HWC, metadata: dict | None = None, parameters: str | None = None) -> None:
    """Writes a uint8 image, whole or not at all, in the format of its extension.

    A PNG holds both texts in chunks of their names, JPEG and WebP in EXIF's MakerNote and
    UserComment.

    Args:
      path: ends in .png, .jpg, .jpeg or .webp.
      metadata: becomes JSON, for `read_metadata`.
      parameters: the text that other viewers show.
    Raises:
      OSError: the file cannot be written.
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
    # Encoded in memory first: a failed encoding must not leave half a file.
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, kind, **options)
    write_whole(path, buffer.getvalue())


def save_animation(path, images_NHWC, metadata=None, parameters=None, seconds=0.08) -> None:
    """Writes uint8 images as an endless WebP animation. Other arguments and errors as of `save`.

    seconds: how long each image is shown.
    """
    first, *rest = map(Image.fromarray, images_NHWC)
    buffer = io.BytesIO()
    options = dict(duration=round(seconds * 1000), loop=0, exif=_exif(metadata, parameters))
    first.save(buffer, "webp", save_all=True, append_images=rest, lossless=True, **options)
    write_whole(path, buffer.getvalue())


def _to_json(metadata: dict) -> str:
    """The metadata as JSON. Prompts are left out where it would pass the limit."""
    text = json.dumps(metadata, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file may be no UTF-8
        text = json.dumps(metadata)
    if len(text.encode()) <= _METADATA_LIMIT:
        return text
    return json.dumps({k: v for k, v in metadata.items() if k not in _PROMPTS})


def _exif(metadata: dict | None, parameters: str | None) -> Image.Exif:
    exif = Image.Exif()
    own = exif.get_ifd(ExifTags.IFD.Exif)
    if metadata is not None:
        # MakerNote is every camera's, too. The name in front marks ours for `_note`.
        own[ExifTags.Base.MakerNote] = f"{METADATA_KEY}\0{_to_json(metadata)}".encode()
    if parameters is not None:
        text = parameters[: _PARAMETERS_LIMIT - 1]
        # "replace": a lone surrogate has no UTF-16.
        own[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be", "replace")
    return exif


def read_metadata(path) -> dict | None:
    """The metadata that `save` wrote, or None. The file may come from anywhere.

    Raises:
      OSError: the file cannot be read, or is no image.
      ValueError: the image is broken, or claims more pixels than Pillow decodes.
    """
    if not os.path.isfile(path) and os.path.exists(path):  # opening a named pipe would block
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    try:
        # Only what `save` writes is tried, so a stranger's file meets no other decoder.
        with Image.open(path, formats=FORMATS) as image:
            text = _note(image)
    except Image.UnidentifiedImageError as e:
        raise OSError(f"it is no {', '.join(FORMATS)}") from e
    except (OSError, ValueError):
        raise
    except Exception as e:  # Pillow raises nearly every kind for a broken file
        raise ValueError(f"broken picture: {type(e).__name__} {e}") from e
    if text is None or len(text) > 4 * _METADATA_LIMIT:
        return None
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
        return None
    return metadata if isinstance(metadata, dict) else None


def _note(image: Image.Image) -> str | None:
    """The text that `save` wrote into an image, or None."""
    if image.format == "PNG":
        return getattr(image, "text", {}).get(METADATA_KEY)
    note = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    name, _, data = note.partition(b"\0") if isinstance(note, bytes) else (b"", b"", b"")
    return data.decode(errors="replace") if name == METADATA_KEY.encode() else None


def check_folder(path, flag: str) -> None:
    """Raises StorageError unless the folder could be written, as far as a look can tell.

    flag: the option of the command line that names the folder, for the error.
    """
    path = pathlib.Path(path)
    with writing(path, flag):
        # `exists` may raise, for a name too long or a folder that may not be entered.
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise OSError(f"{existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OSError(f"{existing} is read-only")


def check_file(path, flag: str) -> None:
    """The same as `check_folder`, for one file. The file may exist."""
    path = pathlib.Path(path)
    with writing(path, flag):
        if path.is_dir():
            raise OSError("it is a folder")
        check_folder(path.parent, flag)
        if not path.parent.is_dir():
            raise OSError(f"{path.parent} is not there")


def make_folder(path, flag: str) -> None:
    """Makes the folder and proves that it can be written.

    Raises:
      StorageError: it cannot.
    """
    # Only a write proves it: access rights do not tell of full disks and read-only mounts.
    probe = pathlib.Path(path) / f".probe.{os.getpid()}"
    with writing(path, flag):
        probe.parent.mkdir(parents=True, exist_ok=True)
        write_whole(probe, b"")
        probe.unlink()


def writing(path, flag: str):
    """Within it, what a disk refuses is a StorageError that names the path and the flag."""
    what, fix = "cannot write there", f"choose another {flag}"
    return errors.explained(errors.StorageError, what, where=path, fix=fix, of=OSError)


def write_whole(path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it.

    Raises:
      OSError: it cannot be written. The error names the path, and no temporary file stays.
    """
    path = pathlib.Path(path)
    # The name holds the process, so that two processes do not write into one temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # A failed write names no file, and a failed open or rename the temporary one.
        e.filename, e.filename2 = str(path), None
        raise


def claim(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Makes a new, empty file `<number>_<name>` under the next free number. Safe across processes.

    The file holds the number until it is overwritten.   -> its path
    """
    matches = (re.match(r"(\d{5,})_", entry.name) for entry in folder.iterdir())
    number = max((int(match[1]) + 1 for match in matches if match), default=0)
    # Another process may claim the same number, and making the file is what decides.
    while True:
        path = folder / f"{number:05d}_{name}"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:  # another process was faster
            number += 1
        else:
            return path
