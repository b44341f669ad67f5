"""Captions -> token numbers.   B batch · L text length"""

import contextlib
import functools
import hashlib
import os
import unicodedata
from typing import NamedTuple

import numpy as np

from t2i_jax import errors, files
from t2i_jax.pretrained import hf
from t2i_jax.text import fast

CHARACTERS = 4096  # of a caption are read at most, so that its time is bounded
MARKS = 4  # combining marks kept on one character
BYTES_VOCAB = 260  # padding, start, end, one spare, 256 bytes
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),  # SentencePiece's
)
FILES = (
    *VOCABULARIES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


class Tokens(NamedTuple):
    """Padded token numbers (int32), True where a token is real, and what each caption lost."""

    text_BL: np.ndarray
    mask_BL: np.ndarray
    cut: list[str | None]


class Tokenizer:
    """`tokenizer(captions) -> Tokens` of fixed length, the same on every host and in any thread.

    encode: captions -> for each its numbers without special tokens, and a function from a number's
      place to the character where it begins.
    before, after: the special tokens round every caption. An empty caption has no tokens at all:
      its mask is all False, which means no condition.
    """

    def __init__(self, encode, *, before, after, pad, length, vocab_size, fingerprint):
        self._encode, self._before, self._after, self._pad = encode, before, after, pad
        self.length, self.vocab_size, self.fingerprint = length, vocab_size, fingerprint
        self._room = length - len(before) - len(after)
        if self._room < 1:
            raise errors.ConfigError(
                f"{length} tokens leave no room for a caption beside the special ones",
                where="config.text_length",
                fix=f"set it to {length - self._room + 1} or more",
            )

    def __call__(self, captions) -> Tokens:
        texts = [normalise(caption) for caption in captions]
        text_BL = np.full((len(texts), self.length), self._pad, np.int32)
        mask_BL = np.zeros(text_BL.shape, bool)
        cut = []
        for row, (ids, start) in enumerate(self._encode(texts)):
            kept, lost = len(ids), ""
            if kept > self._room:
                end, kept = start(self._room), self._room
                while kept and start(kept - 1) >= end:  # no half characters
                    kept -= 1
                lost = texts[row][end:]
            ids = [*self._before, *ids[:kept], *self._after] if kept else []
            text_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = True
            lost = f"{lost} {normalise(captions[row][CHARACTERS:])}".strip()
            cut.append(lost or None)
        return Tokens(text_BL, mask_BL, cut)


class Several:
    """Tokenizers of several encoders that read each caption: their tokens one after another.

    What a caption lost is the most that one of them lost.   fixed: tokens before the last
    encoder's, which alone may be cut shorter.
    """

    def __init__(self, tokenizers):
        self._each = tokenizers
        self.fixed = sum(t.length for t in tokenizers[:-1])
        self.length = sum(t.length for t in tokenizers)
        joined = " ".join(t.fingerprint for t in tokenizers)
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()

    def __call__(self, captions) -> Tokens:
        texts, masks, cuts = zip(*(tokenize(captions) for tokenize in self._each), strict=True)
        most = [max(cut, key=lambda lost: len(lost or "")) for cut in zip(*cuts, strict=True)]
        return Tokens(np.concatenate(texts, 1), np.concatenate(masks, 1), most)


def open(name: str, length: int) -> Tokenizer:
    """The tokenizer of a checkpoint (see hf.locate), or "bytes": UTF-8 bytes, no files.

    Args:
      name: where the checkpoint lies.
      length: tokens a caption is padded or cut to, special tokens included.

    Raises:
      ConfigError, DataError: no room for a caption; no checkpoint there, or no tokenizer in it.
    """
    if name == "bytes":
        return Tokenizer(
            _encode_bytes,
            before=[1],
            after=[2],
            pad=0,
            length=length,
            vocab_size=BYTES_VOCAB,
            fingerprint=hashlib.sha256(b"bytes").hexdigest(),
        )
    folder = hf.locate(name)
    _check_sizes(folder)
    with _of_library(folder):
        opened, pad = fast.open(folder) or _by_transformers(folder)
        # A file may ask for cutting and padding: we do both. Nothing changes the object from here
        # on, so threads can share it.
        opened.no_truncation()
        opened.no_padding()
        ids, bare = opened.encode("a").ids, opened.encode("a", add_special_tokens=False).ids
        at = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return Tokenizer(
        functools.partial(_encode_subwords, opened, folder),
        before=ids[:at],
        after=ids[at + len(bare) :],
        pad=pad,
        length=length,
        vocab_size=opened.get_vocab_size(),
        fingerprint=_fingerprint(folder),
    )


def _check_sizes(folder) -> None:
    """Raises DataError for a file that is too large to be a tokenizer's, before it is read."""
    for path in (folder / name for name in FILES):
        if path.is_file() and (size := path.stat().st_size) > files.LIMIT:
            raise errors.DataError(
                f"it has {size:,} bytes, more than {files.LIMIT:,}",
                where=str(path),
                fix="use the file that came with the published weights",
            )


def normalise(caption: str) -> str:
    """The text a tokenizer sees: the same on every host, in bounded time; idempotent.

    In this order: the first CHARACTERS characters; surrogates joined where they pair up; lone ones,
    replacement characters, controls, bidi and all other format characters removed, zero-width ones
    among them, but for the joiner inside an emoji; MARKS combining marks on a character; NFC; any
    white space is one space, none at the ends.

    Raises:
      DataError: the caption is not a string.
    """
    if not isinstance(caption, str):
        raise errors.DataError(
            f"a caption is of type {type(caption).__name__}",
            where="captions",
            fix="give a string; an empty one means no condition",
        )
    caption = caption[:CHARACTERS]
    if not caption.isascii():
        caption = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        caption = _limit_marks(_joiners(caption.translate(_CHARACTERS)))
        # Marks first, as sorting a pile of n takes n² steps; again, as some come apart in two.
        caption = _limit_marks(unicodedata.normalize("NFC", caption))
    return " ".join(caption.translate(_CHARACTERS).split())


class _Characters(dict):
    """code point -> what str.translate puts in its place, found as characters come up."""

    def __missing__(self, code):
        c = chr(code)
        kind = unicodedata.category(c)
        removed = c == "\ufffd" or (kind in ("Cc", "Cf", "Cs") and c != "\u200d")
        self[code] = " " if c.isspace() else None if removed else c
        return self[code]


_CHARACTERS = _Characters()


def _joiners(text: str) -> str:
    """Without zero-width joiners, but for those between symbols: they make one emoji of several."""
    symbol = lambda c: c == "\ufe0f" or unicodedata.category(c)[0] == "S"
    around = zip(" " + text, text, text[1:] + " ", strict=False)
    return "".join(c for a, c, b in around if c != "\u200d" or (symbol(a) and symbol(b)))


def _limit_marks(text: str) -> str:
    kept, run = [], 0
    for c in text:
        run = run + 1 if unicodedata.category(c)[0] == "M" else 0
        if run <= MARKS:
            kept.append(c)
    return "".join(kept)


def _by_transformers(folder):
    """The library's tokenizer that transformers makes of any of its files, and the padding."""
    # without torch, transformers says so at every import: we need none
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError("no vocabulary")  # transformers would make up an empty one
    whole = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return whole.backend_tokenizer, whole.pad_token_id or 0


@contextlib.contextmanager
def _of_library(folder):
    """What the libraries of tokenizers raise becomes an error of the folder.

    It is of many kinds. A panic of Rust code is no Exception, but tells as little.
    """
    try:
        yield
    except errors.Error:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        there = [name for name in FILES if (folder / name).is_file()]
        raise errors.DataError(
            f"no tokenizer works: {str(e).partition(chr(10))[0][:300]}; looked for "
            f"{', '.join(FILES)}; found {', '.join(there) or 'none'}",
            where=str(folder),
            fix="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from e


def _fingerprint(folder) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        if (folder / name).is_file():
            content = hashlib.sha256((folder / name).read_bytes())
            digest.update(f"{name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _encode_subwords(opened, folder, texts):
    with _of_library(folder):
        encodings = opened.encode_batch(texts, add_special_tokens=False)
    for encoding in encodings:
        yield encoding.ids, lambda i, offsets=encoding: offsets.offsets[i][0]


def _encode_bytes(texts):
    for text in texts:
        data = text.encode()
        yield [b + 4 for b in data], lambda i, data=data: len(data[:i].decode(errors="ignore"))
