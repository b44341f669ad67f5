"""The words of a model's training captions. Drawing warns of other words in a prompt.

They are stored in words.txt, one on each line, in a run's workdir and in an exported model. Older
runs and models have no such file.
"""

import difflib
import pathlib
import re
import unicodedata

from t2i_jax import images

FILE = "words.txt"
LIMIT = 100_000  # words of the longest list: with more, hardly a word would be missing
LARGEST = 2**24  # bytes of the largest words.txt that is read
SHOWN = 8  # unknown words that one message names
FEW = 60  # a list of so few words is shown whole
SCANNED = 50_000  # captions that are read from a disk at most

# In scripts without spaces (Thai to Khmer, kana, Han) each character counts as a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


def of(text: str) -> list[str]:
    """The words of a text in order, in lower case."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())  # as tokenizers read it


def collect(source) -> set[str] | None:
    """The words of a data source's captions, or None where collecting them would take too long.

    They come from the source's `words()`, if it has that, else from its `captions()`. Captions that
    lie on a disk are read only where there are at most SCANNED.
    """
    if hasattr(source, "words"):
        return set(source.words())
    captions = source.captions() if hasattr(source, "captions") else None
    if captions is None or not (isinstance(captions, list) or len(source) <= SCANNED):
        return None
    words = set()
    for caption in captions:
        words.update(of(caption))
        if len(words) > LIMIT:
            return None
    return words


def write(folder: pathlib.Path, words) -> None:
    """Writes words.txt into a folder."""
    images.write_whole(folder / FILE, "".join(f"{word}\n" for word in sorted(words)).encode())


def read(folder: pathlib.Path) -> frozenset[str] | None:
    """The words of a folder's words.txt, or None where it is missing or broken."""
    try:
        if (folder / FILE).stat().st_size > LARGEST:
            return None
        return frozenset((folder / FILE).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return None


def unknown(text: str, words) -> list[str]:
    """The words of a text that are not in `words`, each once, in order."""
    return [word for word in dict.fromkeys(of(text)) if word not in words]


def message(missing, words) -> str:
    """A warning of words that the training never saw, with similar words that it did see."""
    parts = []
    for word in missing[:SHOWN]:
        near = difflib.get_close_matches(word, words, n=2, cutoff=0.7)
        parts.append(f"{word!r}" + f" (near to it: {', '.join(near)})" * bool(near))
    more = f" and {len(missing) - SHOWN} more words" * (len(missing) > SHOWN)
    text = f"the model's training never saw {', '.join(parts)}{more}"
    return text + f"; it knows: {' '.join(sorted(words))}" * (len(words) <= FEW)
