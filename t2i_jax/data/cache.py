"""What frozen nets make of a run's captions and pictures, computed once: arrays for each record.

python -m t2i_jax cache --config=configs/shapes_flow.py --workdir=runs/flow

writes them into the workdir, where training finds them. After a kill it goes on with the next file.
Without that command training computes them before its first step. It keeps them in memory, and in
the user's cache folder for the next start.

`config.cache` names the predictions that are kept, with commas: "encode" of the captions alone, or
those that the family declares, see `objective.Cached`.

N rows · B batch · L text length · V valid tokens of a caption · D width · P pooled width
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from array_record.python import array_record_data_source, array_record_module

from t2i_jax import errors, images, sharding
from t2i_jax.data import inputs, loader, transforms
from t2i_jax.models.types import Cond, Tokens
from t2i_jax.objective import Cached, Input, OfBatch, Texts
from t2i_jax.objective import Pictures as Drawn
from t2i_jax.pretrained import opener, text_encoder
from t2i_jax.run import compile_cache, distributed, failpoints, fingerprint
from t2i_jax.text import tokenize

FORMAT = 1
BUCKET = 8  # captions are encoded at lengths that are multiples of this
BATCH = 64
LIMIT = 8 * 2**30  # bytes of a cache in memory
KEPT_LIMIT = 4 * 2**30  # bytes in the user's cache folder
MANIFEST, BUILDING, PLACES = "manifest.json", "building.json", "places.npy"
AGAIN = (
    "bring back what it was made of, or make it again: python -m t2i_jax cache with the run's flags"
)
DTYPE = np.dtype(np.float16)  # finer than bfloat16 at the same size: states are near 1


def arrays(found) -> dict:
    """What a prediction gives, as arrays that a batch brings in its place: floats as float16."""
    if isinstance(found, Cond):
        found = {"cond_seq": found.seq_BLD, "cond_pooled": found.pooled_BD}
    narrow = lambda x: x.astype(DTYPE) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return {name: narrow(x) for name, x in found.items()}


def named(config, family) -> dict[str, Cached]:
    """The predictions that config.cache names, and what the family says of them.

    Raises:
      ConfigError: one that the family does not keep, or of a net that learns.
    """
    found = {}
    for name in filter(None, config.cache.split(",")):
        known = family.cached
        if all(kept.reads != "caption" for kept in known.values()):
            known = {*known, *filter(functools.partial(_may_give_states, family), family.predict)}
        errors.check_known("prediction to be kept", name, known, where="config.cache")
        found[name] = kept = family.cached.get(name, Cached("caption"))
        if learning := [n for n in kept.nets if n in family.trained or n in config.lora]:
            raise errors.ConfigError(
                f"what is kept of {name!r} cannot change with a net that learns: {learning[0]!r}",
                where="config.cache",
                fix="set --config.cache= (nothing)",
            )
    return found


def _may_give_states(family, name: str) -> bool:
    return family.predict[name].__annotations__.get("return") not in (Drawn, Texts, OfBatch)


def without_pictures(read) -> tuple[Input, ...]:
    """The inputs of a batch whose pictures' arrays come from a cache."""
    return tuple(one for one in read if "image" not in one.reads)


class Captioned:
    """A source without its pictures, which are not even opened where it has a method `caption`."""

    def __init__(self, source):
        self._source, self.fingerprint = source, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return getattr(self._source, "caption", self._source.__getitem__)(index)

    def where(self, index: int) -> str:
        """The place of an example."""
        return self._source.where(index) if hasattr(self._source, "where") else f"record {index}"


def identity(config, name, nets, source, tokenizer, *, sums: int = fingerprint.FORMAT) -> dict:
    """What caption states depend on: encoder, tokenizer and data by hashes, and the text length.

    nets: all that are frozen; the encoder is the module that `config` describes, with its sizes.
    sums: the format of the fingerprint of its weights.
    """
    module = text_encoder.make(config.load.get("text"), **config.text)
    text = f"{config.objective} {module!r} {fingerprint.digest(nets, format=sums, widened=True)}"
    return {
        "sums": sums,
        "format": FORMAT,
        "prediction": name,
        "encoder": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer": tokenize.fingerprint(tokenizer),
        "data": source.fingerprint,
        "text_length": sum(one.length for one in jax.tree.leaves(tokenizer)),
    }


def declared(
    config, name, kept, digests, mark, source, tokenizer, *, sums=fingerprint.FORMAT
) -> dict:
    """What arrays depend on that a family declares: nets, how they are used, and what they read.

    digests: net -> that of its variables. Nets that are not loaded are known by their sources, and
      by the `mark` of what is there.
    """
    config = config.to_dict()
    own = {"objective": config["objective"], "text": config["text"]}
    own["model"] = {net: config["model"].get(net) for net in kept.nets}
    if kept.reads == "caption":
        own["tokenizer"] = tokenize.fingerprint(tokenizer)
        own["text_length"] = [one.length for one in jax.tree.leaves(tokenizer)]
    else:
        lies = ("path", "data_dir", "prior")  # the fingerprint tells the data apart
        own |= {key: config[key] for key in ("augment", "res", "size")}
        own["source"] = {k: v for k, v in config["data"].items() if k not in lies}
    known = {"sums": sums, "format": FORMAT, "prediction": name, "data": source.fingerprint, **own}
    sources = {net: opener.each(opener.parse(config["load"].get(net))) for net in kept.nets}
    known["sources"] = {net: [[one, mark(one)] for one in each] for net, each in sources.items()}
    in_eight_bits = {name.strip() for name in config["int8"].split(",")}
    known["int8"] = [net for net in kept.nets if net in in_eight_bits]
    known["nets"] = {net: digests[net] for net in kept.nets if net in digests}
    return json.loads(json.dumps(known))  # as the manifest is read: tuples become lists


def asked(config, predictor, frozen, source, name: str, digests, mark):
    """What `states` and `write` ask for after the folder, for a prediction config.cache names.

    frozen: the nets, or those of them that are loaded.   digests: net -> that of its variables.
    mark: source of a net -> a string that tells other weights there apart.
    """
    family = predictor.objective
    if not config.cache:
        raise errors.ConfigError(
            "it names no prediction",
            where="config.cache",
            fix=f"set --config.cache={','.join(family.cached) or 'encode'}; states of an encoder "
            "that learns cannot be kept",
        )
    name = name or config.cache
    predictor.check(name)
    kept, run = named(config, family)[name], functools.partial(predictor.run, name, frozen)
    tokenizer = predictor.tokenizers.get("text")
    if kept.reads == "image":
        rows = Pictures(
            source, family.inputs, config.augment, batch=config.batch_size, budget=config.bad_budget
        )
    elif tokenizer is None:
        raise errors.ConfigError(
            "the family reads no captions", where="config.cache", fix='set it to ""'
        )
    else:
        rows = Captions(source, tokenizer, whole=name in family.cached)
    if name in family.cached:
        known = functools.partial(declared, config, name, kept, digests, mark, source, tokenizer)
    else:
        known = functools.partial(identity, config, name, frozen, source, tokenizer)
    return run, rows, known


def manifest(folder: pathlib.Path) -> dict | None:
    """The manifest of a folder of files that are whole; None where there is none.

    As process 0 sees it: all processes must compute together, or none.
    """
    where = folder / MANIFEST
    if not distributed.as_first(where.exists()):
        return None
    with errors.explained(errors.DataError, "cannot be read", where=where, fix=AGAIN):
        found = json.loads(where.read_text())
        if not isinstance(found, dict) or not {"files", "data"} <= found.keys():
            raise ValueError("it is no manifest")
        # Manifests from before these keys.
        found.setdefault("sums", fingerprint.WEIGHTED)
        if "arrays" not in found:
            shapes = {"cond_pooled": [found["pooled"]], "cond_seq": [-1, found["width"]]}
            found["arrays"] = {name: [shape, DTYPE.name] for name, shape in shapes.items()}
    return found


def states(folder: pathlib.Path, predict, rows, identity) -> Input:
    """The kept arrays as an input of the loader, behind that of the net "text"'s tokens.

    From the folder if it holds them, else from an earlier start or computed now, and kept in
    memory. `identity(sums=…)` is the function of that name, or `declared`, bound to this run.

    Raises:
      ConfigError: the folder's arrays are of another net, tokenizer or data set, or those in memory
        would take more than LIMIT bytes.
    """
    found = manifest(folder)
    if found is None:
        return precompute(predict, rows, kept=_kept(identity()))
    known = identity(sums=found["sums"])
    # Nets that are loaded are known by their content, wherever they lie now. See `declared`.
    known.pop("sources" if known.get("nets") else "nets", None)
    stale = [key for key in known if found.get(key) != known[key]]
    if stale:
        stale = [f"{key} {str(found.get(key))[:12]} → {str(known[key])[:12]}" for key in stale]
        raise errors.ConfigError(
            f"the cached {folder.name} are stale: " + "; ".join(stale),
            where=str(folder),
            fix=AGAIN,
        )
    return _from_files(folder, found, rows)


def _from_files(folder, manifest, rows) -> Input:
    """Arrays in files, read as batches ask for them."""
    with _sound(folder / PLACES):
        places = np.load(folder / PLACES, allow_pickle=False)
        # Manifests from before this key.
        if manifest.get("places", _sum({PLACES: places})) != _sum({PLACES: places}):
            raise ValueError("it is not what was written")
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
    records = array_record_data_source.ArrayRecordDataSource(paths)
    logging.info("%s of %d rows in %s", manifest["prediction"], len(records), folder)

    def read(numbers):
        with _sound(folder):
            return records.__getitems__(places[numbers].tolist())

    return rows.input(read, manifest["arrays"])


def _sound(path):
    of = (OSError, ValueError, EOFError, RuntimeError)  # the last is array_record's
    return errors.explained(errors.DataError, "damaged", where=path, fix=AGAIN, of=of)


def precompute(predict, rows, *, kept=None) -> Input:
    """Computes all rows into memory.   -> as `states`

    Args:
      predict: batch -> `Cond` or dict of arrays, of the frozen net.
      rows: `Captions` or `Pictures`.
      kept: a file for the next start, or None; what it holds is not computed.
    """
    held = _opened(kept)
    # A disk that was away for a while made rows empty: what is whole by now is not left out.
    if held is None or rows.mended(np.flatnonzero(np.diff(held["offsets"]) == 0)):
        held = _computed(predict, rows, kept)
    flat, offsets, places = held["flat"].data, held["offsets"], held["places"]
    read = lambda numbers: [flat[offsets[i] : offsets[i + 1]] for i in places[numbers].tolist()]
    return rows.input(read, json.loads(held["arrays"].tobytes()))


def _computed(predict, rows, kept) -> dict:
    """The bytes of all rows, one behind the other; and written to a file, if it can be."""
    started = time.perf_counter()
    logging.info("%s: computing %d rows once …", rows.name, len(rows.order))
    flat, offsets, layout = bytearray(), [0], None
    for found in rows.computed(predict, rows.order):
        if found and layout is None:
            layout = rows.layout(found)
            _check_size(rows.total(found))
        flat += rows.packed(found)
        offsets.append(len(flat))
    rows.check_broken()
    seconds = time.perf_counter() - started
    logging.info("computed them in %.0f s (%.0f MB)", seconds, len(flat) / 1e6)
    held = {"flat": np.frombuffer(flat, np.uint8), "offsets": np.array(offsets)}
    layout = json.dumps(layout or rows.layout(None))
    held |= {"places": _places(rows), "arrays": np.frombuffer(layout.encode(), np.uint8)}
    if kept and sum(x.nbytes for x in held.values()) <= KEPT_LIMIT:
        # All is in memory by now, so a full disk must not stop the training.
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        try:
            safetensors.numpy.save_file(held, temporary, {"sha256": _sum(held)})
            temporary.replace(kept)
            compile_cache.keep_to_limit(kept.parent, KEPT_LIMIT)
        except (OSError, safetensors.SafetensorError) as e:
            temporary.unlink(missing_ok=True)
            logging.info("the cache is not kept: %s", e)
    return held


def _places(rows):
    """The place of each record's rows in the order of computing."""
    place_of_row = np.empty(len(rows.order), np.int64)
    place_of_row[rows.order] = np.arange(len(rows.order))  # the inverse permutation
    return place_of_row[rows.row_of_record]


def _opened(kept) -> dict | None:
    """The arrays in a file; None where there is none or it is damaged."""
    if not (kept and kept.is_file()):
        return None
    try:
        with safetensors.safe_open(kept, "numpy") as f:
            held = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (it is no dict)
            if (f.metadata() or {}).get("sha256") != _sum(held):
                return None
        os.utime(kept)  # used now
    except (OSError, safetensors.SafetensorError):
        return None
    logging.info("%d rows from an earlier start: %s", len(held["offsets"]) - 1, kept)
    return held


def _kept(known: dict) -> pathlib.Path | None:
    """The file for a cache of this identity in the user's cache folder.

    With several processes there is none: all must compute together, or none.
    """
    if jax.process_count() > 1:
        return None
    # Other code may compute other arrays of the same weights.
    known = {**known, "code": _code(), "jax": jax.__version__}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    try:
        return compile_cache.own_folder("captions") / f"{digest}.safetensors"
    except (OSError, RuntimeError) as e:
        logging.warning("the cache is not kept: %s", e)
        return None


def _code() -> str:
    """A hash of what computes the arrays: this file, families, networks and what they read."""
    package, whole = pathlib.Path(__file__).parent.parent, hashlib.sha256()
    files = [pathlib.Path(__file__), package / "weights.py"]
    for part in ("data", "models", "objectives", "pretrained", "text"):
        files += package.glob(f"{part}/*.py")
    for path in sorted(files):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _sum(held: dict) -> str:
    whole = hashlib.sha256()
    for name in sorted(held):
        whole.update(name.encode())
        whole.update(np.ascontiguousarray(held[name]).data)
    return whole.hexdigest()


def write(folder: pathlib.Path, predict, rows, identity) -> dict:
    """Computes all rows into files.   -> the manifest

    Files that an earlier start finished, of the same identity, are kept.
    """
    known, order = identity(), rows.order
    files = _begin(folder, known)
    for start in range(0, len(order), rows.shard):
        name = f"states-{start // rows.shard:05d}.array_record"
        if name in files:
            continue
        failpoints.hit("cache.file")
        some = order[start : start + rows.shard]
        records = map(rows.packed, rows.computed(predict, some))
        files[name] = _write_file(folder / name, records)
        images.write_whole(folder / BUILDING, json.dumps([known, files]).encode())
        logging.info("%d of %d rows", start + len(some), len(order))
    rows.check_broken()
    # One row again: after a restart with all files whole, nothing else tells the shapes.
    layout = rows.layout(next(filter(None, rows.computed(predict, order)), None))
    more = {"arrays": layout, "dtype": DTYPE.name, "rows": len(order), "files": files}
    places = _places(rows)
    more["places"] = _sum({PLACES: places})
    with _writing(folder):
        with (folder / PLACES).open("wb") as f:
            np.save(f, places)
        # The manifest comes last: `states` takes a folder with one for whole.
        images.write_whole(folder / MANIFEST, json.dumps({**known, **more}, indent=1).encode())
    return {**known, **more}


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


class Rows:
    """What is computed once for each row, packed into bytes, and read again by records.

    order: the rows in the order in which they are computed and stored.
    row_of_record: of each record its row, or its rows.
    """

    name, ragged, shard = "", (), 64 * BATCH

    def check_broken(self) -> None:
        """Raises DataError where too many of the rows that were computed are broken."""

    def mended(self, places) -> bool:
        """Whether a row is whole that was not, of those at some places of `order`."""
        return False

    def layout(self, found) -> dict:
        """Name -> shape and type of a row's arrays; −1 for a length that differs by row.

        Raises:
          DataError: there is no row, as all are broken.
        """
        if found is None:
            raise errors.DataError(
                f"none of the {self.name} is whole", where="config.data", fix="mend them"
            )
        shape = lambda name, x: [-1, *x.shape[1:]] if name in self.ragged else [*x.shape]
        return {name: [shape(name, found[name]), found[name].dtype.name] for name in sorted(found)}

    def packed(self, found) -> bytes:
        """A row's arrays behind each other, those of unknown length last; b"" for a broken one."""
        return b"".join(found[name].tobytes() for name in sorted(found)) if found else b""

    def total(self, found) -> int:
        """The bytes of all rows, by one of them."""
        return len(self.packed(found)) * len(self.order)

    def unpacked(self, data, layout) -> dict:
        """The inverse of `packed`."""
        if not len(data):
            raise transforms.BadExample("broken picture: it was when the cache was made")
        found, start = {}, 0
        for name, (shape, kind) in layout.items():
            size = math.prod(shape) * np.dtype(kind).itemsize
            end = start + size if size >= 0 else len(data)
            found[name] = np.frombuffer(data[start:end], kind).reshape(shape)
            start = end
        return found


class Captions(Rows):
    """A source's distinct captions; behind them, if they are kept whole, the empty one.

    whole: of each caption the arrays are kept as they are, not the valid tokens' states alone.
    empty: then, once there is an input, the arrays of the empty caption, with a batch's axis.
    """

    name = "captions"

    def __init__(self, source, tokenizer, *, whole: bool = False, batch: int = BATCH):
        self._source, self._tokenizer, self._whole, self._batch = source, tokenizer, whole, batch
        self.ragged, self.empty = () if whole else ("cond_seq",), None

    @functools.cached_property
    def _read(self):
        """Tokens of the distinct captions, and the row of each record."""
        row_of, rows = {}, []
        for caption in itertools.chain(_captions(self._source), [""] * self._whole):
            rows.append(row_of.setdefault(caption, len(row_of)))
        texts = list(row_of)
        starts = range(0, len(texts), self.shard)
        blocks = [tokenize.read(self._tokenizer, texts[i : i + self.shard]) for i in starts]
        tokens, cuts = zip(*blocks, strict=True)
        losses = zip(texts, itertools.chain(*cuts), strict=True)
        if cut := [(text, lost) for text, lost in losses if lost]:
            logging.warning(
                "%d of %d captions are cut, the first: %r loses %r",
                *(len(cut), len(texts), cut[0][0][:80], cut[0][1][:80]),
            )
        return jax.tree.map(lambda *x: np.concatenate(x), *tokens), np.array(rows, np.int64)

    @property
    def row_of_record(self):
        return self._read[1]

    @functools.cached_property
    def lengths(self):
        return _mask(self._read[0], self._tokenizer).sum(1)

    @functools.cached_property
    def order(self):
        # Stable, as `write` counts on the same order when it goes on with files of an earlier
        # start.
        return np.argsort(self.lengths, kind="stable")

    def total(self, found) -> int:
        if self._whole:
            return super().total(found)
        fixed = len(self.packed(found)) - found["cond_seq"].nbytes
        wide = found["cond_seq"].shape[-1] * DTYPE.itemsize
        return fixed * len(self.order) + wide * int(self.lengths.sum())

    def computed(self, predict, order):
        """Yields the arrays of each of the rows.

        Each encoder reads a batch as long as its longest caption, up to a multiple of BUCKET. Where
        captions are kept whole, it reads all tokens: padding may be in sight.
        """

        def cut(tokens):
            # A batch of empty captions may have no token at all, and still needs a length.
            width = max(tokens.mask_BL.sum(1).max(), 1)
            return Tokens(*(x[:, : -(-width // BUCKET) * BUCKET] for x in tokens))

        for start in range(0, len(order), self._batch):
            wanted = order[start : start + self._batch]
            # A short last batch repeats its rows, as another size would compile again.
            rows = np.resize(wanted, self._batch)
            tokens = jax.tree.map(lambda x, rows=rows: x[rows], self._read[0])
            if not self._whole:
                tokens = jax.tree.map(cut, tokens, is_leaf=lambda x: isinstance(x, Tokens))
            found = predict({"text": tokens})
            # Of a `Cond` the valid tokens' states are kept.
            mask_BL = None if self._whole else jax.device_get(found.mask_BL)
            found = _finite(found)
            for i in range(len(wanted)):
                one = {name: x[i] for name, x in found.items()}
                if mask_BL is not None:
                    one["cond_seq"] = one["cond_seq"][mask_BL[i]]
                yield one

    def input(self, read, layout) -> Input:
        """Arrays as an input.   read: records -> their bytes"""
        if self._whole:
            found = self.unpacked(read(np.array([-1]))[0], layout)
            self.empty = {name: x[None] for name, x in found.items()}
            each = lambda records, rngs: [self.unpacked(data, layout) for data in read(records)]
            return _stacked(each, layout)

        def make(examples, rngs, records):
            mask_BL = np.stack([_mask(example["text"], self._tokenizer) for example in examples])
            rows = [self.unpacked(data, layout) for data in read(records)]
            seq = np.zeros((*mask_BL.shape, layout["cond_seq"][0][-1]), DTYPE)
            for i, row in enumerate(rows):
                seq[i, mask_BL[i]] = row["cond_seq"]
            return {"cond_seq": seq, "cond_pooled": np.stack([row["cond_pooled"] for row in rows])}

        length = sum(one.length for one in jax.tree.leaves(self._tokenizer))
        shapes = {"cond_seq": (length, layout["cond_seq"][0][-1])}
        shapes["cond_pooled"] = tuple(layout["cond_pooled"][0])
        shapes = {key: jax.ShapeDtypeStruct(shape, DTYPE) for key, shape in shapes.items()}
        return Input(shapes, make, reads=("record",))


class Pictures(Rows):
    """A source's pictures as a family's inputs make them; twice where training mirrors some.

    augment: names of augmentations, which mirror.
    budget: the share of broken ones that is borne, see `loader.check_broken`.
    """

    name, shard = "pictures", 256

    def __init__(self, source, read, augment, *, batch: int, budget: float):
        self._source, self._batch, self._budget, self._broken = source, batch, budget, {}
        self._inputs = [one for one in read if one.reads == ("image",)]
        self._augment = [transforms.AUGMENTATIONS[name] for name in augment]
        self._views = 2 if augment else 1
        self.order = np.arange(len(source) * self._views)
        self.row_of_record = self.order.reshape(len(source), self._views)

    def _made(self, row: int) -> dict | None:
        """The inputs' arrays of a row; None of a broken picture."""
        record, mirrored = divmod(int(row), self._views)
        try:
            example = loader.read(self._source, record)
            made = inputs.arrays(self._inputs, [example], [None], [record])
        except transforms.BadExample as e:
            logging.log_first_n(logging.WARNING, "example %d is broken: %s", 5, record, e)
            self._broken[record] = str(e)
            return None
        if mirrored:
            made["image"] = made["image"][:, :, ::-1]
        seen = lambda x: transforms.to_float(x) if sharding.is_image(x.dtype, x.ndim) else x
        return jax.tree.map(seen, made)

    def check_broken(self):
        loader.check_broken(self._source, self._broken, len(self._source), self._budget)

    def mended(self, places):
        return any(self._made(self.order[place]) for place in places)

    def computed(self, predict, order):
        """Yields the arrays of each of the rows, None of a broken picture."""
        with concurrent.futures.ThreadPoolExecutor(loader.THREADS) as threads:
            for start in range(0, len(order), self._batch):
                wanted = order[start : start + self._batch]
                made = list(threads.map(self._made, wanted))
                whole = [one for one in made if one]
                if whole:
                    # As in `Captions`: all batches have one size.
                    rows = np.resize(np.arange(len(whole)), self._batch)
                    batch = jax.tree.map(lambda *x: np.concatenate(x), *[whole[i] for i in rows])
                    batch["index"] = np.arange(self._batch, dtype=np.int32)
                    found = _finite(predict(batch))
                places = itertools.count()
                for one in made:
                    i = next(places) if one else None
                    yield {name: x[i] for name, x in found.items()} if one else None

    def input(self, read, layout) -> Input:
        """Arrays as an input, which draws as `inputs.picture` does.   read: records -> …"""

        def view(rng) -> int:
            """0, or 1 for the mirrored picture."""
            seen_HWC = np.arange(2)[None, :, None]  # a picture of two pixels: which one comes first
            for augment in self._augment if rng else ():
                seen_HWC = augment(seen_HWC, rng)
            return int(seen_HWC[0, 0, 0])

        def rows(records, rngs):
            for data in read((np.array(records), np.array([view(rng) for rng in rngs]))):
                yield self.unpacked(data, layout)

        return _stacked(rows, layout)


def _stacked(rows, layout) -> Input:
    """The input of rows' arrays.   rows: records, rngs -> each one's"""

    def make(examples, rngs, records):
        each = list(rows(records, rngs))
        return {name: np.stack([row[name] for row in each]) for name in layout}

    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), kind) for name, (shape, kind) in layout.items()
    }
    return Input(shapes, make, reads=("record",))


def _finite(found) -> dict:
    """`arrays` of what a prediction gave, on the host."""
    found = jax.device_get(arrays(found))
    if not all(np.isfinite(x).all() for x in found.values()):
        raise errors.DataError(
            f"numbers beyond what {DTYPE.name} holds",
            where="config.cache",
            fix="set --config.cache= (nothing): the frozen net then runs in every step",
        )
    return found


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
            f"the cache would take {size / 2**30:.0f} GiB, {LIMIT / 2**30:.0f} at most",
            where="config.cache",
            fix="write it to files first: python -m t2i_jax cache with the same flags",
        )
