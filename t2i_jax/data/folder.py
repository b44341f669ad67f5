"""Pictures in a folder, captioned by metadata.jsonl, metadata.csv or a .txt beside each."""

import collections
import csv
import hashlib
import json
import os
import pathlib
import unicodedata

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
        shown = printable(name)
        if not isinstance(caption, str):
            raise transforms.BadExample(f"caption is no text: {type(caption).__name__} for {shown}")
        try:
            image_HWC = transforms.decode((self._root / name).read_bytes(), self._res)
        except FileNotFoundError as e:
            raise transforms.BadExample(f"missing file: {shown}") from e
        except transforms.BadExample as e:
            raise transforms.BadExample(f"{e} in {shown}") from e
        return {"image": transforms.pad(image_HWC) if self._pad else image_HWC, "caption": caption}

    def where(self, index: int) -> str:
        """The file of an example."""
        return printable(self._root / self._examples[index][0])

    def captions(self) -> list[str]:
        """All captions, without opening a picture; "" where one is no text."""
        return [caption if isinstance(caption, str) else "" for _, caption in self._examples]


def make(
    path, *, split: str = "train", res: int = 32, holdout: float = 0.0, pad: bool = False
) -> Source:
    """The PNG, JPEG and WebP pictures below a folder, in the order of their names.

    A picture's captions are its rows in metadata files of its own folder or one above, with keys
    file_name (relative to the metadata file) and text, each row an example; without any, the first
    line of the .txt file of the same name. Beside a metadata.jsonl, a metadata.csv is not read. An
    empty caption means no condition. Pictures without a caption are left out. Hidden files are not
    looked at. A line of the log says how many pictures and other files there are and how many are
    used; warnings name the first of those that are not.

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
            fix="train with another config.data.holdout: 0.05 leaves some 5 % of the pictures to "
            "the split 'test', which is too few of a small folder",
        )
    if holdout:
        logging.info("%s: %d of %d examples in %r", root, len(chosen), len(examples), split)
    digest = hashlib.sha256()
    for name, caption in chosen:
        digest.update(json.dumps([name, sizes[name], caption]).encode() + b"\n")
    return Source(root, chosen, digest.hexdigest(), res, pad)


def scan(path) -> tuple[pathlib.Path, dict[str, int], list[str]]:
    """A folder, the sizes of its visible files by name, and which of them are pictures.

    The size of what is no file, such as a link to nothing, is −1.

    Raises:
      DataError: no folder, no picture in it, or a link that leaves it.
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
    """(name relative to root, size) of each visible file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = pathlib.Path(entry.path).relative_to(root).as_posix()
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if not pathlib.Path(os.path.realpath(entry.path)).is_relative_to(root):
                    raise _leaves(name, root)
                if not os.path.exists(entry.path):  # a loop of links, too
                    yield name, -1
                    continue
                if entry.is_dir():
                    continue  # what it points to is met at its own place
            if entry.is_dir():
                yield from _scan(root, entry.path)
            else:
                yield name, entry.stat().st_size if entry.is_file() else -1


def captioned(root, sizes, pictures, *, warn: bool = True) -> list:
    """[(picture, caption), …] in the order of names; tells what there is and what is left out.

    Raises:
      DataError: no captions, or a metadata file that does not read.
    """
    captions, absent, unread, cut, read = {}, [], [], [], set()
    names = {unicodedata.normalize("NFC", name): name for name in sizes}
    known = set(pictures)
    for metadata in [n for n in sizes if pathlib.PurePosixPath(n).name.lower() in METADATA]:
        if f"{metadata[:-3]}jsonl" in sizes:  # of a metadata.csv
            continue
        read.add(metadata)
        for name, caption in _rows(root, metadata):
            name = name if name in sizes else names.get(unicodedata.normalize("NFC", name), name)
            if name in known:
                captions.setdefault(name, []).append(caption)
            else:
                (unread if sizes.get(name, -1) >= 0 else absent).append(name)
    texts = {n[:-4]: n for n, size in sizes.items() if n.lower().endswith(".txt") and size >= 0}
    for picture in pictures:
        beside = texts.get(picture.rpartition(".")[0])
        if picture in captions or not beside:
            continue
        read.add(beside)
        with open(root / beside, encoding="utf-8-sig", errors="replace") as f:
            caption, _, more = f.read(CAPTION_LIMIT).strip().partition("\n")
        captions[picture] = [caption.strip()]
        if more.strip():
            cut.append(beside)
    bare = [picture for picture in pictures if picture not in captions]
    examples = [
        (p, "" if isinstance(caption, str) and not caption.strip() else caption)
        for p in pictures
        if p in captions
        for caption in captions[p]
    ]
    others = _by_kind({n for n, size in sizes.items() if size >= 0} - known - read)
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


def _warn(root, names, what: str) -> None:
    if names:
        shown = ", ".join(map(printable, names[:5])) + " …" * (len(names) > 5)
        logging.warning("%s: %d %s: %s", printable(root), len(names), what, shown)


def _by_kind(names) -> str:
    """How many files of each extension, such as "2 .gif, 1 .svg"."""
    kinds = collections.Counter(
        pathlib.PurePosixPath(name).suffix.lower() or pathlib.PurePosixPath(name).name
        for name in names
    )
    kinds = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {printable(kind)}" for kind, count in kinds[:8]]
    return ", ".join(shown) + " …" * (len(kinds) > 8)


def printable(path) -> str:
    """A path with what is not UTF-8 in it escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _rows(root, metadata: str):
    """(picture relative to root, caption) of each row of a metadata file."""
    folder, line = pathlib.PurePosixPath(metadata).parent, 0
    read = _json_rows if metadata.lower().endswith("jsonl") else _csv_rows
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
