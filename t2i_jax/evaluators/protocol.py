"""Evaluates a model, or images of any origin, by a protocol file: see `quality.protocol`.

N drawn images · M real images
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from t2i_jax import errors, fields
from t2i_jax.data import shapes as world
from t2i_jax.data import transforms
from t2i_jax.evaluators import shapes
from t2i_jax.quality import (
    captions,
    classes,
    extractor,
    kernel,
    manifold,
    pixels,
    retrieval,
    statistics,
)
from t2i_jax.quality import protocol as protocols
from t2i_jax.quality.protocol import Protocol
from t2i_jax.run import distributed

CACHE = "T2I_JAX_CACHE"  # environment variable: the folder of stored features of real images
BATCH = 64  # images drawn, or read, together
JUDGED = 128  # pixels a side for the judge of shapes, whose time grows with their square
INCEPTION = "inception"
EXACT = 100.0  # dB of an exact copy, and the most that any picture counts in a mean
OTHERWISE = {"fid": "fd", "spatial_fid": "spatial_fd", "kid": "kd"}  # names for other extractors
CMMD = "clip-vit-large-patch14-336"  # the network that the name CMMD stands for


class Metric(NamedTuple):
    """drawn, real: the columns it needs of each set.   fn(drawn, real, **options) -> values.

    names: of the values, before `Networks.named`.
    """

    drawn: tuple[str, ...]
    real: tuple[str, ...]
    fn: Callable
    names: tuple[str, ...]


def _frechet(column: str, name: str) -> Metric:
    def fn(drawn, real):
        theirs = real["statistics"] if "statistics" in real else statistics.of(real[column])
        return {name: statistics.frechet(statistics.of(drawn[column]), theirs)}

    return Metric((column,), (column,), fn, (name,))


def _kid(drawn, real, *, subsets=100, subset_size=1000, seed=0):
    options = dict(subsets=subsets, subset_size=subset_size, seed=seed)
    mean, spread = kernel.kid(real["pooled"], drawn["pooled"], **options)
    return {"kid": mean, "kid_spread": spread}


def _inception_score(drawn, real, *, splits=10):
    # Shuffled, as each split must have images of all kinds, and folders are sorted by them.
    order_N = np.random.default_rng(0).permutation(len(drawn["logits"]))
    logits_NK = drawn["logits"][order_N].astype(np.float64)
    # A softmax in float64. The maximum is subtracted so that no exponential overflows.
    weight_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    probability_NK = weight_NK / weight_NK.sum(1, keepdims=True)
    mean, spread = classes.inception_score(probability_NK, splits=splits)
    return {"inception_score": mean, "inception_score_spread": spread}


def _manifold(drawn, real, *, k=3, density_k=5):
    return manifold.compare(real["pooled"], drawn["pooled"], k=k, density_k=density_k)._asdict()


def _memorised(drawn, real, *, ratio=1 / 3):
    copies = manifold.memorised(real["trained"], drawn["pooled"], ratio=ratio)
    return {"memorised": copies.share, "memorised_distance": float(np.median(copies.distance_M))}


def _clip_score(drawn, real):
    return {"clip_score": captions.clip_score(drawn["image_emb"], drawn["text_emb"])}


def _r_precision(drawn, real, *, candidates=100, seed=0):
    if len(np.unique(drawn["text_emb"], axis=0)) < len(drawn["text_emb"]):
        raise errors.ConfigError(
            "several pictures have the same caption, which would be its own rival",
            where="r_precision",
            fix="draw one picture of each caption, of no more than the data has, or leave it out",
        )
    similarity_NN = captions.cosines(drawn["image_emb"], drawn["text_emb"])
    return {"r_precision": retrieval.r_precision(similarity_NN, candidates=candidates, seed=seed)}


def _cmmd(drawn, real):
    # CMMD's σ suits vectors of length 1.
    return {"cmmd": kernel.cmmd(_unit(real["image_emb"]), _unit(drawn["image_emb"]))}


def _mean(name: str) -> Metric:
    """The mean of a column that has one number for each image, or for each caption."""
    return Metric((name,), (), lambda drawn, real: {name: float(drawn[name].mean())}, (name,))


def _psnr(x_BHWC, y_BHWC):
    """PSNR of at most EXACT, as is usual: one exact copy would make the mean infinite.   -> B"""
    return np.minimum(pixels.psnr(x_BHWC, y_BHWC), EXACT)


def _unit(x_ND):
    x_ND = x_ND.astype(np.float64)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def _shapes(drawn, real):
    return shapes.shares(drawn["shapes"], drawn["captions"])


OF_CLIP = ("image_emb", "text_emb")
METRICS = {
    "fid": _frechet("pooled", "fid"),
    "spatial_fid": _frechet("spatial", "spatial_fid"),
    "kid": Metric(("pooled",), ("pooled",), _kid, ("kid", "kid_spread")),
    "inception_score": Metric(
        ("logits",), (), _inception_score, ("inception_score", "inception_score_spread")
    ),
    "manifold": Metric(("pooled",), ("pooled",), _manifold, manifold.Manifold._fields),
    "memorised": Metric(("pooled",), ("trained",), _memorised, ("memorised", "memorised_distance")),
    "clip_score": Metric(OF_CLIP, (), _clip_score, ("clip_score",)),
    "r_precision": Metric(OF_CLIP, (), _r_precision, ("r_precision",)),
    "cmmd": Metric(("image_emb",), ("image_emb",), _cmmd, ("cmmd",)),
    "shapes": Metric(("captions", "shapes"), (), _shapes, shapes.NAMES),
    "lpips_diversity": _mean("lpips_diversity"),  # among the images of a caption
    "diversity": _mean("diversity"),  # the same, by pixels
    "lpips": _mean("lpips"),  # of drawn images from the real images of their captions
    "psnr": _mean("psnr"),  # see `_psnr`
    "ssim": _mean("ssim"),
}
LEAST = {  # the option that may not exceed the number of images, and its default
    "kid": ("subset_size", 1000),
    "inception_score": ("splits", 10),
    "r_precision": ("candidates", 100),
}
OF_GROUPS = {"lpips_diversity": "diversity", "diversity": pixels.diversity}
OF_PAIRS = {"lpips": "distance", "psnr": _psnr, "ssim": pixels.ssim}


def make(predict, *, protocol="shapes", batch_size: fields.Size = BATCH, reference=None, **changes):
    """The evaluator of protocols. It draws the protocol's captions and measures the images.

    Args:
      predict: name -> host function; "sample" draws uint8 images for captions.
      protocol: a name of evaluators/protocols, the path of a file, or a `Protocol`.
      batch_size: images drawn together.
      reference: an .npz with mu and sigma, in place of the features of real images.
      changes: other values for fields of the protocol, and `path`, see `quality.protocol.read`.
    Returns:
      run(nets, step) -> a function that gives the metrics by name. Its `definition` is a hash of
      the protocol. All processes must call `run`. The first alone calls the function, in any
      thread. A metric of another network than Inception has its name: "fd-…" in place of "fid".
    Raises:
      ConfigError, DataError: unknown metrics or options, or missing networks. Nothing is drawn yet.
    """
    ours = protocol if isinstance(protocol, Protocol) else protocols.read(protocol, **changes)
    nets = Networks(ours)
    texts = ours.captions()

    def run(model, step):
        batches = drawn(predict, model, ours, texts, batch_size)
        measure = Measure(ours, nets, batches, reference)
        return lambda: {**measure.metrics(), "definition": ours.sha256[:8]}

    chosen = [METRICS[name] for name in ours.metrics]
    run.names = tuple(nets.named(key, metric) for metric in chosen for key in metric.names)
    return run


def drawn(predict, model, ours: Protocol, texts, batch_size: int):
    """Yields batches (images, their captions) of a model."""
    batch_size = min(whole_captions(ours, batch_size), len(texts))
    for start in range(0, len(texts), batch_size):
        # A short last batch repeats the last caption: one shape is one compilation.
        index = np.minimum(np.arange(start, start + batch_size), len(texts) - 1)
        options = {"seed": ours.seed, "index": index, "batch_size": batch_size, **ours.sample}
        pictures = predict["sample"](model, [texts[i] for i in index], **options)
        some = texts[start : start + batch_size]
        yield pictures[: len(some)], some


def whole_captions(ours: Protocol, batch_size: int) -> int:
    """A batch size near `batch_size` that keeps the images of a caption in one batch."""
    return max(batch_size // ours.per_caption, 1) * ours.per_caption


class Networks:
    """The networks of a protocol's metrics.

    Attributes:
      drawn, real: the columns that the metrics need of drawn and of real images.
      extract, dual, perceptual: the networks, None where no metric needs them.
    Raises:
      ConfigError, DataError: as of `make`.
    """

    def __init__(self, protocol: Protocol):
        where = f"protocol {protocol.name}"
        for name, options in protocol.metrics.items():
            errors.check_known("metric", name, METRICS, where=where)
            fn = METRICS[name].fn
            # Two arguments, drawn and real, stand before the options.
            fields.check(fn, options, where=f"{where}, {name}", given=2)
            if name in LEAST:
                option, default = LEAST[name]
                if options.get(option, default) > protocol.num_images:
                    raise errors.ConfigError(
                        f"{name} with {option} {options.get(option, default)} of "
                        f"{protocol.num_images} pictures",
                        where=where,
                        fix=f'draw more, or write "{name}": {{"{option}": …}}',
                    )
        chosen = [METRICS[name] for name in protocol.metrics]
        self.drawn = {column for metric in chosen for column in metric.drawn}
        self.real = {column for metric in chosen for column in metric.real}
        if "trained" in self.real and not protocol.train:
            raise errors.ConfigError(
                "memorised needs the training pictures", where=where, fix='add "train": […]'
            )
        both = self.drawn | self.real
        self.extract = self.dual = self.perceptual = None
        groups = sorted(self.drawn & OF_GROUPS.keys())
        if groups and protocol.per_caption < 2:
            raise errors.ConfigError(
                f"{', '.join(groups)}: several pictures of a caption are needed",
                where=where,
                fix="set per_caption to 2 or more",
            )
        if both & {*extractor.COLUMNS, "trained"}:
            self.extract = _opened(extractor.Extractor, protocol, "extractor")
        if both & {*OF_CLIP}:
            self.dual = _opened(extractor.DualEncoder, protocol, "clip")
        if both & {"lpips", "lpips_diversity"}:
            self.perceptual = extractor.Perceptual()

    def columns(self, names, pictures, texts=None) -> dict[str, np.ndarray]:
        """The named columns that networks compute, for images and their captions."""
        own = sorted(names & extractor.COLUMNS.keys())
        columns = self.extract(pictures, own) if own else {}
        if "image_emb" in names:
            columns["image_emb"] = self.dual.images(pictures)
        if "text_emb" in names:
            columns["text_emb"] = self.dual.texts(texts)
        return columns

    def of_groups(self, name: str, pictures, per_caption: int) -> np.ndarray:
        """A metric of OF_GROUPS, for each group of `per_caption` images in a row.   -> G"""
        x_NHWC = _stacked(pictures)
        if len(x_NHWC) % per_caption:
            raise errors.DataError(
                f"{len(x_NHWC)} pictures, {per_caption} of each caption",
                where=name,
                fix="let no picture of a caption be missing or broken",
            )
        fn = self._function(OF_GROUPS[name])
        return fn(x_NHWC.reshape(-1, per_caption, *x_NHWC.shape[1:]))

    def of_pairs(self, name: str, pictures, own) -> np.ndarray:
        """A metric of OF_PAIRS, of images and the real images of their captions.   -> N"""
        return self._function(OF_PAIRS[name])(_stacked(pictures), np.stack(own))

    def _function(self, fn):
        """The function itself, or the method of the perceptual network with that name."""
        return fn if callable(fn) else getattr(self.perceptual, fn)

    def named(self, key: str, metric: Metric) -> str:
        """The published name where the network is the published one, else with the network's."""
        base = key.removesuffix("_spread")
        if set(metric.drawn) & {*OF_CLIP}:
            label = self.dual.label
            return key if (base, label) == ("cmmd", CMMD) else f"{key}-{label}"
        if not set(metric.drawn) & extractor.COLUMNS.keys():
            return key
        label = self.extract.label
        if label == INCEPTION and base in (*OTHERWISE, "inception_score"):
            return key
        return f"{OTHERWISE.get(base, base)}{key.removeprefix(base)}-{label}"

    def provenance(self) -> dict:
        """Role -> name and fingerprint of each network."""
        opened = {"extractor": self.extract, "clip": self.dual, "lpips": self.perceptual}
        return {
            key: {"name": net.label, "fingerprint": net.fingerprint}
            for key, net in opened.items()
            if net
        }


def _stacked(pictures) -> np.ndarray:
    if len({picture.shape for picture in pictures}) > 1:
        raise errors.DataError(
            "pictures of several sizes, which cannot be compared one by one",
            where="lpips, psnr, ssim, diversity",
            fix="give pictures of one size, or choose other metrics",
        )
    return np.stack(pictures)


def check_captions(ours: Protocol, nets: Networks, captions) -> None:
    """Raises ConfigError where a metric cannot use the captions (image -> caption)."""
    where = f"protocol {ours.name}"
    bare = [name for name, caption in captions.items() if not caption]
    if bare and nets.drawn & {"captions", "text_emb"}:
        raise errors.ConfigError(
            f"{len(bare)} of {len(captions)} pictures have no caption, and a metric needs "
            f"one of each: {', '.join(bare[:5])}{' …' * (len(bare) > 5)}",
            where=where,
            fix="write a .txt beside each or a metadata.jsonl, remove those pictures, or "
            "choose other metrics",
        )
    if "shapes" in nets.drawn:
        strange = []
        for name, caption in captions.items():
            try:
                world.parse(caption)
            except errors.ConfigError:
                strange.append(f"{name} ({caption[:60]!r})")
        if strange:
            raise errors.ConfigError(
                f"{len(strange)} captions are not of coloured shapes: {'; '.join(strange[:5])}",
                where=where,
                fix=f"colours are {', '.join(world.COLOURS)}; shapes {', '.join(world.SHAPES)}; "
                f"relations {', '.join(world.RELATIONS)}",
            )


def check_places(ours: Protocol, nets: Networks, captions) -> None:
    """Raises DataError where a metric goes by the places of images (image -> caption) and these are
    not those of the protocol's captions.
    """
    pairs, groups = (sorted(nets.drawn & kind.keys()) for kind in (OF_PAIRS, OF_GROUPS))
    names, texts, count = list(captions), list(captions.values()), ours.per_caption
    plain = lambda text: " ".join((text or "").split())
    first = [texts[i // count * count] for i in range(len(texts))]
    numbered = [int(n) for name in names for n in re.findall(r"^\d+", name)]
    if pairs and len(names) != ours.num_images:
        what = f"{len(names)} pictures for {ours.num_images} captions"
    elif pairs and all(texts) and [*map(plain, texts)] != [*map(plain, ours.captions())]:
        what = "the pictures' captions are not those of the protocol, in its order"
    elif groups and len(names) % count:
        what = f"{len(names)} pictures, {count} of each caption"
    elif groups and all(texts) and texts != first:
        what = f"pictures of one caption are not {count} by {count} behind each other"
    elif (pairs or groups) and numbered != sorted(numbered):
        what = "pictures are read in the order of their names, where 10 comes before 2"
    else:
        return
    raise errors.DataError(
        f"{what}, and {', '.join(pairs + groups)} go by the places of pictures",
        where=f"protocol {ours.name}",
        fix="give one picture for each line of --captions, numbered 00000, 00001, …",
    )


def _opened(kind, protocol, field: str):
    source = getattr(protocol, field)
    if not source:
        examples = {
            "extractor": "inception or efficientnet_lite0",
            "clip": "the folder or hf:org/name of a CLIP checkpoint",
        }
        raise errors.ConfigError(
            f"its metrics need a network, and it names none as {field}",
            where=f"protocol {protocol.name}",
            fix=f"give --{field}=…, such as {examples[field]}",
        )
    return kind(source, protocol.resize)


class Measure:
    """One evaluation. It computes the columns of drawn and real images, and then the metrics.

    All processes must make it. The first alone calls `metrics`, in any thread.

    Args:
      protocol, nets: the protocol and its networks.
      batches: yields (uint8 images HWC of any size, their captions or None).
      reference: an .npz with mu and sigma, in place of real images.
    Attributes:
      provenance: hashes of everything that the numbers depend on.
    Raises:
      ConfigError: a metric needs captions and there are none, or needs more than `reference` has.
    """

    def __init__(self, protocol: Protocol, nets: Networks, batches, reference=None):
        self._protocol, self._nets = protocol, nets
        self._columns, self._res, self._own, self._sizes = {}, 0, None, set()
        self._first = jax.process_index() == 0
        # The judge of shapes works on the CPU while the devices draw the next batch.
        self._judges = concurrent.futures.ThreadPoolExecutor(1, "judge")
        self.provenance = nets.provenance()
        if reference:
            self._real = {"statistics": self._read(reference)}
        for pictures, texts in batches:
            self._add(pictures, texts)
        if not reference:
            self._real = self._real_features()

    def _add(self, pictures, texts) -> None:
        self._sizes |= {picture.shape[:2] for picture in pictures}
        # As real pictures are cut. Networks would see a rectangle stretched.
        pictures = [transforms.square(p, min(p.shape[:2])) for p in pictures]
        self._res = self._res or len(pictures[0])
        wanted = self._nets.drawn
        if texts is None and wanted & {"captions", "text_emb"}:
            raise errors.ConfigError(
                "the pictures have no captions, and a metric needs them",
                where=f"protocol {self._protocol.name}",
                fix="write metadata.jsonl beside the pictures, or choose other metrics",
            )
        columns = self._nets.columns(wanted, pictures, texts)
        for name in wanted & OF_GROUPS.keys():
            columns[name] = self._nets.of_groups(name, pictures, self._protocol.per_caption)
        if pairs := sorted(wanted & OF_PAIRS.keys()):
            # One iterator over all batches: the n-th real image belongs to the n-th caption.
            self._own = self._own or self._protocol.pictures(self._res)
            fix = "replace it, or choose metrics that do not compare with real pictures"
            where, of = f"protocol {self._protocol.name}", transforms.BadExample
            with errors.explained(errors.DataError, "a real picture", where=where, fix=fix, of=of):
                own = [
                    transforms.square(next(self._own), self._protocol.res or self._res)
                    for _ in pictures
                ]
            columns |= {name: self._nets.of_pairs(name, pictures, own) for name in pairs}
        # The first process alone computes metrics, so the others need no judge.
        if "captions" in wanted and self._first:
            columns["captions"] = list(texts)
            columns["shapes"] = [self._judges.submit(_judge, pictures, texts)]
        for name, rows in columns.items():
            self._columns.setdefault(name, []).append(rows)

    def _read(self, reference) -> statistics.Statistics:
        if more := {c for m in self._protocol.metrics for c in METRICS[m].real if m != "fid"}:
            raise errors.ConfigError(
                f"a mean and a covariance are enough for fid alone, not for {sorted(more)}",
                where="--reference",
                fix="leave it out, or choose a protocol without other distances",
            )
        real = statistics.load_foreign(reference)
        content = pathlib.Path(reference).read_bytes()
        self.provenance["real"] = {"sha256": hashlib.sha256(content).hexdigest()}
        return real

    def _real_features(self) -> dict:
        columns, names = {}, self._nets.real
        if wanted := names - {"trained"}:
            columns |= self._features("real", self._protocol.sources("data", self._res), wanted)
        if "trained" in names:
            sources = self._protocol.sources("train", self._res)
            columns["trained"] = self._features("trained", sources, {"pooled"}).get("pooled")
        return columns

    def metrics(self) -> dict[str, float]:
        """The protocol's metrics by name."""
        drawn = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        drawn["shapes"] = [row for job in drawn.get("shapes", ()) for row in job.result()]
        self._judges.shutdown()
        self._warn(drawn)
        values = {}
        for name, options in self._protocol.metrics.items():
            own = METRICS[name].fn(drawn, self._real, **options)
            values |= {self._nets.named(key, METRICS[name]): value for key, value in own.items()}
        return values

    def _warn(self, drawn) -> None:
        """Warns of distances that say little: they depend on the number and size of the images."""
        if len(self._sizes) > 1:
            sizes = " ".join(f"{h}×{w}" for h, w in sorted(self._sizes)[:5])
            logging.warning("pictures of %d sizes, such as %s", len(self._sizes), sizes)
        if any(h != w for h, w in self._sizes):
            logging.warning("of pictures that are no squares the middle square is judged")
        chosen, pooled, real = self._protocol.metrics, drawn.get("pooled"), self._real.get("pooled")
        if "fid" in chosen and len(pooled) <= pooled.shape[1]:
            logging.warning(
                "a Fréchet distance of %d pictures in %d dimensions is large for that alone: "
                "compare it with those of as many pictures only",
                *pooled.shape,
            )
        if "manifold" in chosen and not 0.5 <= len(pooled) / len(real) <= 2:
            logging.warning(
                "precision, recall, density and coverage mean little of %d pictures against %d: "
                'give the protocol\'s data a "size"',
                *(len(pooled), len(real)),
            )

    def _features(self, role: str, sources, columns) -> dict[str, np.ndarray]:
        """Columns of real images, computed once and then stored in a file."""
        # The file's name is a hash of all that the columns depend on. So no stale file is read.
        nets = self._nets.provenance()
        options = self._protocol.data if role == "real" else self._protocol.train
        # What a source makes of its pictures is no part of its fingerprint.
        shaped = [{k: part[k] for k in ("pad", "res") if k in part} for part in options]
        made_of = {
            **({"shaped": shaped} if any(shaped) else {}),
            "data": [source.fingerprint for source in sources],
            "res": self._protocol.res or self._res,
            "nets": [net["fingerprint"] for net in nets.values()],
            "columns": sorted(columns),
        }
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        home = pathlib.Path(os.environ.get(CACHE, "~/.cache/t2i_jax")).expanduser()
        path = home / "features" / f"{key[:32]}.npz"
        if distributed.as_first(path.is_file()):
            # Other processes may be on hosts without this file. They do not need it, as the first
            # alone calls `metrics`.
            # The name holds half of the hash, the file the whole.
            arrays = statistics.load_arrays(path, expected={"made_of": key}) if self._first else {}
        else:
            logging.info("features of %d pictures, once …", sum(map(len, sources)))
            arrays = self._extracted(sources, made_of["res"], columns)
            if self._first:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    statistics.save_arrays(path, arrays, source={"made_of": key})
                except OSError as e:  # they are in memory, and all is drawn by now
                    logging.warning("features are not kept: %s", e)
        if not self._first:
            return arrays
        count = len(next(iter(arrays.values())))
        broken = sum(map(len, sources)) - count
        if broken:
            logging.warning("%d of the %s pictures are broken and left out", broken, role)
        self.provenance[role] = {"sha256": key, "pictures": count, "broken": broken}
        return arrays

    def _extracted(self, sources, res: int, columns) -> dict[str, np.ndarray]:
        parts, pictures = {}, []
        examples = ((source, record) for source in sources for record in range(len(source)))
        # The last turn has no example and only extracts the rest.
        for source, record in (*examples, (None, None)):
            if source is not None:
                try:
                    pictures.append(transforms.square(source[record]["image"], res))
                except transforms.BadExample as e:
                    logging.warning("record %d: %s", record, e)
            if len(pictures) == BATCH or (source is None and pictures):
                for name, rows in self._nets.columns(columns, pictures).items():
                    parts.setdefault(name, []).append(rows)
                pictures = []
        if not parts:
            raise errors.DataError(
                "all of the real pictures are broken",
                where=f"protocol {self._protocol.name}",
                fix="give whole pictures",
            )
        return {name: np.concatenate(rows) for name, rows in parts.items()}


def _judge(pictures, texts):
    small = [transforms.square(p, min(*p.shape[:2], JUDGED)) for p in pictures]
    return [shapes.judge(*pair) for pair in zip(small, texts, strict=True)]
