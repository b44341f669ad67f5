"""Caption states of a frozen encoder, computed once per distinct caption and kept in memory."""

import time

import numpy as np
from absl import logging

from t2i_jax import errors
from t2i_jax.data import transforms

BUCKET = 8  # captions are encoded at lengths that are multiples of this
LIMIT = 8 * 2**30  # bytes of states


def arrays(cond) -> dict:
    """A Cond as the arrays that a batch brings in its place: float16."""
    return {
        "cond_seq": cond.seq_BLD.astype(np.float16),
        "cond_pooled": cond.pooled_BD.astype(np.float16),
    }


def precompute(encode, source, tokenize, *, batch_size: int = 64):
    """Encodes every caption of a source.   -> `extra(records) -> {"cond_seq", "cond_pooled"}`

    Args:
      encode: batch {"text", "mask"} -> Cond, the frozen encoder.
      source: its captions are read once, by `captions()` where it has that.
      tokenize: captions -> (text_BL, mask_BL, cut).
    Returns:
      For the loader: record numbers -> float16 token states BLD (zero beyond a caption's end) and
      pooled BD. States are stored ragged.
    Raises:
      ConfigError: they would take more than LIMIT bytes.
    """
    started = time.perf_counter()
    row_of, row_of_record = {}, np.zeros(len(source), np.int64)
    for record, caption in enumerate(_captions(source)):
        row_of_record[record] = row_of.setdefault(caption, len(row_of))
    logging.info("encoding %d captions once …", len(row_of))
    text_NL, mask_NL, _ = tokenize(list(row_of))
    lengths = mask_NL.sum(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    order = np.argsort(lengths, kind="stable")
    flat = pooled = None
    for start in range(0, len(order), batch_size):
        rows = np.resize(order[start : start + batch_size], batch_size)
        width = min(-(-max(lengths[rows].max(), 1) // BUCKET) * BUCKET, text_NL.shape[1])
        found = arrays(encode({"text": text_NL[rows, :width], "mask": mask_NL[rows, :width]}))
        seq, pool = (np.asarray(found[name]) for name in ("cond_seq", "cond_pooled"))
        if flat is None:
            _check_size(int(offsets[-1]) * seq.shape[-1] * seq.itemsize)
            flat = np.empty((offsets[-1], seq.shape[-1]), seq.dtype)
            pooled = np.empty((len(order), pool.shape[-1]), pool.dtype)
        for i, row in enumerate(rows):
            flat[offsets[row] : offsets[row + 1]] = seq[i, : lengths[row]]
            pooled[row] = pool[i]
    seconds = time.perf_counter() - started
    logging.info("encoded them in %.0f s (%.0f MB)", seconds, flat.nbytes / 1e6)

    def extra(records):
        seq = np.zeros((len(records), text_NL.shape[1], flat.shape[1]), np.float16)
        rows = row_of_record[records]
        for i, row in enumerate(rows):
            seq[i, : lengths[row]] = flat[offsets[row] : offsets[row + 1]]
        return {"cond_seq": seq, "cond_pooled": pooled[rows]}

    return extra


def _captions(source):
    if hasattr(source, "captions"):
        yield from source.captions()
        return
    for record in range(len(source)):
        try:
            yield source[record]["caption"]
        except transforms.BadExample:  # the loader gives its slot weight 0
            yield ""


def _check_size(size: int) -> None:
    if size > LIMIT:
        raise errors.ConfigError(
            f"the caption states would take {size / 2**30:.0f} GiB, {LIMIT / 2**30:.0f} at most",
            where="config.cache",
            fix="set --config.cache= (nothing): the encoder then runs in every step",
        )
