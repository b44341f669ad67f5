"""Protocols: JSON files of all that a figure depends on beside the model.

What a file leaves out has the default of `Protocol`'s field; `evaluators/protocols` holds ours.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

from t2i_jax import errors, fields, files, plugins

_OPTIONS = fields.Rule(
    lambda metrics: all(hasattr(options, "items") for options in metrics.values()),
    ": name -> an object of options",
)
_SOURCE = fields.Rule(lambda part: "source" in part, ' that each name a "source"')
Sources = Annotated[tuple[Mapping, ...], _SOURCE]
FOLDER = pathlib.Path(__file__).parent.parent / "evaluators" / "protocols"


class Protocol(NamedTuple):
    """How a model is judged.

    data: sources of captions and real pictures by their options ("source", "split", …), which get
      equal shares of the captions.
    metrics: name -> options, of `quality.measure.METRICS`.
    num_images: pictures drawn in all.
    per_caption: how many of them of each caption.
    seed: of the choice of captions and the noise.
    sample: options for the sampler; the model's own by default.
    ema: averaged parameters, where the model has them.
    res: side of the real pictures; the drawn ones' by default.
    extractor: the image network of distances between sets, see `pretrained.hf.locate`.
    clip: the dual encoder that compares pictures with captions.
    resize: the rule by which pictures come to a network's side, of `quality.resize.RULES`.
    train: as `data`: the pictures that a model may have memorised.
    """

    name: str
    data: Sources
    metrics: Annotated[Mapping, _OPTIONS]
    num_images: fields.Size
    per_caption: fields.Size = 1
    seed: fields.Seed = 0
    sample: Mapping = {}
    ema: bool = True
    res: Annotated[int | None, fields.at_least(1)] = None
    extractor: str | None = None
    clip: str | None = None
    resize: str = "clean"
    train: Sources = ()

    @property
    def sha256(self) -> str:
        """See `digest`."""
        return digest(self._asdict())

    def sources(self, name: str, res: int):
        """The data sources of the field `name`, "data" or "train"."""
        return [_source(options, self.res or res, self.name) for options in getattr(self, name)]

    def captions(self) -> list[str]:
        """One for each picture to draw, in order."""
        found, sources = [], self.sources("data", self.res or 32)  # no picture is looked at
        for source, records in self._chosen(sources):
            # A record comes with its image, which would be decoded for nothing.
            if hasattr(source, "captions"):
                texts = list(source.captions())
                found += [texts[record] for record in records]
            else:
                found += [source[int(record)]["caption"] for record in records]
        return [text for text in found for _ in range(self.per_caption)]

    def pictures(self, res: int):
        """The real pictures of `captions`, one after another, as their sources give them."""
        for source, records in self._chosen(self.sources("data", res)):
            for record in records:
                image_HWC = source[int(record)]["image"]
                yield from [image_HWC] * self.per_caption

    def _chosen(self, sources):
        """(source, its records whose captions are drawn), …"""
        count = self.num_images // self.per_caption
        for place, source in enumerate(sources):
            # Captions are dealt out in turn: where they do not divide, the first get one more.
            share = len(range(place, count, len(sources)))
            yield source, self._choose(share, len(source))

    def _choose(self, count: int, size: int) -> np.ndarray:
        """Records of a source, ascending; all of it, over and over, where that is not enough."""
        whole, rest = divmod(count, size)
        chosen = np.sort(np.random.default_rng(self.seed).permutation(size)[:rest])
        return np.concatenate([*[np.arange(size)] * whole, chosen])


def digest(definition: Mapping[str, Any]) -> str:
    """A hash of all fields but the name: what measures the same has the same hash.

    Rows of results hold their whole definition, so that it can be computed of older ones, whose own
    hash has the name in it.
    """
    measured = {field: value for field, value in definition.items() if field != "name"}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def read(name: str, *, path: str | None = None, **changes) -> Protocol:
    """A protocol by its name in FOLDER, or by the path of a .json file.

    Args:
      path: for the `path` of data that a protocol leaves open with null.
      changes: other values for its fields; its name then says so.
    Raises:
      ConfigError: no such protocol, or a field that is unknown, missing or of a wrong kind.
    """
    file = pathlib.Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    known = [p.stem for p in FOLDER.glob("*.json")]
    if not file.is_file():
        fix = f"{errors.nearest(name, known)}, or give the path of a .json file"
        raise errors.ConfigError(f"no protocol {name!r}", where=str(file), fix=fix)
    fix = "write an object of fields, as those of evaluators/protocols"
    with errors.explained(errors.ConfigError, "not readable as JSON", where=file, fix=fix):
        values = json.loads(files.read_text(file))
    changes = {key: value for key, value in changes.items() if value not in (None, {})}
    label = file.stem + "".join(f" {key}={changes[key]}" for key in sorted(changes))
    values = _checked(values, changes, str(file))
    if path:
        opened = [part for part in values["data"] if part.get("path", "") is None]
        if not opened:
            raise errors.ConfigError(
                "the protocol names its data itself", where="--data", fix="leave --data out"
            )
        for part in opened:
            part["path"] = path
    if any(value is None for part in values["data"] for value in part.values()):
        raise errors.ConfigError(
            f"protocol {file.stem!r} judges data of yours", where="--data", fix="give its folder"
        )
    return Protocol(**{**values, "name": label})


def _checked(values, changes, where: str) -> dict:
    """The fields of a file with the changes, each of the kind it should be."""
    if not isinstance(values, dict):
        raise errors.ConfigError("no object", where=where, fix="write {…}")
    if isinstance(values.get("sample"), dict) and "sample" in changes:
        changes = {**changes, "sample": {**values["sample"], **changes["sample"]}}
    values = {**values, **changes}
    for field in ("data", "metrics", "num_images"):
        if not values.get(field):
            raise errors.ConfigError(f"{field} is missing", where=where, fix="add it")
    # `given`: the first field, the name, is no part of a file.
    values = fields.check(Protocol, values, where=where, given=1)
    if values["num_images"] % values.get("per_caption", 1):
        raise errors.ConfigError(
            f"{values['num_images']} pictures, {values['per_caption']} of each caption",
            where=where,
            fix="make num_images a multiple of per_caption",
        )
    return values


def _source(options, res: int, name: str):
    return plugins.source(options, where=f"protocol {name}", res=res)
