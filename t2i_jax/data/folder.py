"""Pictures in a folder, captioned by metadata.jsonl, metadata.csv or a .txt beside each."""

import csv
import hashlib
import json
import os
import pathlib

from absl import logging

from t2i_jax import errors
from t2i_jax.data import transforms

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_LIMIT = 65_536  # characters read of a caption's file
SPLITS = ("train", "test")
EXAMPLE = '{"file_name": "cat.png", "text": "a cat on a red sofa"}'


class Source:
    """Examples {"image": uint8 HWC, "caption": str}, read when asked for."""

    def __init__(self, root: pathlib.Path, examples: list, fingerprint: str, res: int, pad: bool):
        self._root, self._examples, self._res, self._pad = root, examples, res, pad
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict:
        name, caption = self._examples[index]
        if not isinstance(caption, str):
            raise transforms.BadExample(f"caption is no text: {type(caption).__name__} for {name}")
        try:
            image_HWC = transforms.decode((self._root / name).read_bytes(), self._res)
        except FileNotFoundError as e:
            raise transforms.BadExample(f"missing file: {name}") from e
        except transforms.BadExample as e:
            raise transforms.BadExample(f"{e} in {name}") from e
        return {"image": transforms.pad(image_HWC) if self._pad else image_HWC, "caption": caption}

    def captions(self) -> list[str]:
        """All captions, without opening a picture; "" where one is no text."""
        return [caption if isinstance(caption, str) else "" for _, caption in self._examples]


def make(
    path, *, split: str = "train", res: int = 32, holdout: float = 0.0, pad: bool = False
) -> Source:
    """The PNG, JPEG and WebP pictures below a folder, in the order of their names.

    A picture's captions are its rows in metadata files of its own folder or one above, with keys
    file_name (relative to the metadata file) and text, each row an example; without any, the .txt
    file of the same name. Beside a metadata.jsonl, a metadata.csv is not read. An empty caption
    means no condition. Left out, and counted in a warning: pictures without a caption, and rows
    whose picture is not there. Hidden files are not looked at.

    Args:
      path: the folder.
      split: "train" or "test".
      res: side of the squares wanted in the end; large photographs are decoded near it.
      holdout: share of the pictures, chosen by a hash of their names, that only "test" has.
      pad: white bars instead of cutting off what lies beyond the middle square.
    Raises:
      DataError: no pictures, no captions, a metadata file that does not read, or a name or link
        that leaves the folder.
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
            fix="change config.data.holdout: 0.05 leaves 5 % to the test split",
        )
    digest = hashlib.sha256()
    for name, caption in chosen:
        digest.update(json.dumps([name, sizes[name], caption]).encode() + b"\n")
    return Source(root, chosen, digest.hexdigest(), res, pad)


def scan(path) -> tuple[pathlib.Path, dict[str, int], list[str]]:
    """A folder, the sizes of its picture, caption and metadata files by name, and its pictures.

    Raises:
      DataError: no folder, no picture in it, or a link that leaves it.
    """
    root = pathlib.Path(path).expanduser().resolve()
    if not path or not root.is_dir():
        raise errors.DataError(
            "no such folder", where=str(path or "config.data.path"), fix="give a folder of pictures"
        )
    sizes = dict(sorted(_scan(root, root)))
    pictures = [name for name in sizes if name.lower().endswith(PICTURES)]
    if not pictures:
        raise errors.DataError(
            f"no pictures: looked for {', '.join(PICTURES)} in it and below",
            where=str(root),
            fix="check the path, or convert the pictures to one of these formats",
        )
    return root, sizes, pictures


def _scan(root, folder):
    """(name relative to root, size) of each picture, caption and metadata file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = pathlib.Path(entry.path).relative_to(root).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if not pathlib.Path(os.path.realpath(entry.path)).is_relative_to(root):
                    raise _leaves(name, root)
                if not os.path.exists(entry.path):  # a loop of links, too
                    logging.warning("%s: %r is a link that leads nowhere: left out", root, name)
                    continue
                if entry.is_dir():
                    continue  # what it points to is met at its own place
            if entry.is_dir():
                yield from _scan(root, entry.path)
            elif entry.is_file() and name.lower().endswith((*PICTURES, ".txt", *METADATA)):
                yield name, entry.stat().st_size


def captioned(root, sizes, pictures, *, warn: bool = True) -> list:
    """[(picture, caption), …] in the order of names; warns of what is left out.

    Raises:
      DataError: no captions, or a metadata file that does not read.
    """
    captions, absent = {}, []
    for metadata in [name for name in sizes if pathlib.PurePosixPath(name).name in METADATA]:
        if f"{metadata.removesuffix('csv')}jsonl" in sizes:
            continue
        for name, caption in _rows(root, metadata):
            if name in sizes:
                captions.setdefault(name, []).append(caption)
            else:
                absent.append(name)
    for picture in pictures:
        beside = str(pathlib.PurePosixPath(picture).with_suffix(".txt"))
        if picture not in captions and beside in sizes:
            with open(root / beside, encoding="utf-8-sig", errors="replace") as f:
                captions[picture] = [f.read(CAPTION_LIMIT).strip()]
    bare = [picture for picture in pictures if picture not in captions]
    examples = [(p, caption) for p in pictures if p in captions for caption in captions[p]]
    if not examples:
        raise errors.DataError(
            f"no captions for {len(pictures)} pictures: looked for {', '.join(METADATA)} and a "
            f".txt beside each picture; {len(absent)} rows name pictures that are not there",
            where=str(root),
            fix=f"write metadata.jsonl with lines like {EXAMPLE}",
        )
    empty = [name for name, caption in examples if caption == ""]
    foreign = [name for name, caption in examples if "\ufffd" in str(caption)]
    for names, what in (
        (bare, "pictures have no caption and are left out"),
        (absent, "rows of metadata name pictures that are not there"),
        (foreign, "captions are not in UTF-8: their other letters are lost"),
        (empty, "captions are empty: these pictures train without condition"),
    ):
        if names and warn:
            shown = ", ".join(names[:5]) + " …" * (len(names) > 5)
            logging.warning("%s: %d %s: %s", root, len(names), what, shown)
    return examples


def _rows(root, metadata: str):
    """(picture relative to root, caption) of each row of a metadata file."""
    folder, line = pathlib.PurePosixPath(metadata).parent, 0
    read = _json_rows if metadata.endswith("jsonl") else _csv_rows
    with open(root / metadata, encoding="utf-8-sig", errors="replace", newline="") as f:
        try:
            for line, row in read(f):
                picture = pathlib.PurePosixPath(row["file_name"])
                if picture.is_absolute() or ".." in picture.parts:
                    raise _leaves(str(picture), f"{root / metadata} line {line}")
                yield (folder / picture).as_posix(), row["text"]
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
    """A number in [0, 1) for a name, the same everywhere."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64
