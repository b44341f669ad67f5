"""Captions -> token numbers, and back.   B batch · L text length"""

import contextlib
import copy
import functools
import hashlib
import os
import unicodedata
from collections.abc import Mapping

import numpy as np

from t2i_jax import errors, files
from t2i_jax.models.types import Tokens
from t2i_jax.pretrained import hf
from t2i_jax.text import fast

CHARACTERS = 4096  # of a caption are read at most, so that its time is bounded
MARKS = 4  # combining marks kept on one character
STARTS = ("▁", "Ġ")  # tokens that stand before a word: of SentencePiece, of BPE over bytes
BYTES_VOCAB = 260  # padding, start, end, one spare, 256 bytes
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),  # SentencePiece's
)
FILES = (
    *VOCABULARIES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


class Tokenizer:
    """`tokenizer(captions) -> (Tokens, what each caption lost, or None)`, of fixed length; the same
    on every host and in any thread.

    encode: captions -> for each its numbers without special tokens, a function from a number's
      place to the character where it begins, and one that tells whether it is one of STARTS.
    decode: lists of numbers -> strings, without special tokens.
    before, after: the special tokens round every caption.
    end: the number that ends a caption, None where the tokenizer has no such token.
    pad: what stands behind a caption. It may be the number of a word, too: the mask tells.
    """

    def __init__(self, encode, decode, *, before, after, end, pad, length, vocab_size, fingerprint):
        self._encode, self._decode, self._before, self._after = encode, decode, before, after
        self.length, self.vocab_size, self.fingerprint = length, vocab_size, fingerprint
        self.end, self.pad, self._normalised = end, pad, normalise
        self._room = length - len(before) - len(after)
        if self._room < 1:
            raise errors.ConfigError(
                f"{length} tokens leave no room for a caption beside the special ones",
                where="config.text_length",
                fix=f"set it to {length - self._room + 1} or more",
            )

    def __call__(self, captions) -> tuple[Tokens, list[str | None]]:
        texts = [self._normalised(caption) for caption in captions]
        ids_BL = np.full((len(texts), self.length), self.pad, np.int32)
        mask_BL = np.zeros(ids_BL.shape, bool)
        cut = []
        for row, (ids, start, whole) in enumerate(self._encode(texts)):
            kept, lost = len(ids), ""
            if kept > self._room:
                end, kept = start(self._room), self._room
                # No half characters. The mark of a word's start is none, though it begins there.
                while kept and start(kept - 1) >= end and not whole(kept - 1):
                    kept -= 1
                lost = texts[row][end:]
            # An empty caption has no token at all, and so is the null condition.
            ids = [*self._before, *ids[:kept], *self._after] if kept else []
            ids_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = True
            lost = f"{lost} {normalise(captions[row][CHARACTERS:])}".strip()
            cut.append(lost or None)
        return Tokens(ids_BL, mask_BL), cut

    def lowered(self) -> "Tokenizer":
        """One that reads captions in lower case."""
        other = copy.copy(self)
        # Again, as one letter may become two characters, which the limits have to count.
        other._normalised = lambda caption: normalise(normalise(caption).lower())
        other.fingerprint = f"{self.fingerprint}-lowered"
        return other

    @property
    def special(self) -> list[int]:
        """The tokens round a caption, which an empty one consists of where it is a condition."""
        return [*self._before, *self._after]

    def decode(self, ids_BL, mask_BL=None) -> list[str]:
        """The texts of rows of numbers, without special tokens.

        mask_BL: where it is False, a number is left out, as padding is; default: none is.
        """
        rows = [np.asarray(row) for row in ids_BL]
        if mask_BL is not None:
            rows = [row[np.asarray(mask)] for row, mask in zip(rows, mask_BL, strict=True)]
        ends = {*self._before, *self._after, self.end}  # not every file marks them as special
        return self._decode([[i for i in row.tolist() if i not in ends] for row in rows])


def read(tokenizer, captions):
    """Tokens of captions, by one tokenizer or by several with a name each.

    -> Tokens, or name -> Tokens; and of each caption what was cut off, the most that any cut
    """
    if not isinstance(tokenizer, Mapping):
        return tokenizer(captions)
    tokens, cuts = zip(*(one(captions) for one in tokenizer.values()), strict=True)
    most = [max(cut, key=lambda lost: len(lost or "")) for cut in zip(*cuts, strict=True)]
    return dict(zip(tokenizer, tokens, strict=True)), most


def fingerprint(tokenizer) -> str:
    """Of one tokenizer, or of several together."""
    if not isinstance(tokenizer, Mapping):
        return tokenizer.fingerprint
    joined = " ".join(one.fingerprint for one in tokenizer.values())
    return hashlib.sha256(joined.encode()).hexdigest()


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
            _decode_bytes,
            before=[1],
            after=[2],
            end=2,
            pad=0,
            length=length,
            vocab_size=BYTES_VOCAB,
            fingerprint=hashlib.sha256(b"bytes").hexdigest(),
        )
    return _open(hf.tokenizer(hf.locate(name)), length)


@files.remembered
def _open(folder, length: int) -> Tokenizer:
    _check_sizes(folder)
    with _of_library(folder):
        opened, pad, end = fast.open(folder) or _by_transformers(folder)
        # A file may ask for cutting and padding: we do both. Nothing changes the object from here
        # on, so threads can share it.
        opened.no_truncation()
        opened.no_padding()
        # What stands round this caption stands round every other.
        ids, bare = opened.encode("a").ids, opened.encode("a", add_special_tokens=False).ids
        at = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return Tokenizer(
        functools.partial(_encode_subwords, opened, folder),
        functools.partial(_decode_subwords, opened),
        before=ids[:at],
        after=(after := ids[at + len(bare) :]),
        end=after[-1] if after else end,
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
    # ASCII has no surrogates, marks or joiners, and is most of all captions.
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
    """The library's tokenizer that transformers makes of any of its files, the padding's number and
    the end's.
    """
    # without torch, transformers says so at every import: we need none
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError("no vocabulary")  # transformers would make up an empty one
    whole = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return whole.backend_tokenizer, whole.pad_token_id or 0, whole.eos_token_id


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
        # A function, as the library makes all offsets when asked, and only cut captions need them.
        yield (
            encoding.ids,
            lambda i, one=encoding: one.offsets[i][0],
            lambda i, one=encoding: one.tokens[i] in STARTS,
        )


def _encode_bytes(texts):
    for text in texts:
        data = text.encode()
        start = lambda i, data=data: len(data[:i].decode(errors="ignore"))
        yield [b + 4 for b in data], start, lambda i: False


def _decode_subwords(opened, rows):
    texts = opened.decode_batch(rows, skip_special_tokens=True)
    # CLIP's words end in "</w>", which the decoder in its file leaves there.
    end = getattr(opened.model, "end_of_word_suffix", None)
    return [text.replace(end, " ").strip() for text in texts] if end else texts


def _decode_bytes(rows):
    kept = (bytes(i - 4 for i in row if 4 <= i < BYTES_VOCAB) for row in rows)
    return [data.decode(errors="replace") for data in kept]
