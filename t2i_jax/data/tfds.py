"""Any prepared TFDS data set with an image and a text feature, read without TensorFlow."""

import functools
import hashlib
import json
import operator
import os

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from t2i_jax import errors
from t2i_jax.data import transforms

CAPTION_NAMES = ("caption", "captions", "text", "texts", "description", "prompt")


class Source:
    """Examples {"image": uint8 HWC, "caption": str} of a prepared builder, read when asked for.

    Opening it compares every shard with the builder's books; arguments and errors as in `make`.
    """

    def __init__(self, builder, *, split, res, image_key="", caption_key="", captions=1, pad=False):
        info, where = builder.info, f"{builder.info.full_name} in {builder.data_dir}"
        leaves = {"/".join(path): (path, *leaf) for path, *leaf in _leaves(info.features)}
        images = [name for name, leaf in leaves.items() if _is_image(*leaf[1:])]
        texts = [name for name, leaf in leaves.items() if _is_text(*leaf[1:])]
        image_key = _choose("image", image_key, images, ("image",), leaves, where)
        caption_key = _choose("caption", caption_key, texts, CAPTION_NAMES, leaves, where)
        self._image, self._caption = leaves[image_key][0], leaves[caption_key][0]
        self._captions, self._res, self._pad = captions, res, pad
        try:
            shards = info.splits[split].file_instructions
        except (ValueError, KeyError) as e:
            raise errors.DataError(
                f"unknown split {split!r}", where=where, fix=errors.nearest(split, info.splits)
            ) from e
        if not shards:
            raise errors.DataError(
                f"split {split!r} is empty", where=where, fix=f"use one of {sorted(info.splits)}"
            )
        try:
            self._records = builder.as_data_source(
                split, decoders=_undecoded(info.features), file_format="array_record"
            )
        except (ValueError, NotImplementedError) as e:
            raise errors.DataError(
                f"prepared as {info.file_format.value}, which has no random access",
                where=where,
                fix="where TensorFlow is installed, run: tfds convert_format "
                f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record",
            ) from e
        for shard in shards:
            _check(shard)
        files = [(os.path.basename(s.filename), s.skip, s.take) for s in shards]
        sizes = [os.path.getsize(s.filename) for s in shards]
        identity = [info.full_name, image_key, caption_key, captions, files, sizes]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records) * self._captions

    def __getitem__(self, index: int) -> dict:
        image, caption = self._read(index)
        image_HWC = transforms.decode(image, self._res)
        return {"image": transforms.pad(image_HWC) if self._pad else image_HWC, "caption": caption}

    def captions(self):
        """All captions in order, without decoding a picture; "" for a broken record."""
        for index in range(len(self)):
            try:
                yield self._read(index)[1]
            except transforms.BadExample:
                yield ""

    def _read(self, index: int) -> tuple[bytes, str]:
        record, which = divmod(index, self._captions)
        try:
            example = self._records[record]
        except RuntimeError as e:  # array_record's, where a checksum does not fit
            raise transforms.BadExample(f"unreadable record: {e}") from e
        texts = _at(example, self._caption)
        texts = [texts] if isinstance(texts, bytes) else texts
        if not len(texts):
            raise transforms.BadExample(f"no caption: record {record}")
        return _at(example, self._image), texts[which % len(texts)].decode(errors="replace")


def make(
    name: str,
    *,
    split: str = "train",
    res: int = 32,
    holdout: float = 0.0,
    data_dir: str = "",
    image_key: str = "",
    caption_key: str = "",
    captions: int = 1,
    pad: bool = False,
) -> Source:
    """A data set that TFDS has prepared as array_record; its own code is not needed.

    Args:
      name: "name", "name/config" or "name/config:1.0.0".
      split: in TFDS's notation: "train", "train[:90%]", "train+test".
      res: side of the squares wanted in the end; large photographs are decoded near it.
      holdout: share of the split "train", its first pictures, that "test" then is, and "train" not.
      data_dir: where TFDS keeps its data; TFDS_DATA_DIR or ~/tensorflow_datasets by default.
      image_key: the image feature, "a" or "a/b"; by default the only one, or the one called image.
      caption_key: the text or list of texts; by default the one with a name of CAPTION_NAMES.
      captions: examples made of each picture, with its captions in turn.
      pad: white bars instead of cutting off what lies beyond the middle square.
    Raises:
      DataError: not prepared, another format, no such split or feature, or damaged shards.
    """
    if holdout:
        percent = f"{100 * holdout:.6f}%"
        parts = {"train": f"train[{percent}:]", "test": f"train[:{percent}]"}
        if split not in parts or not 0 < holdout < 1:
            raise errors.ConfigError(
                f"split {split!r}, holdout {holdout}",
                where="config.data",
                fix=f"with a holdout, splits are {', '.join(parts)}; give one in (0, 1)",
            )
        split = parts[split]
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except ValueError as e:  # no such name, or no name
        there = f", data_dir={data_dir!r}" if data_dir else ""
        raise errors.DataError(
            f"no prepared data set {name!r}",
            where=data_dir or "the data directory of TFDS",
            fix='prepare it, python -c "import tensorflow_datasets as tfds; tfds.builder('
            f"{name!r}, file_format='array_record'{there}).download_and_prepare()\", which needs "
            "TensorFlow for some data sets; or set config.data.data_dir",
        ) from e
    return Source(
        builder,
        split=split,
        res=res,
        image_key=image_key,
        caption_key=caption_key,
        captions=captions,
        pad=pad,
    )


def _leaves(feature, path=(), listed=False):
    """(path, feature, whether it is in a list) of everything below a feature."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for name, child in feature.items():
            yield from _leaves(child, (*path, name), listed)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, path, True)
    else:
        yield path, feature, listed


def _is_image(feature, listed) -> bool:
    kinds = (np.uint8, np.uint16)  # TFDS keeps float32 as the bytes of an RGBA picture
    return isinstance(feature, tfds.features.Image) and feature.np_dtype in kinds and not listed


def _is_text(feature, listed) -> bool:
    return isinstance(feature, tfds.features.Tensor) and feature.np_dtype in (object, str)


def _choose(kind: str, given: str, found: list, usual: tuple, leaves, where: str) -> str:
    """The given key; without one, the only feature with a usual name, or the only image at all."""
    named = [name for name in found if leaves[name][0][-1] in usual]
    choices = [given] if given else named or (found if kind == "image" else [])
    if len(choices) == 1 and choices[0] in found:
        return choices[0]
    raise errors.DataError(
        f"no {kind} feature {given!r}" if given else f"{len(choices)} features look like a {kind}",
        where=where,
        fix=f"set config.data.{kind}_key to one of {sorted(found)}; there are {sorted(leaves)}",
    )


def _undecoded(feature):
    """TFDS decoders that leave pictures as bytes, for `transforms.decode` alone."""
    if isinstance(feature, tfds.features.FeaturesDict):
        below = {name: _undecoded(child) for name, child in feature.items()}
        return {name: decoder for name, decoder in below.items() if decoder}
    return tfds.decode.SkipDecoding() if isinstance(feature, tfds.features.Image) else None


def _check(shard) -> None:
    """DataError unless a shard opens and holds as many records as it should."""
    try:
        reader = array_record_module.ArrayRecordReader(shard.filename)
        count = reader.num_records()
        reader.close()
        problem = f"holds {count} records instead of {shard.examples_in_shard}"
    except RuntimeError as e:
        count, problem = None, f"does not open: {e}"
    if count != shard.examples_in_shard:
        raise errors.DataError(
            f"shard {problem}", where=shard.filename, fix="prepare the data set anew"
        )


def _at(example, path):
    return functools.reduce(operator.getitem, path, example)
