"""Caption states of a frozen encoder, computed once per distinct caption and kept in memory."""

import time

import numpy as np
from absl import logging

from t2i_jax.data import transforms

BUCKET = 8  # captions are encoded at lengths that are multiples of this


def precompute(encode, source, tokenize, *, batch_size: int = 64):
    """Encodes every caption of a source.   -> `extra(records) -> {"cond_seq", "cond_pooled"}`

    Args:
      encode: batch {"text", "mask"} -> Cond, the frozen encoder.
      source: its captions are read once.
      tokenize: captions -> (text_BL, mask_BL, cut).
    Returns:
      For the loader: record numbers -> float16 token states BLD (zero beyond a caption's end) and
      pooled BD. States are stored ragged.
    """
    started = time.perf_counter()
    row_of, row_of_record = {}, np.zeros(len(source), np.int64)
    for record in range(len(source)):
        try:
            caption = source[record]["caption"]
        except transforms.BadExample:  # the loader gives its slot weight 0
            caption = ""
        row_of_record[record] = row_of.setdefault(caption, len(row_of))
    logging.info("encoding %d captions once …", len(row_of))
    text_NL, mask_NL, _ = tokenize(list(row_of))
    lengths = mask_NL.sum(1)
    order = np.argsort(lengths, kind="stable")
    states, pooled = [None] * len(row_of), [None] * len(row_of)
    for start in range(0, len(order), batch_size):
        rows = np.resize(order[start : start + batch_size], batch_size)
        width = min(-(-max(lengths[rows].max(), 1) // BUCKET) * BUCKET, text_NL.shape[1])
        cond = encode({"text": text_NL[rows, :width], "mask": mask_NL[rows, :width]})
        seq = np.asarray(cond.seq_BLD).astype(np.float16)
        pool = np.asarray(cond.pooled_BD).astype(np.float16)
        for i, row in enumerate(rows):
            states[row], pooled[row] = seq[i, : lengths[row]], pool[i]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat, pooled = np.concatenate(states), np.stack(pooled)
    logging.info(
        "encoded %d captions in %.0f s (%.0f MB)",
        len(row_of),
        time.perf_counter() - started,
        flat.nbytes / 1e6,
    )

    def extra(records):
        seq = np.zeros((len(records), text_NL.shape[1], flat.shape[1]), np.float16)
        rows = row_of_record[records]
        for i, row in enumerate(rows):
            seq[i, : lengths[row]] = flat[offsets[row] : offsets[row + 1]]
        return {"cond_seq": seq, "cond_pooled": pooled[rows]}

    return extra
