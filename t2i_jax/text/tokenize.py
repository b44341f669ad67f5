"""Captions to token ids, by the tokenizer in the checkpoint's own folder.   B batch · L length"""

import hashlib
import os
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from t2i_jax import errors
from t2i_jax.text import hf

CHARACTER_LIMIT = 2000  # of a caption; what lies beyond is cut before the tokenizer sees it
MARK_LIMIT = 4  # combining marks in a row that are kept
_BIDI = set(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)))
_INVISIBLE = set("\u200b\u2060\ufeff\u00ad")  # U+200D stays: it joins emoji
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


class Tokens(NamedTuple):
    """text_BL int32, mask_BL bool, and per caption the text that did not fit (None: all of it did)."""

    text_BL: np.ndarray
    mask_BL: np.ndarray
    cut: list[str | None]


def normalise(caption: str) -> str:
    """The caption as every host and every model sees it.

    At most 2,000 characters; NFC; lone surrogates, control characters, bidirectional overrides and
    invisible characters removed; at most four combining marks in a row; white space folded.

    Raises:
      DataError: it is no string.
    """
    if not isinstance(caption, str):
        raise errors.DataError(
            f"a caption is {type(caption).__name__}", where="captions", fix="give strings"
        )
    text = unicodedata.normalize("NFC", caption[:CHARACTER_LIMIT])
    text = re.sub(r"\s+", " ", text)
    kept, marks = [], 0
    for c in text:
        kind = unicodedata.category(c)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if kind not in ("Cc", "Cs") and c not in _BIDI | _INVISIBLE and marks <= MARK_LIMIT:
            kept.append(c)
    return " ".join("".join(kept).split())


class Tokenizer:
    """`tokenizer(captions) -> Tokens`, always padded to `length`; an empty caption has no valid token."""

    def __init__(self, encode, decode, *, length: int, pad: int, vocab_size: int, fingerprint: str):
        self._encode, self._decode, self._pad = encode, decode, pad
        self.length, self.vocab_size, self.fingerprint = length, vocab_size, fingerprint

    def __call__(self, captions) -> Tokens:
        text_BL = np.full((len(captions), self.length), self._pad, np.int32)
        mask_BL = np.zeros((len(captions), self.length), bool)
        cut: list[str | None] = [None] * len(captions)
        for row, caption in enumerate(captions):
            text = normalise(caption)
            if not text:
                continue
            ids, specials = self._encode(text)
            if len(ids) > self.length:  # the closing special token stays
                keep = self.length - specials
                cut[row] = self._decode(ids[keep : len(ids) - specials])
                ids = ids[:keep] + ids[len(ids) - specials :]
            if len(caption) > CHARACTER_LIMIT:
                cut[row] = (cut[row] or "") + caption[CHARACTER_LIMIT:]
            text_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = True
        return Tokens(text_BL, mask_BL, cut)


def open(name: str, length: int) -> Tokenizer:  # noqa: A001 reads as tokenize.open
    """The tokenizer of a checkpoint (see hf.locate), or "bytes": UTF-8 bytes, no files, 260 ids.

    Raises:
      ConfigError, DataError: no such checkpoint, or no tokenizer in it.
    """
    return _bytes(length) if name == "bytes" else _pretrained(hf.locate(name), length)


def _bytes(length):
    def encode(text):
        return [1, *(b + 4 for b in text.encode()), 2], 1

    def decode(ids):
        return bytes(i - 4 for i in ids).decode(errors="replace")

    return Tokenizer(encode, decode, length=length, pad=0, vocab_size=260, fingerprint="bytes")


def _pretrained(folder, length):
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that torch is missing is no news
    import transformers

    files = [folder / name for name in _JSON if (folder / name).exists()]
    try:
        auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises many kinds
        raise errors.DataError(
            f"no tokenizer opens: {(str(e).splitlines() or [''])[0][:200]}",
            where=str(folder),
            fix=f"the folder needs tokenizer.json; found {[f.name for f in files]}",
        ) from e
    specials = auto.num_special_tokens_to_add()
    closing = max(specials - 1, 0)  # one opens, the others close

    def encode(text):
        return auto(
            text, add_special_tokens=True, truncation=False, verbose=False
        ).input_ids, closing

    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return Tokenizer(
        encode,
        lambda ids: auto.decode(ids),
        length=length,
        pad=auto.pad_token_id or 0,
        vocab_size=len(auto),
        fingerprint=digest.hexdigest(),
    )
