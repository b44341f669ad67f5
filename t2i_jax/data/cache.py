"""Caption states of a frozen encoder, computed once for every distinct caption.

python -m t2i_jax captions --config=configs/shapes_flow.py --workdir=runs/flow

writes them to <workdir>/captions, where training finds them. After a kill it goes on with the next
file. Without that command training computes the states before its first step. It keeps them in
memory, and in the user's cache folder for the next start.

N captions · B batch · L text length · V valid tokens of a caption · D width · P pooled width
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import time

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from array_record.python import array_record_data_source, array_record_module

from t2i_jax import errors, images
from t2i_jax.data import transforms
from t2i_jax.models.types import Tokens
from t2i_jax.objective import Input
from t2i_jax.pretrained import text_encoder
from t2i_jax.run import compile_cache, distributed, failpoints, fingerprint
from t2i_jax.text import tokenize

FORMAT = 1
BUCKET = 8  # captions are encoded at lengths that are multiples of this
BATCH = 64
LIMIT = 8 * 2**30  # bytes of states in memory
KEPT_LIMIT = 4 * 2**30  # bytes of states in the user's cache folder
SHARD = 64 * BATCH  # captions in a file
FOLDER, MANIFEST, BUILDING, PLACES = "captions", "manifest.json", "building.json", "places.npy"
AGAIN = (
    "bring back what it was made of, or make it again: python -m t2i_jax captions with the "
    "run's flags"
)
DTYPE = np.dtype(np.float16)  # finer than bfloat16 at the same size: states are near 1


def arrays(cond) -> dict:
    """A Cond as the arrays that a batch brings in its place: float16."""
    return {"cond_seq": cond.seq_BLD.astype(DTYPE), "cond_pooled": cond.pooled_BD.astype(DTYPE)}


def identity(config, nets, source, tokenizer, *, sums: int = fingerprint.FORMAT) -> dict:
    """What the states depend on: encoder, tokenizer and data by hashes, and the text length.

    nets: all that are frozen; the encoder is the module that `config` describes, with its sizes.
    sums: the format of the fingerprint of its weights.
    """
    module = text_encoder.make(config.load.get("text"), **config.text)
    text = f"{config.objective} {module!r} {fingerprint.digest(nets, format=sums, widened=True)}"
    return {
        "sums": sums,
        "format": FORMAT,
        "prediction": config.cache,
        "encoder": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer": tokenize.fingerprint(tokenizer),
        "data": source.fingerprint,
        "text_length": sum(one.length for one in jax.tree.leaves(tokenizer)),
    }


def asked(config, predictor, frozen, source):
    """What `states` and `write` ask for after the folder, for the prediction config.cache names."""
    if not config.cache:
        raise errors.ConfigError(
            "it names no prediction",
            where="config.cache",
            fix="set --config.cache=encode; states of an encoder that learns cannot be kept",
        )
    predictor.check(config.cache)
    if "text" not in predictor.tokenizers:
        raise errors.ConfigError(
            "the family reads no captions", where="config.cache", fix='set it to ""'
        )
    encode = functools.partial(predictor.run, config.cache, frozen)
    tokenizer = predictor.tokenizers["text"]
    return encode, source, tokenizer, functools.partial(identity, config, frozen, source, tokenizer)


def states(folder: pathlib.Path, encode, source, tokenizer, identity) -> Input:
    """The input "cond_seq", "cond_pooled" for the loader, behind that of the net "text"'s tokens.

    From the folder if it holds states, else from an earlier start or computed now, and kept in
    memory. `identity(sums=…)` is the function of that name, bound to this run.

    Raises:
      ConfigError: the folder's states are another encoder's, tokenizer's or data set's, or those in
        memory would take more than LIMIT bytes.
    """
    # As process 0 sees it: all processes must compute together, or none.
    if not distributed.as_first((folder / MANIFEST).exists()):
        return precompute(encode, source, tokenizer, kept=_kept(identity()))
    where = folder / MANIFEST
    with errors.explained(errors.DataError, "cannot be read", where=where, fix=AGAIN):
        manifest = json.loads(where.read_text())
    # Manifests from before this key were written with the older sums.
    known = identity(sums=manifest.setdefault("sums", fingerprint.WEIGHTED))
    stale = [key for key in known if manifest.get(key) != known[key]]
    if stale:
        stale = [f"{key} {str(manifest.get(key))[:12]} → {str(known[key])[:12]}" for key in stale]
        raise errors.ConfigError(
            "the cached captions are stale: " + "; ".join(stale),
            where=str(folder),
            fix=AGAIN,
        )
    return _from_files(folder, manifest, tokenizer)


def _from_files(folder, manifest, tokenizer) -> Input:
    """States in files, read as batches ask for them."""
    places = np.load(folder / PLACES, allow_pickle=False)
    paths = []
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise errors.DataError(
                f"not the {size} bytes that were written",
                where=str(path),
                fix=AGAIN,
            )
        paths.append(str(path))
    captions = array_record_data_source.ArrayRecordDataSource(paths)
    logging.info("%d captions' states in %s", len(captions), folder)

    def read(records):
        for record in captions.__getitems__(places[records].tolist()):
            values = np.frombuffer(record, DTYPE)
            # The pooled vector stands first, since only its length is the same for all.
            yield values[manifest["pooled"] :].reshape(-1, width), values[: manifest["pooled"]]

    width = manifest["width"]
    return _input(read, width, manifest["pooled"], tokenizer)


def _input(read, width: int, pooled: int, tokenizer) -> Input:
    """States as an input.   read: records -> each one's valid tokens' states VD and pooled P"""

    def make(examples, rngs, records):
        mask_BL = np.stack([_mask(example["text"], tokenizer) for example in examples])
        seq = np.zeros((*mask_BL.shape, width), DTYPE)
        vectors = np.empty((len(records), pooled), DTYPE)
        for i, (seq_VD, vectors[i]) in enumerate(read(records)):
            seq[i, mask_BL[i]] = seq_VD
        return {"cond_seq": seq, "cond_pooled": vectors}

    length = sum(one.length for one in jax.tree.leaves(tokenizer))
    shapes = {"cond_seq": (length, width), "cond_pooled": (pooled,)}
    shapes = {key: jax.ShapeDtypeStruct(shape, DTYPE) for key, shape in shapes.items()}
    return Input(shapes, make, reads=("record",))


def precompute(encode, source, tokenizer, *, batch_size: int = BATCH, kept=None) -> Input:
    """Encodes every caption of a source into memory.   -> as `states`

    Args:
      encode: batch {"text"} -> Cond, the frozen encoder.
      source: its captions are read once, by `captions()` where it has that.
      tokenizer: the encoder's; of several a dict, in their order.
      kept: a file for the next start, or None; what it holds is not computed.
    """
    held = _opened(kept) or _encoded(encode, source, tokenizer, batch_size, kept)
    flat, pooled, offsets = held["flat"], held["pooled"], held["offsets"]

    def read(records):
        for row in held["row_of_record"][records]:
            yield flat[offsets[row] : offsets[row + 1]], pooled[row]

    return _input(read, flat.shape[1], pooled.shape[1], tokenizer)


def _encoded(encode, source, tokenizer, batch_size: int, kept) -> dict:
    """States of all captions, one behind the other; and written to a file, if it can be."""
    started = time.perf_counter()
    captions = _Captions(source, tokenizer)
    logging.info("encoding %d captions once …", len(captions.order))
    flat = pooled = None
    offsets = np.concatenate([[0], np.cumsum(captions.lengths)])
    for row, seq_VD, pooled_P in captions.states(encode, captions.order, batch_size):
        # The width, and with it the size of all states, is known with the first of them.
        if flat is None:
            numbers = offsets[-1] * seq_VD.shape[-1] + len(captions.order) * len(pooled_P)
            _check_size(int(numbers) * DTYPE.itemsize)
            flat = np.empty((offsets[-1], seq_VD.shape[-1]), DTYPE)
            pooled = np.empty((len(captions.order), len(pooled_P)), DTYPE)
        flat[offsets[row] : offsets[row + 1]], pooled[row] = seq_VD, pooled_P
    seconds = time.perf_counter() - started
    logging.info("encoded them in %.0f s (%.0f MB)", seconds, flat.nbytes / 1e6)
    states = {"flat": flat, "pooled": pooled, "offsets": offsets}
    states["row_of_record"] = captions.row_of_record
    if kept and sum(x.nbytes for x in states.values()) <= KEPT_LIMIT:
        # The states are in memory by now, so a full disk must not stop the training.
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        try:
            safetensors.numpy.save_file(states, temporary, {"sha256": _sum(states)})
            temporary.replace(kept)
            compile_cache.keep_to_limit(kept.parent, KEPT_LIMIT)
        except (OSError, safetensors.SafetensorError) as e:
            temporary.unlink(missing_ok=True)
            logging.info("the captions' states are not kept: %s", e)
    return states


def _opened(kept) -> dict | None:
    """The states in a file; None where there is none or it is damaged."""
    if not (kept and kept.is_file()):
        return None
    try:
        with safetensors.safe_open(kept, "numpy") as f:
            states = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (it is no dict)
            if (f.metadata() or {}).get("sha256") != _sum(states):
                return None
        os.utime(kept)  # used now
    except (OSError, safetensors.SafetensorError):
        return None
    logging.info("states of %d captions, from an earlier start: %s", len(states["pooled"]), kept)
    return states


def _kept(known: dict) -> pathlib.Path | None:
    """The file for states of this identity in the user's cache folder.

    With several processes there is none: all must compute together, or none.
    """
    if jax.process_count() > 1:
        return None
    # Other code may compute other states of the same weights.
    known = {**known, "code": _code(), "jax": jax.__version__}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    try:
        return compile_cache.own_folder("captions") / f"{digest}.safetensors"
    except (OSError, RuntimeError) as e:
        logging.warning("the captions' states are not kept: %s", e)
        return None


def _code() -> str:
    """A hash of what computes the states: this file, the encoders and what they read."""
    package, whole = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    files = [pathlib.Path(__file__), package / "weights.py"]
    for part in ("models", "pretrained", "text"):
        files += package.glob(f"{part}/*.py")
    for path in sorted(files):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _sum(states: dict) -> str:
    whole = hashlib.sha256()
    for name in sorted(states):
        whole.update(name.encode())
        whole.update(np.ascontiguousarray(states[name]).data)
    return whole.hexdigest()


def write(folder: pathlib.Path, encode, source, tokenizer, identity) -> dict:
    """Encodes every caption of a source into files.   -> the manifest

    Files that an earlier start finished, of the same identity, are kept.
    """
    captions, known = _Captions(source, tokenizer), identity()
    order, files = captions.order, _begin(folder, known)
    for start in range(0, len(order), SHARD):
        name = f"states-{start // SHARD:05d}.array_record"
        if name in files:
            continue
        failpoints.hit("cache.file")
        rows = order[start : start + SHARD]
        states = captions.states(encode, rows, BATCH)
        records = (pooled_P.tobytes() + seq_VD.tobytes() for _, seq_VD, pooled_P in states)
        files[name] = _write_file(folder / name, records)
        images.write_whole(folder / BUILDING, json.dumps([known, files]).encode())
        logging.info("%d of %d captions", start + len(rows), len(order))
    # One caption again: after a restart with all files whole, nothing else tells the sizes.
    _, seq_VD, pooled_P = next(captions.states(encode, order[:1], 1))
    sizes = {"width": seq_VD.shape[-1], "pooled": len(pooled_P), "dtype": DTYPE.name}
    place_of_row = np.empty(len(order), np.int64)
    # The inverse permutation: files hold rows in the order of their length.
    place_of_row[order] = np.arange(len(order))
    manifest = {**known, **sizes, "captions": len(order), "files": files}
    with _writing(folder):
        with (folder / PLACES).open("wb") as f:
            np.save(f, place_of_row[captions.row_of_record])
        # The manifest comes last: `states` takes a folder with one for whole.
        images.write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _begin(folder: pathlib.Path, known: dict) -> dict:
    """The files that an earlier start finished, with their sizes; removes all others."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        before, files = json.loads((folder / BUILDING).read_text())
    except (OSError, ValueError):
        before, files = None, {}
    size = lambda name: (folder / name).stat().st_size if (folder / name).is_file() else None
    files = {name: n for name, n in files.items() if before == known and size(name) == n}
    # The manifest goes first, so that no reader takes the rest for whole.
    for path in [p for name in (MANIFEST, PLACES, "states-*") for p in folder.glob(name)]:
        if path.name not in files:
            path.unlink()
    return files


def _write_file(path: pathlib.Path, records) -> int:
    """Writes records, whole or not at all.   -> bytes"""
    temporary = path.with_suffix(".tmp")
    # Groups of one: reading a record would decompress its whole group.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for record in records:
        # Not around the loop: making the records computes, and fails for other reasons.
        with _writing(path):
            writer.write(record)
    with _writing(path):
        writer.close()
        temporary.replace(path)
        return path.stat().st_size


def _writing(path):
    fix = "make room there, and start the same command again: it goes on"
    of = (OSError, RuntimeError)  # the second is what array_record makes of a full disk
    return errors.explained(errors.StorageError, "cannot be written", where=path, fix=fix, of=of)


class _Captions:
    """A source's distinct captions as tokens, and their rows in the order of their length."""

    def __init__(self, source, tokenizer):
        row_of, self.row_of_record = {}, np.zeros(len(source), np.int64)
        for record, caption in enumerate(_captions(source)):
            self.row_of_record[record] = row_of.setdefault(caption, len(row_of))
        texts = list(row_of)
        starts = range(0, len(texts), SHARD)
        blocks = [tokenize.read(tokenizer, texts[i : i + SHARD]) for i in starts]
        tokens, cuts = zip(*blocks, strict=True)
        self._tokens = jax.tree.map(lambda *x: np.concatenate(x), *tokens)
        losses = zip(texts, itertools.chain(*cuts), strict=True)
        if cut := [(text, lost) for text, lost in losses if lost]:
            logging.warning(
                "%d of %d captions are cut, the first: %r loses %r",
                *(len(cut), len(texts), cut[0][0][:80], cut[0][1][:80]),
            )
        self.lengths = _mask(self._tokens, tokenizer).sum(1)
        # Stable, as `write` counts on the same order when it goes on with files of an earlier
        # start.
        self.order = np.argsort(self.lengths, kind="stable")

    def states(self, encode, order, batch_size: int):
        """(row, its valid tokens' states VD, pooled P) of rows in this order.

        Each encoder reads a batch as long as its longest caption, up to a multiple of BUCKET.
        """

        def cut(tokens):
            # A batch of empty captions may have no token at all, and still needs a length.
            width = max(tokens.mask_BL.sum(1).max(), 1)
            return Tokens(*(x[:, : -(-width // BUCKET) * BUCKET] for x in tokens))

        for start in range(0, len(order), batch_size):
            wanted = order[start : start + batch_size]
            # A short last batch repeats its rows, as another size would compile again.
            rows = np.resize(wanted, batch_size)
            tokens = jax.tree.map(lambda x, rows=rows: x[rows], self._tokens)
            tokens = jax.tree.map(cut, tokens, is_leaf=lambda x: isinstance(x, Tokens))
            cond = encode({"text": tokens})
            mask_BL, found = jax.device_get((cond.mask_BL, arrays(cond)))
            seq, pooled = found["cond_seq"], found["cond_pooled"]
            if not (np.isfinite(seq).all() and np.isfinite(pooled).all()):
                raise errors.DataError(
                    f"caption states beyond what {DTYPE.name} holds",
                    where="config.cache",
                    fix="set --config.cache= (nothing): the encoder then runs in every step",
                )
            for i, row in enumerate(wanted):
                yield row, seq[i, mask_BL[i]], pooled[i]


def _mask(tokens, tokenizer):
    """Where the states of each caption stand: one encoder's behind the other's."""
    each = [tokens] if isinstance(tokens, Tokens) else [tokens[name] for name in tokenizer]
    return np.concatenate([one.mask_BL for one in each], axis=-1)


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
            fix="write them to files first: python -m t2i_jax captions with the same flags",
        )
