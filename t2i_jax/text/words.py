"""The words of a model's training captions, so that drawing can tell which of a prompt are others.

They lie as words.txt, one a line, in a run's workdir and an exported model. Older ones have none.
"""

import difflib
import pathlib
import re

from t2i_jax import images

FILE = "words.txt"
LIMIT = 100_000  # words; beyond, a list is large, and hardly a word is missing
LARGEST = 2**24  # bytes of a list
SHOWN = 8  # words that one message names
FEW = 60  # words that a message can name
SCANNED = 50_000  # captions at most that are read from a disk for their words

# Scripts without spaces (Thai to Khmer, kana, Han) count a character as a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


def of(text: str) -> list[str]:
    """The words of a text in order, without regard to case."""
    return _WORD.findall(text.casefold())


def collect(source) -> set[str] | None:
    """The words of a data source's captions, or None where they cannot be told cheaply.

    A source may have `words()`; else its `captions()` are read, from a disk no more than SCANNED.
    """
    if hasattr(source, "words"):
        return set(source.words())
    captions = source.captions() if hasattr(source, "captions") else None
    if captions is None or not (isinstance(captions, list) or len(source) <= SCANNED):
        return None
    found = set()
    for caption in captions:
        found.update(of(caption))
        if len(found) > LIMIT:
            return None
    return found


def write(folder: pathlib.Path, words) -> None:
    images.write_whole(folder / FILE, "".join(f"{word}\n" for word in sorted(words)).encode())


def read(folder: pathlib.Path) -> frozenset[str] | None:
    """What `write` wrote, or None where there is no such file, or none that can be read."""
    try:
        if (folder / FILE).stat().st_size > LARGEST:
            return None
        return frozenset((folder / FILE).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return None


def unknown(text: str, words) -> list[str]:
    """The text's words that are not among the given ones, each once, in order."""
    return [word for word in dict.fromkeys(of(text)) if word not in words]


def message(missing, words) -> str:
    """What to tell of words that the training never saw."""
    parts = []
    for word in missing[:SHOWN]:
        near = difflib.get_close_matches(word, words, n=2, cutoff=0.7)
        parts.append(f"{word!r}" + f" (near to it: {', '.join(near)})" * bool(near))
    more = f" and {len(missing) - SHOWN} more words" * (len(missing) > SHOWN)
    text = f"the model's training never saw {', '.join(parts)}{more}"
    return text + f"; it knows: {' '.join(sorted(words))}" * (len(words) <= FEW)
