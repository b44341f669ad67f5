"""Caption states of a frozen encoder, computed once for every distinct caption.

python -m t2i_jax.data.cache --config=configs/shapes_flow.py --workdir=runs/flow

writes them to <workdir>/captions, where training finds them; without that command training computes
them before its first step and keeps them in memory. After a kill the command goes on with the next
file.

N captions · B batch · L text length · V valid tokens of a caption · D width · P pooled width
"""

import hashlib
import json
import pathlib
import time

import jax
import numpy as np
from absl import flags, logging
from array_record.python import array_record_data_source, array_record_module
from ml_collections import config_flags

from t2i_jax import cli, errors, failpoints, fingerprint, images
from t2i_jax.data import transforms

FORMAT = 1
BUCKET = 8  # captions are encoded at lengths that are multiples of this
BATCH = 64
LIMIT = 8 * 2**30  # bytes of states in memory
SHARD = 64 * BATCH  # captions in a file
FOLDER, MANIFEST, BUILDING, PLACES = "captions", "manifest.json", "building.json", "places.npy"
DTYPE = np.dtype(np.float16)  # finer than bfloat16 at the same size: states are near 1


def arrays(cond) -> dict:
    """A Cond as the arrays that a batch brings in its place: float16."""
    return {"cond_seq": cond.seq_BLD.astype(DTYPE), "cond_pooled": cond.pooled_BD.astype(DTYPE)}


def identity(nets, source, tokenize, prediction: str) -> dict:
    """What the states depend on: encoder, tokenizer and data by hashes, and the text length."""
    prints, _ = fingerprint.of(nets)
    return {
        "format": FORMAT,
        "prediction": prediction,
        "encoder": hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest(),
        "tokenizer": tokenize.fingerprint,
        "data": source.fingerprint,
        "text_length": tokenize.length,
    }


def extra(folder: pathlib.Path, encode, source, tokenize, known: dict):
    """`extra(records, mask_BL) -> {"cond_seq", "cond_pooled"}` for the loader.

    From the folder if it holds states, else computed now and kept in memory.

    Raises:
      ConfigError: the folder's states are another encoder's, tokenizer's or data set's, or those in
        memory would take more than LIMIT bytes.
    """
    if not (folder / MANIFEST).exists():
        return precompute(encode, source, tokenize)
    manifest = json.loads((folder / MANIFEST).read_text())
    stale = [key for key in known if manifest.get(key) != known[key]]
    if stale:
        stale = [f"{key} {str(manifest.get(key))[:12]} → {str(known[key])[:12]}" for key in stale]
        raise errors.ConfigError(
            "the cached captions are stale: " + "; ".join(stale),
            where=str(folder),
            fix="remove the folder, and make it again with python -m t2i_jax.data.cache",
        )
    return _Stored(folder, manifest)


class _Stored:
    """States in files, read as batches ask for them."""

    def __init__(self, folder, manifest):
        self._places = np.load(folder / PLACES, allow_pickle=False)
        self._d, self._p = manifest["width"], manifest["pooled"]
        paths = []
        for name, size in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise errors.DataError(
                    f"not the {size} bytes that were written",
                    where=str(path),
                    fix="remove the folder, and make it again with python -m t2i_jax.data.cache",
                )
            paths.append(str(path))
        self._records = array_record_data_source.ArrayRecordDataSource(paths)
        logging.info("%d captions' states in %s", len(self._records), folder)

    def __call__(self, records, mask_BL) -> dict:
        seq = np.zeros((*mask_BL.shape, self._d), DTYPE)
        pooled = np.empty((len(records), self._p), DTYPE)
        found = self._records.__getitems__(self._places[records].tolist())
        for i, record in enumerate(found):
            values = np.frombuffer(record, DTYPE)
            pooled[i] = values[: self._p]
            seq[i, mask_BL[i]] = values[self._p :].reshape(-1, self._d)
        return {"cond_seq": seq, "cond_pooled": pooled}


def precompute(encode, source, tokenize, *, batch_size: int = BATCH):
    """Encodes every caption of a source into memory.   -> as `extra`

    Args:
      encode: batch {"text", "mask"} -> Cond, the frozen encoder.
      source: its captions are read once, by `captions()` where it has that.
      tokenize: captions -> (text_BL, mask_BL, cut).
    """
    started = time.perf_counter()
    captions = _Captions(source, tokenize)
    logging.info("encoding %d captions once …", len(captions.order))
    flat = pooled = None
    offsets = np.concatenate([[0], np.cumsum(captions.lengths)])
    for row, seq_VD, pooled_P in captions.states(encode, captions.order, batch_size):
        if flat is None:
            _check_size(int(offsets[-1]) * seq_VD.shape[-1] * DTYPE.itemsize)
            flat = np.empty((offsets[-1], seq_VD.shape[-1]), DTYPE)
            pooled = np.empty((len(captions.order), len(pooled_P)), DTYPE)
        flat[offsets[row] : offsets[row + 1]], pooled[row] = seq_VD, pooled_P
    seconds = time.perf_counter() - started
    logging.info("encoded them in %.0f s (%.0f MB)", seconds, flat.nbytes / 1e6)

    def from_memory(records, mask_BL):
        rows = captions.row_of_record[records]
        seq = np.zeros((*mask_BL.shape, flat.shape[1]), DTYPE)
        for i, row in enumerate(rows):
            seq[i, mask_BL[i]] = flat[offsets[row] : offsets[row + 1]]
        return {"cond_seq": seq, "cond_pooled": pooled[rows]}

    return from_memory


def write(folder: pathlib.Path, encode, source, tokenize, known: dict) -> dict:
    """Encodes every caption of a source into files.   -> the manifest

    Files that an earlier start finished, of the same identity, are kept.
    """
    captions = _Captions(source, tokenize)
    folder.mkdir(parents=True, exist_ok=True)
    building = folder / BUILDING
    if not building.exists() or json.loads(building.read_text()) != known:
        for path in [p for name in (MANIFEST, PLACES, "states-*") for p in folder.glob(name)]:
            path.unlink()
        images.write_whole(building, json.dumps(known).encode())
    order, files = captions.order, {}
    for start in range(0, len(order), SHARD):
        path = folder / f"states-{start // SHARD:05d}.array_record"
        rows = order[start : start + SHARD]
        if not path.exists():
            failpoints.hit("cache.file")
            temporary = path.with_suffix(".tmp")
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
            for _, seq_VD, pooled_P in captions.states(encode, rows, BATCH):
                writer.write(pooled_P.tobytes() + np.ascontiguousarray(seq_VD).tobytes())
            writer.close()
            temporary.replace(path)
            logging.info("%d of %d captions", start + len(rows), len(order))
        files[path.name] = path.stat().st_size
    _, seq_VD, pooled_P = next(captions.states(encode, order[:1], 1))
    sizes = {"width": seq_VD.shape[-1], "pooled": len(pooled_P), "dtype": DTYPE.name}
    place_of_row = np.empty(len(order), np.int64)
    place_of_row[order] = np.arange(len(order))
    with (folder / PLACES).open("wb") as f:
        np.save(f, place_of_row[captions.row_of_record])
    manifest = {**known, **sizes, "captions": len(order), "files": files}
    images.write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


class _Captions:
    """A source's distinct captions as tokens, and their rows in the order of their length."""

    def __init__(self, source, tokenize):
        row_of, self.row_of_record = {}, np.zeros(len(source), np.int64)
        for record, caption in enumerate(_captions(source)):
            self.row_of_record[record] = row_of.setdefault(caption, len(row_of))
        self._text_NL, self._mask_NL, _ = tokenize(list(row_of))
        self._least = getattr(tokenize, "fixed", 0) + 1
        last = self._mask_NL.shape[1] - self._mask_NL[:, ::-1].argmax(1)
        self._width_N = np.where(self._mask_NL.any(1), last, 0)
        self.lengths = self._mask_NL.sum(1)
        self.order = np.argsort(self._width_N, kind="stable")

    def states(self, encode, order, batch_size: int):
        """(row, its valid tokens' states VD, pooled P) of rows in this order, encoded in batches no
        longer than their longest caption, rounded up to a multiple of BUCKET.
        """
        for start in range(0, len(order), batch_size):
            wanted = order[start : start + batch_size]
            rows = np.resize(wanted, batch_size)
            width = max(self._width_N[rows].max(), self._least)
            width = min(-(-width // BUCKET) * BUCKET, self._text_NL.shape[1])
            mask_BL = self._mask_NL[rows, :width]
            found = arrays(encode({"text": self._text_NL[rows, :width], "mask": mask_BL}))
            seq, pooled = jax.device_get((found["cond_seq"], found["cond_pooled"]))
            if not (np.isfinite(seq).all() and np.isfinite(pooled).all()):
                raise errors.DataError(
                    f"caption states beyond what {DTYPE.name} holds",
                    where="config.cache",
                    fix="set --config.cache= (nothing): the encoder then runs in every step",
                )
            for i, row in enumerate(wanted):
                yield row, seq[i, mask_BL[i]], pooled[i]


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
            fix="write them to files first: python -m t2i_jax.data.cache with the same flags",
        )


def main():
    from t2i_jax import loop

    run = loop.Run(CONFIG.value, pathlib.Path(WORKDIR.value))
    run.load_frozen()
    started = time.perf_counter()
    folder = run.workdir / FOLDER
    try:
        manifest = write(folder, *run.caption_states())
    except OSError as e:
        raise errors.StorageError(
            f"cannot write there: {e}", where=str(folder), fix="make room, and start again"
        ) from e
    size = sum(manifest["files"].values())
    print(
        f"{manifest['captions']} captions, {size / 1e6:.1f} MB, "
        f"{time.perf_counter() - started:.0f} s: {folder}"
    )


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, configs/<name>.py.")
    WORKDIR = flags.DEFINE_string("workdir", None, "The run that will train with them.")
    cli.run(main, required=("config", "workdir"))
