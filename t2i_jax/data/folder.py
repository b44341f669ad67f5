"""Images in a folder, with captions from metadata.jsonl, metadata.csv, a .txt for each, or PNGs."""

import collections
import csv
import hashlib
import json
import os
import pathlib
import unicodedata

from absl import logging

from t2i_jax import errors, images
from t2i_jax.data import transforms

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_LIMIT = 65_536  # characters that are read of a .txt file
SPLITS = ("train", "test")
EXAMPLE = '{"file_name": "cat.png", "text": "a cat on a red sofa"}'


class Source:
    """Examples {"image": uint8 HWC, "caption": str, "scale": float}, read on access.

    scale: how much larger the picture's sides are in the file.
    """

    def __init__(self, root: pathlib.Path, examples: list, fingerprint: str, res, pad: bool):
        self._root, self._examples, self._pad = root, examples, pad
        self._size = (res, res) if isinstance(res, int) else res
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        name, example = self._examples[index][0], self.caption(index)
        shown = printable(name)
        try:
            data = (self._root / name).read_bytes()
            image_HWC, scale = transforms.decode_scaled(data, max(self._size))
        # It would be missing again. Other errors of the disk pass, and the loader tries again.
        except FileNotFoundError as e:
            raise transforms.BadExample(f"missing file: {shown}") from e
        except transforms.BadExample as e:
            raise transforms.BadExample(f"{e} in {shown}") from e
        if self._pad:
            image_HWC = transforms.pad(image_HWC, self._size)
        return {**example, "image": image_HWC, "scale": scale}

    def caption(self, index: int) -> dict:
        """An example without its image, which is not opened."""
        name, caption = self._examples[index]
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise transforms.BadExample(f"caption is no text: {kind} for {printable(name)}")
        return {"caption": caption}

    def where(self, index: int) -> str:
        """The file of an example."""
        return printable(self._root / self._examples[index][0])

    def captions(self) -> list[str]:
        """All captions, "" where one is no text. No image is opened."""
        return [caption if isinstance(caption, str) else "" for _, caption in self._examples]


def make(
    path,
    *,
    split: str = "train",
    res: int | tuple[int, int] = 32,
    holdout: float = 0.0,
    pad: bool = False,
) -> Source:
    """The PNG, JPEG and WebP images below a folder, in the order of their names.

    - A metadata file in the image's folder, or in one above, holds captions. Its rows have the keys
      file_name (relative to the metadata file) and text. Each row is an example.
    - Without a row, the first line of the .txt file of the same name is the caption.
    - Without either, it is the prompt that a PNG of ours was drawn with.
    - A metadata.csv is not read where its folder has a metadata.jsonl.
    - An empty caption means no condition. Images without a caption and hidden files are left out.

    The log says how many images and other files there are, and how many are used. Warnings name the
    first of those that are not used.

    Args:
      path: the folder.
      split: "train" or "test".
      res: pixels a side of the final squares, or height and width. Large photographs are decoded
        near it.
      holdout: share of the images that only "test" has. A hash of the name decides.
      pad: adds white bars instead of cutting out the middle.
    Raises:
      ConfigError: an unknown split, or a holdout outside [0, 1).
      DataError: no images, no captions, a broken metadata file, or a name or link that leads out of
        the folder.
      StorageError: a folder in it cannot be listed.
    """
    if split not in SPLITS or not 0 <= holdout < 1:
        raise errors.ConfigError(
            f"split {split!r}, holdout {holdout}",
            where="config.data",
            fix=f"splits are {', '.join(SPLITS)}; give a holdout in [0, 1)",
        )
    root, sizes, pictures = scan(path)
    examples = captioned(root, sizes, pictures)
    chosen = [e for e in examples if (_share(e[0]) < holdout) == (split == "test")]
    if not chosen:
        raise errors.DataError(
            f"no examples in split {split!r} with holdout {holdout}",
            where=str(root),
            fix="train with another config.data.holdout: 0.05 leaves some 5 % of the pictures to "
            "the split 'test', which is too few of a small folder",
        )
    if holdout:
        logging.info("%s: %d of %d examples in %r", root, len(chosen), len(examples), split)
    # Names, sizes and captions, but not contents: hashing those would read the whole data set.
    digest = hashlib.sha256()
    for name, caption in chosen:
        digest.update(json.dumps([name, sizes[name], caption]).encode() + b"\n")
    return Source(root, chosen, digest.hexdigest(), res, pad)


def scan(path) -> tuple[pathlib.Path, dict[str, int], list[str]]:
    """Looks for images below a folder. Hidden files and folders are left out.

    Returns:
      The resolved folder; name -> bytes of each file in it, −1 for what is no file, such as a
      broken link; and the names of the images.
    Raises:
      DataError: no folder, no image in it, or a link that leads out of it.
      StorageError: a folder in it cannot be listed.
    """
    root = pathlib.Path(path).expanduser().resolve()
    if not path or not root.is_dir():
        raise errors.DataError(
            "no such folder", where=str(path or "config.data.path"), fix="give a folder of pictures"
        )
    try:
        sizes = dict(sorted(_scan(root, root)))
    except OSError as e:
        raise errors.StorageError(
            f"cannot be listed: {e.strerror}",
            where=printable(e.filename or root),
            fix="check the disk and who may read the folder",
        ) from e
    pictures = [n for n, size in sizes.items() if n.lower().endswith(PICTURES) and size >= 0]
    if not pictures:
        raise errors.DataError(
            f"no pictures: looked for {', '.join(PICTURES)} in it and below; "
            f"there are {_by_kind(sizes) or 'no files'}",
            where=str(root),
            fix="check the path, or convert the pictures to one of these formats",
        )
    nothing = [name for name, size in sizes.items() if size < 0]
    _warn(root, nothing, "links lead to no file, or are no files, and are left out")
    return root, sizes, pictures


def _scan(root, folder):
    """Yields (name relative to root, size) of each visible file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = pathlib.Path(entry.path).relative_to(root).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                # A folder from a stranger must not bring files of this machine into the training.
                if not pathlib.Path(os.path.realpath(entry.path)).is_relative_to(root):
                    raise _leaves(name, root)
                if not os.path.exists(entry.path):  # also a loop of links
                    yield name, -1
                    continue
                if entry.is_dir():
                    continue  # its files are found at their own place, and not twice
            if entry.is_dir():
                yield from _scan(root, entry.path)
            else:
                yield name, entry.stat().st_size if entry.is_file() else -1


def captioned(root, sizes, pictures, *, warn: bool = True) -> list:
    """The examples of a folder: [(image, caption), …] in the order of names.

    Args:
      root, sizes, pictures: the result of `scan`.
      warn: logs how many files there are, and which are left out.
    Raises:
      DataError: no captions, or a broken metadata file.
    """
    # ---- Metadata files ----
    captions, absent, unread, cut, read = {}, [], [], [], set()
    # macOS decomposes letters in file names, metadata files mostly do not: "é" is one character or
    # two. Names that differ in this alone are taken for one.
    names = {unicodedata.normalize("NFC", name): name for name in sizes}
    is_picture = set(pictures)
    for metadata in [n for n in sizes if pathlib.PurePosixPath(n).name.lower() in METADATA]:
        if f"{metadata[:-3]}jsonl" in sizes:  # a metadata.csv with a metadata.jsonl
            continue
        read.add(metadata)
        for name, caption in _rows(root, metadata):
            name = name if name in sizes else names.get(unicodedata.normalize("NFC", name), name)
            if name in is_picture:
                captions.setdefault(name, []).append(caption)
            else:
                (unread if sizes.get(name, -1) >= 0 else absent).append(name)
    # ---- For each image that has no row a .txt file, or what a picture of ours says itself ----
    texts = {n[:-4]: n for n, size in sizes.items() if n.lower().endswith(".txt") and size >= 0}
    for picture in pictures:
        text = texts.get(picture.rpartition(".")[0])
        if picture in captions:
            continue
        if not text:
            if prompt := _prompt(root / picture):
                captions[picture] = [prompt]
            continue
        read.add(text)
        # "utf-8-sig" drops the byte order mark that some editors write in front.
        with open(root / text, encoding="utf-8-sig", errors="replace") as f:
            caption, _, more = f.read(CAPTION_LIMIT).strip().partition("\n")
        captions[picture] = [caption.strip()]
        if more.strip():
            cut.append(text)
    # ---- Examples, and warnings ----
    bare = [picture for picture in pictures if picture not in captions]
    examples = [
        (p, "" if isinstance(caption, str) and not caption.strip() else caption)
        for p in pictures
        if p in captions
        for caption in captions[p]
    ]
    others = _by_kind({n for n, size in sizes.items() if size >= 0} - is_picture - read)
    if not examples:
        raise errors.DataError(
            f"no captions for {len(pictures)} pictures: looked for {', '.join(METADATA)} and a "
            f".txt beside each picture; {len(absent)} rows name pictures that are not there"
            + (f"; not read: {others}" if others else ""),
            where=str(root),
            fix=f"write metadata.jsonl with lines like {EXAMPLE}",
        )
    if not warn:
        return examples
    logging.info(
        "%s: %d pictures, %d of them used, with %d captions; %d without caption; not read: %s",
        printable(root),
        *(len(pictures), len(pictures) - len(bare), len(examples), len(bare), others or "none"),
    )
    empty = [name for name, caption in examples if caption == ""]
    foreign = [name for name, caption in examples if "\ufffd" in str(caption)]
    other = [name for name, caption in examples if not isinstance(caption, str)]
    for names, what in (
        (bare, "pictures have no caption and are left out"),
        (absent, "rows of metadata name pictures that are not there"),
        (unread, f"rows of metadata name files that are not {', '.join(PICTURES)} and not read"),
        (cut, "caption files have more than one line: the first is the caption"),
        (foreign, "captions are not in UTF-8: their other letters are lost"),
        (other, "captions are no text: these pictures count nothing"),
        (empty, "captions are empty: these pictures train without condition"),
    ):
        _warn(root, names, what)
    return examples


def _prompt(path: pathlib.Path) -> str | None:
    """The prompt that a PNG of ours was drawn with."""
    if path.suffix.lower() != ".png":
        return None
    try:
        metadata = images.read_metadata(path) or {}
    except (OSError, ValueError):
        return None
    prompt = metadata.get("prompt")
    return prompt if isinstance(prompt, str) else None


def _warn(root, names, what: str) -> None:
    if names:
        shown = ", ".join(map(printable, names[:5])) + " …" * (len(names) > 5)
        logging.warning("%s: %d %s: %s", printable(root), len(names), what, shown)


def _by_kind(names) -> str:
    """The number of files of each extension, such as "2 .gif, 1 .svg"."""
    kinds = collections.Counter(
        pathlib.PurePosixPath(name).suffix.lower() or pathlib.PurePosixPath(name).name
        for name in names
    )
    kinds = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {printable(kind)}" for kind, count in kinds[:8]]
    return ", ".join(shown) + " …" * (len(kinds) > 8)


def printable(path) -> str:
    """A path as text for messages. Bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _rows(root, metadata: str):
    """Yields (image relative to root, caption) of each row of a metadata file."""
    folder, line = pathlib.PurePosixPath(metadata).parent, 0
    read = _json_rows if metadata.lower().endswith("jsonl") else _csv_rows
    # `csv` wants newline="": quoted fields may hold line breaks.
    with open(root / metadata, encoding="utf-8-sig", errors="replace", newline="") as f:
        try:
            for line, row in read(f):
                picture = pathlib.PurePosixPath(row["file_name"])
                if picture.is_absolute() or ".." in picture.parts:
                    raise _leaves(str(picture), f"{root / metadata} line {line}")
                yield (folder / picture).as_posix(), row["text"]
        # A DataError is also a ValueError, and the next clause would wrap it.
        except errors.Error:
            raise
        except (ValueError, TypeError, KeyError, RecursionError, csv.Error) as e:
            raise errors.DataError(
                f"does not read near line {line}: {type(e).__name__} {e}",
                where=str(root / metadata),
                fix=f"each row needs file_name and text, as in {EXAMPLE}",
            ) from e


def _json_rows(file):
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, json.loads(line)


def _csv_rows(file):
    reader = csv.DictReader(file)
    for row in reader:
        yield reader.line_num, row


def _leaves(name, where) -> errors.DataError:
    return errors.DataError(
        f"{name!r} leads out of the folder",
        where=str(where),
        fix="copy the file into the folder",
    )


def _share(name: str) -> float:
    """A number in [0, 1) for a name, the same on every machine."""
    # By the name alone: new files do not move old ones from one split to the other.
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64
