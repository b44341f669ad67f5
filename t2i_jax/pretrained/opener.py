"""One door to pretrained networks: a source -> a checkpoint -> its module and its parameters.

A file of this package reads the kinds of network that its KINDS name: a config.json's `model_type`,
or `_class_name` of diffusers. It has `from_config(config, **options)`, the module, and
`names(config)`, how its parameters are called there; `towers(config)` where a checkpoint may hold
two networks.
"""

import functools
import importlib
import pathlib
import pkgutil
import types
import typing
from typing import NamedTuple

import flax.linen as nn
import jax

from t2i_jax import errors, fields, files, pretrained
from t2i_jax.models.types import Cond, Features, Moments, Output
from t2i_jax.pretrained import hf, tensors, vit

USES = {  # of a network, by what its module returns
    **{Cond: "a text encoder", Features: "an image network"},
    **{Moments: "an autoencoder", Output: "a denoiser"},
}


class Checkpoint(NamedTuple):
    """An opened checkpoint.

    config: of its config.json; as "preprocessor" that of its preprocessor, if there is one.
    family: the file of this package that reads it.
    """

    folder: pathlib.Path
    config: dict
    family: types.ModuleType

    @property
    def name(self) -> str:
        """Of the family, such as "clip"."""
        return self.family.__name__.rpartition(".")[2]

    def module(self, wanted: type | None = None, /, **options) -> nn.Module:
        """The network, still without weights.

        Args:
          wanted: what it has to return, `Cond` or `Features`; None takes the first that there is.
          options: of the family's `from_config`.
        Raises:
          ConfigError: it is not what is wanted, or config.json or an option asks for something that
            is not implemented.
        """
        where = str(self.folder / hf.CONFIG)
        try:
            towers = self.towers()
            if wanted and wanted not in towers:
                of_that_use = sorted(k for k, f in families().items() if wanted in gives(f))
                raise errors.ConfigError(
                    f"{USES[wanted]} is wanted here, and this is "
                    f"{' and '.join(USES[one] for one in towers)}",
                    where=where,
                    fix=f"use a checkpoint of one of {', '.join(of_that_use)}",
                )
            config = towers[wanted or next(iter(towers))]
            at = f"config.text.{self.name}"
            return fields.build(self.family.from_config, options, config, where=at)
        except errors.ConfigError as e:
            # Families do not know the folder: what they call config.json gets its path here.
            if e.where != hf.CONFIG:
                raise
            raise errors.ConfigError(e.what, where=where, fix=e.fix) from e

    def check(self, shapes):
        """The shapes with the types that the file stores; DataError unless `load` will find every
        tensor, and no other.

        Of a checkpoint without weights (`hf.configs_alone`), with the type that config.json says.
        """
        if hf.weights(self.folder) is None:
            said = self.config.get("dtype") or self.config.get("torch_dtype")
            kind = said if said in ("float16", "bfloat16") else "float32"
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), shapes)
        return {"params": tensors.stored(self.plan(shapes))}

    def load(self, shapes):
        """Variables {"params": …} of `module()`: shaped, typed and placed as `shapes`."""
        return {"params": tensors.load(self.plan(shapes))}

    def towers(self) -> dict[type, dict]:
        """What a network returns, `Cond` or `Features` -> its config: of most checkpoints one."""
        if hasattr(self.family, "towers"):
            return self.family.towers(self.config)
        return {gives(self.family)[0]: self.config}

    def plan(self, shapes) -> dict[str, tensors.Source]:
        """Path of each parameter -> the tensors that make it; errors as of `check`."""
        # Of two towers it is the one that knows the parameters.
        tables = [self.family.names(config) for config in self.towers().values()]
        names = max(tables, key=lambda names: tensors.known(shapes["params"], names))
        return tensors.match(self.folder, shapes["params"], names)


def parse(source):
    """What `config.load` or a flag says, as a source: None for nothing, a tuple for several, which
    a string that is no folder names with commas between.
    """
    source = str(source) if isinstance(source, pathlib.PurePath) else source
    if isinstance(source, str) and "," in source and not hf.split(source)[0].is_dir():
        source = [one.strip() for one in source.split(",")]
    if source is None or isinstance(source, str):
        return source or None
    return tuple(source)


def each(source) -> tuple[str, ...]:
    """The sources that one names, which `parse` gave."""
    return () if source is None else (source,) if isinstance(source, str) else source


def open(source: str) -> Checkpoint:
    """The pretrained checkpoint that `hf.locate` finds.

    Raises:
      ConfigError: of a kind that no file of this package reads.
      DataError: it is not there, or not as it should be.
    """
    return _opened(hf.locate(source))


@files.remembered  # a start asks for a net's module, tokenizer, shapes and weights
def _opened(folder: pathlib.Path) -> Checkpoint:
    config = hf.read_json(folder / hf.CONFIG)
    if (folder / vit.PREPROCESSOR).is_file():
        config["preprocessor"] = hf.read_json(folder / vit.PREPROCESSOR)
    # JSON may have a list there.
    kind = config["model_type"] = str(config.get("model_type", config.get("_class_name")))
    if kind not in families():
        raise errors.ConfigError(
            f"model_type {kind!r} is no network that we read",
            where=str(folder / hf.CONFIG),
            fix=f"use a checkpoint of one of {', '.join(sorted(families()))}",
        )
    return Checkpoint(folder, config, families()[kind])


def check(source, shapes):
    """`Checkpoint.check` of one source, or of several whose parameters lie side by side."""
    return _together(source, [c.check(part) for c, part in _each(source, shapes)])


def load(source, shapes):
    """`Checkpoint.load` of one source, or of several whose parameters lie side by side."""
    return _together(source, [c.load(part) for c, part in _each(source, shapes)])


def _together(source, variables):
    if isinstance(source, str):
        return variables[0]
    return {"params": {f"encoders_{i}": v["params"] for i, v in enumerate(variables)}}


def _each(source, shapes):
    if isinstance(source, str):
        return [(open(source), shapes)]
    if (n := len(shapes["params"])) != len(source):
        raise errors.ConfigError(
            f"{len(source)} sources of a net with {n} parts",
            where=", ".join(source),
            fix="name as many as the model has encoders, in its order",
        )
    parts = [{"params": shapes["params"][f"encoders_{i}"]} for i in range(len(source))]
    return zip(map(open, source), parts, strict=True)


@functools.cache
def families() -> dict[str, types.ModuleType]:
    """Kind of network -> the file of this package that reads it. A new one needs no entry here."""
    names = [f"{pretrained.__name__}.{m.name}" for m in pkgutil.iter_modules(pretrained.__path__)]
    modules = [importlib.import_module(name) for name in names]
    return {kind: module for module in modules for kind in getattr(module, "KINDS", ())}


def gives(family) -> tuple[type, ...]:
    """What the modules of a family return: a condition, or features. Their annotations say so."""
    made = family.from_config.__annotations__["return"]
    return tuple(m.__call__.__annotations__["return"] for m in typing.get_args(made) or (made,))
