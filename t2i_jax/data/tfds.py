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
    """Examples of a prepared builder, as those of `folder.Source`, read on access.

    Opening it checks the number of records in every shard. For the arguments and errors see `make`.
    """

    def __init__(self, builder, *, split, res, image_key="", caption_key="", captions=1, pad=False):
        info, where = builder.info, f"{builder.info.full_name} in {builder.data_dir}"
        leaves = {"/".join(path): (path, *leaf) for path, *leaf in _leaves(info.features)}
        images = [name for name, leaf in leaves.items() if _is_image(*leaf[1:])]
        texts = [name for name, leaf in leaves.items() if _is_text(*leaf[1:])]
        image_key = _choose("image", image_key, images, ("image",), leaves, where)
        caption_key = _choose("caption", caption_key, texts, CAPTION_NAMES, leaves, where)
        self._image, self._caption = leaves[image_key][0], leaves[caption_key][0]
        self._captions, self._pad = captions, pad
        self._size = (res, res) if isinstance(res, int) else res
        what, fix = f"unknown split {split!r}", errors.nearest(split, info.splits)
        of = (ValueError, KeyError)
        with errors.explained(errors.DataError, what, where=where, fix=fix, of=of):
            shards = info.splits[split].file_instructions
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
        # A shard that a full disk or a broken copy has cut would fail in the middle of a training.
        for shard in shards:
            _check(shard)
        # Names and sizes of shards, not contents: hashing those would read the whole data set.
        files = [(os.path.basename(s.filename), s.skip, s.take) for s in shards]
        sizes = [os.path.getsize(s.filename) for s in shards]
        identity = [info.full_name, image_key, caption_key, captions, files, sizes]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records) * self._captions

    def __getitem__(self, index: int) -> dict:
        image, caption = self._read(index)
        image_HWC, scale = transforms.decode_scaled(image, max(self._size))
        if self._pad:
            image_HWC = transforms.pad(image_HWC, self._size)
        return {"image": image_HWC, "caption": caption, "scale": scale}

    def captions(self):
        """Yields all captions in order, "" for a broken record. No image is decoded."""
        for index in range(len(self)):
            try:
                yield self._read(index)[1]
            except transforms.BadExample:
                yield ""

    def _read(self, index: int) -> tuple[bytes, str]:
        record, which = divmod(index, self._captions)
        try:
            example = self._records[record]
        except RuntimeError as e:  # array_record raises it for a wrong checksum
            raise transforms.BadExample(f"unreadable record: {e}") from e
        texts = _at(example, self._caption)
        texts = [texts] if isinstance(texts, bytes) else texts
        if not len(texts):
            raise transforms.BadExample(f"no caption: record {record}")
        # An image with fewer captions repeats them: all have equally many examples.
        return _at(example, self._image), texts[which % len(texts)].decode(errors="replace")


def make(
    name: str,
    *,
    split: str = "train",
    res: int | tuple[int, int] = 32,
    holdout: float = 0.0,
    data_dir: str = "",
    image_key: str = "",
    caption_key: str = "",
    captions: int = 1,
    pad: bool = False,
) -> Source:
    """A data set that TFDS has prepared as array_record. Its own code is not needed.

    Args:
      name: "name", "name/config" or "name/config:1.0.0".
      split: in TFDS's notation: "train", "train[:90%]", "train+test".
      res: pixels a side of the final squares, or height and width. Large photographs are decoded
        near it.
      holdout: share of the split "train" that becomes "test". These are its first examples.
      data_dir: the folder of TFDS's data, by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      image_key: the image feature, "a" or "a/b". By default the only one, or the one called image.
      caption_key: the text, or list of texts. By default the one with a name of CAPTION_NAMES.
      captions: examples for each image, which take its captions in turn.
      pad: adds white bars instead of cutting out the middle.
    Raises:
      ConfigError: a holdout out of range, or a split that does not go with one.
      DataError: not prepared, another format, no such split or feature, or damaged shards.
    """
    if holdout:
        # TFDS's own notation for parts of a split. It cuts at the same example on every machine.
        # Fixed decimals, as TFDS reads no exponent such as 1e-05.
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
    except ValueError as e:  # an unknown name, or an empty one
        option = f", data_dir={data_dir!r}" if data_dir else ""
        raise errors.DataError(
            f"no prepared data set {name!r}",
            where=data_dir or "the data directory of TFDS",
            fix='prepare it, python -c "import tensorflow_datasets as tfds; tfds.builder('
            f"{name!r}, file_format='array_record'{option}).download_and_prepare()\", which needs "
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
    """Yields (path, feature, whether it is in a list) for every leaf below a feature."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for name, child in feature.items():
            yield from _leaves(child, (*path, name), listed)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, path, True)
    else:
        yield path, feature, listed


def _is_image(feature, listed) -> bool:
    kinds = (np.uint8, np.uint16)  # not float32: TFDS stores it as the bytes of an RGBA image
    return isinstance(feature, tfds.features.Image) and feature.np_dtype in kinds and not listed


def _is_text(feature, listed) -> bool:
    return isinstance(feature, tfds.features.Tensor) and feature.np_dtype in (object, str)


def _choose(kind: str, key: str, features: list, usual: tuple, leaves, where: str) -> str:
    """The key, if set, else the only feature with a usual name, else the only image at all."""
    named = [name for name in features if leaves[name][0][-1] in usual]
    choices = [key] if key else named or (features if kind == "image" else [])
    if len(choices) == 1 and choices[0] in features:
        return choices[0]
    raise errors.DataError(
        f"no {kind} feature {key!r}" if key else f"{len(choices)} features look like a {kind}",
        where=where,
        fix=f"set config.data.{kind}_key to one of {sorted(features)}; there are {sorted(leaves)}",
    )


def _undecoded(feature):
    """TFDS decoders that leave images as bytes. TFDS itself would decode without our limits."""
    if isinstance(feature, tfds.features.FeaturesDict):
        below = {name: _undecoded(child) for name, child in feature.items()}
        return {name: decoder for name, decoder in below.items() if decoder}
    return tfds.decode.SkipDecoding() if isinstance(feature, tfds.features.Image) else None


def _check(shard) -> None:
    """Raises DataError unless a shard opens and holds as many records as it should."""
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
