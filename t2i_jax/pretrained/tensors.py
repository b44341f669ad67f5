"""safetensors -> parameters: whose tensors they are, and which parts of them are read."""

import fnmatch
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
import safetensors
from flax import traverse_util

from t2i_jax import errors
from t2i_jax.pretrained import hf

PIECE = 2**20  # numbers that are looked at together
PAGES, PAGE = 256, 4096  # of a file, that a mark of it is made of; bytes of a page
HEADER_BYTES = 2**22  # of a safetensors file: some 40,000 tensors, hundreds in the largest encoders


class Names(NamedTuple):
    """How a family's parameters are called in torch.

    tensors: path of a Linen module -> torch module, or several, concatenated along the output axis;
      `{}` stands for the layer's number on both sides, of several in their order. Where a path has
      two, as "blocks_0to11", its parameters are those layers' stacked. A leaf `kernel`
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


def alike(paths) -> dict[str, str]:
    """A table for modules that are called as in torch: "blocks_{}/norm" is "blocks.{}.norm"."""
    return {path: path.replace("_{}", ".{}").replace("/", ".") for path in paths}


OURS = Names({}, ignored=("*",))  # of files of our own: tensors are called as parameters are

_LEAVES = {
    **{"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}
_NUMBER = re.compile(r"_(\d+)(?:to(\d+))?(?=/|$)")  # of a layer, or of the first and last
_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # of torch's weight, in the order of a kernel's


class Source(NamedTuple):
    """What makes one parameter: tensors, their axes put in order, joined along the last one.

    layers: how many of these are stacked along a first axis, as a scan wants them; their tensors
      stand one after another. 0: the parameter is of one layer.
    """

    leaf: jax.ShapeDtypeStruct
    tensors: list
    axes: tuple[int, ...]
    layers: int = 0

    @property
    def by_layer(self) -> list[list]:
        """The tensors of each layer."""
        count = len(self.tensors) // max(self.layers, 1)
        return [self.tensors[i : i + count] for i in range(0, len(self.tensors), count)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, in one layer."""
        return _wide(self.leaf.shape[1:] if self.layers else self.leaf.shape)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in its file."""
        *lead, last = self.shape
        return _back((*lead, last // len(self.by_layer[0])), self.axes)

    def apart(self, value: np.ndarray) -> list[np.ndarray]:
        """The tensors of a parameter's value, as in their file: the inverse of `load`."""
        parts = []
        for layer in value if self.layers else [value]:
            for part in np.split(layer.reshape(self.shape), len(self.by_layer[0]), axis=-1):
                # argsort inverts a permutation. The copy is for safetensors, which writes memory as
                # it lies.
                parts.append(np.ascontiguousarray(part.transpose(np.argsort(self.axes))))
        return parts


def match(folder: pathlib.Path, abstract_params, names: Names) -> dict[str, Source]:
    """Path of each parameter -> where it comes from in a checkpoint's folder. Reads headers only.

    Raises:
      DataError: tensors are missing, unexpected or of another shape, or a file is no whole
        safetensors file.
    """
    found = _tensors(folder, names)
    plan, problems, used = {}, [], set()
    for path, made in wanted(abstract_params, names).items():
        if not made.tensors:
            problems.append(f"{path}: no net of this kind has it")
            continue
        used.update(made.tensors)
        for source in made.tensors:
            _flatten(found, source, made.tensor_shape)
            has = found[source].shape if source in found else "none"
            if has != made.tensor_shape:
                problems.append(f"{source}: want {made.tensor_shape}, found {has}")
            elif (kind := found[source].kind) not in hf.FLOATS:
                problems.append(f"{source}: want one of {', '.join(hf.FLOATS)}, found {kind}")
        plan[path] = made._replace(tensors=[found.get(name) for name in made.tensors])
    # Without prefixes startswith(()) is False, so every unused tensor is reported below.
    trunk = lambda source: found[source].name.startswith(names.prefixes)
    headed = any(map(trunk, found))
    for source in sorted(found.keys() - used):
        if not ignored(source, names) and not (headed and not trunk(source)):
            # A file's names may be of any length.
            problems.append(f"{source[:200]}: want none, found {found[source].shape}")
    if problems:
        more = " …" if len(problems) > hf.SHOWN else ""
        raise errors.DataError(
            f"{len(problems)} tensors do not fit: {'; '.join(problems[: hf.SHOWN])}{more}",
            where=str(folder),
            fix="use the config.json that was saved with these weights",
        )
    return plan


def wanted(abstract_params, names: Names) -> dict[str, Source]:
    """Path of each parameter -> its source, with names in place of tensors; none where the table
    does not know the parameter.
    """
    made = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params, sep="/").items():
        sources, kernel, layers = _sources(path, names)
        source = Source(leaf, sources, (), layers)
        axes = tuple(range(len(source.shape)))
        if sources and kernel and not names.untransposed:
            axes = _AXES[len(axes)]
        made[path] = source._replace(axes=axes)
    return made


def known(abstract_params, names: Names) -> int:
    """How many parameters the names tell the tensors of."""
    return sum(bool(source.tensors) for source in wanted(abstract_params, names).values())


def load(sources: dict[str, Source]):
    """The parameters that `match` found.

    Where a shape has a sharding, the parameter becomes a device array that lies so. Each process
    then reads its own devices' parts alone. Without one, it is a whole numpy array.

    Raises:
      DataError: a tensor holds values that are not finite.
    """
    params = {path: _array(source) for path, source in sources.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def stored(sources: dict[str, Source]):
    """The parameters' shapes, with the types that their file stores; of float64, float32."""

    def one(source):
        kinds = {hf.FLOATS[tensor.kind] for tensor in source.tensors}
        # float32 holds both half precisions exactly, and JAX has no float64 unless x64 is on.
        (kind,) = kinds if len(kinds) == 1 and kinds != {np.float64} else (np.float32,)
        return jax.ShapeDtypeStruct(source.leaf.shape, kind)

    return traverse_util.unflatten_dict({p: one(s) for p, s in sources.items()}, sep="/")


def ignored(tensor: str, names: Names) -> bool:
    """Whether a checkpoint's tensor is of no use to us."""
    return any(fnmatch.fnmatchcase(tensor, known) for known in names.ignored)


def pattern(module: str) -> str:
    """A module's path as Names writes it: `{}` in place of numbers."""
    return _NUMBER.sub("_{}", module)


class _Tensor(NamedTuple):
    """Where a tensor lies in a safetensors file; it is read by parts, never mapped into memory."""

    path: pathlib.Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, n) for n in self.shape))

    def read(self, index) -> np.ndarray:
        """The part at `index`, a slice for each axis, by as few reads as its rows allow."""
        spans = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        out = _aligned([len(span) for span in spans], hf.STORED[self.kind])
        steps = [math.prod(self.shape[i + 1 :]) for i in range(len(spans))]
        split = [i for i, span in enumerate(spans) if len(span) < self.shape[i]]
        axis = split[-1] if split else 0  # what lies beyond it is whole: one run of bytes
        rows = out.reshape(math.prod(out.shape[:axis]), -1)
        # Without a buffer the file's bytes go straight into `out`.
        with self.path.open("rb", buffering=0) as file:
            for row, place in zip(rows, itertools.product(*spans[:axis]), strict=True):
                # Axes beyond `axis` are whole: they begin at 0 and add nothing, hence the unequal
                # lengths.
                at = sum(i * n for i, n in zip((*place, spans[axis].start), steps, strict=False))
                file.seek(self.start + at * out.itemsize)
                # As bytes: Python's buffers know no bfloat16, and `readinto` counts in bytes.
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


def mark(folder: pathlib.Path) -> str:
    """A hash of the lengths of a checkpoint's files and of pages spread over them. Training changes
    all weights, so it tells other ones apart, and reads no file of ten gigabytes whole.
    """
    whole = hashlib.sha256()
    for path in files_of(folder):
        size = path.stat().st_size
        whole.update(f"{path.name} {size} ".encode())
        with path.open("rb") as f:
            for place in np.linspace(0, max(size - PAGE, 0), PAGES).astype(int):
                f.seek(place)
                whole.update(f.read(PAGE))
    return whole.hexdigest()


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a checkpoint's weights: one, or the shards that its index names."""
    index = hf.weights(folder)
    if index.suffix != ".json":
        return [index]
    shards = hf.read_json(index).get("weight_map")
    parts = sorted({str(file) for file in shards.values()} if isinstance(shards, dict) else ())
    for file in parts:
        if pathlib.PurePath(file).name != file:
            raise errors.DataError(
                f"names a file of another folder: {file[:200]!r}",
                where=str(index),
                fix="take the checkpoint from a source you trust",
            )
    return [folder / file for file in parts]


def digest(folder: pathlib.Path) -> str:
    """A SHA-256 of the files that hold a checkpoint's weights."""
    each = "".join(map(hf.sha256, files_of(folder)))
    return hashlib.sha256(each.encode()).hexdigest()


def _tensors(folder, names):
    """torch name without prefix -> _Tensor."""
    found = {}
    for file in files_of(folder):
        for name, tensor in header(file)[0].items():
            prefix = next((p for p in names.prefixes if name.startswith(p)), "")
            plain = name.removeprefix(prefix)
            for old, new in names.renamed:
                plain = plain.replace(old, new)
            if plain in found:
                raise errors.DataError(
                    f"two tensors are called {plain[:200]!r}",
                    where=str(file),
                    fix="save the checkpoint again with save_pretrained",
                )
            found[plain] = tensor
    for name, same in names.tied:
        if name not in found and same in found:
            found[name] = found.pop(same)
    return found


def header(path: pathlib.Path) -> tuple[dict, dict[str, str]]:
    """A safetensors file's tensors by name, and its notes, after the library found it whole."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if size > HEADER_BYTES:  # so that hostile ones take neither time nor memory
                # Not looked for before: a sound file may begin so, too.
                if start.startswith((b"PK", b"\x80\x02", b"\x80\x04")):
                    raise errors.DataError(
                        "a zip or a pickle, which can run code when it is opened",
                        where=str(path),
                        fix="take the .safetensors of the same weights",
                    )
                raise ValueError(f"a header of {size:,} bytes")
            text = file.read(size)
        # The library checks all offsets against the file's size. The reads rely on that.
        safetensors.safe_open(path, framework="np")
        listed = json.loads(text)
    except errors.DataError:  # a ValueError, too
        raise
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise errors.DataError(
            f"not a whole safetensors file: {e}", where=str(path), fix="copy it again"
        ) from e
    notes = listed.pop("__metadata__", {})
    # Offsets count from behind the header, before which its length takes 8 bytes.
    place = lambda t: (t["dtype"], _wide(tuple(t["shape"])), 8 + size + t["data_offsets"][0])
    return {name: _Tensor(path, name, *place(t)) for name, t in listed.items()}, notes


def check_room(arrays, dtype) -> None:
    """Raises ConfigError where values of an array, by its name, are not finite in a type."""
    with np.errstate(over="ignore"):  # told below
        lost = [k for k, x in arrays.items() if not _finite(np.asarray(x).astype(dtype))]
    if lost:
        raise errors.ConfigError(
            f"{dtype} has no room for values of {', '.join(lost[:5])}",
            where="--dtype",
            fix="export with --dtype=float32",
        )


def _flatten(found: dict[str, _Tensor], source: str, shape: tuple) -> None:
    """Takes a 1 × 1 convolution, as old files have it in attention, for the product it is."""
    if source in found and found[source].shape == (*shape, 1, 1):
        found[source] = found[source]._replace(shape=shape)


def _sources(path: str, names: Names) -> tuple[list[str], bool, int]:
    """The torch tensors that make the parameter at `path`, whether they are of a kernel, and of how
    many stacked layers.
    """
    if names is OURS:
        return [path], False, 0
    module, _, leaf = path.rpartition("/")
    numbers = _NUMBER.findall(module)
    modules = names.tensors.get(pattern(module), ())
    modules = (modules,) if isinstance(modules, str) else modules
    ending = f".{_LEAVES[leaf]}" if leaf != "value" else ""
    spans = [range(int(first), int(last or first) + 1) for first, last in numbers]
    each = itertools.product(*spans)
    sources = [m.format(*numbers) + ending for numbers in each for m in modules]
    stacked = any(last for _, last in numbers)
    return sources, leaf == "kernel", math.prod(map(len, spans)) if stacked else 0


def _array(source: Source):
    part, leaf = functools.partial(_part, source), source.leaf
    if getattr(leaf, "sharding", None) is None:
        return part((slice(None),) * len(leaf.shape))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _part(source: Source, index) -> np.ndarray:
    """A parameter at `index`, a slice for each axis."""
    # JAX asks for a single number by an empty index; its tensor is read as a vector of one.
    index = index or (slice(None),)
    if source.layers:
        first, *rest = index
        chosen = range(*first.indices(source.layers))
        return np.stack([_of_layer(source, source.by_layer[i], rest) for i in chosen])
    whole = _of_layer(source, source.tensors, index)
    return whole if source.leaf.shape else whole[0]


def _of_layer(source: Source, tensors, index) -> np.ndarray:
    parts, wide = [], source.shape
    *lead, last = (range(*s.indices(n)) for s, n in zip(index, wide, strict=True))
    width = wide[-1] // len(tensors)
    for i, tensor in enumerate(tensors):
        inside = range(max(last.start - i * width, 0), min(last.stop - i * width, width))
        # A device may hold no column of this one of the joined tensors.
        if not inside:
            continue
        at = [slice(span.start, span.stop) for span in (*lead, inside)]
        part = tensor.read(_back(at, source.axes))
        if not _finite(part):
            raise errors.DataError(
                f"{tensor.name} holds NaN or infinite values",
                where=str(tensor.path),
                fix="copy the checkpoint again",
            )
        parts.append(part.transpose(source.axes).astype(source.leaf.dtype, copy=False))
    # Of one part concatenate would make a copy, without the alignment that spares JAX its own.
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _finite(part: np.ndarray) -> bool:
    """Whether all values are finite, by pieces: a mask of all takes half of what float16 does."""
    flat = part.reshape(-1)
    return all(np.isfinite(flat[i : i + PIECE]).all() for i in range(0, flat.size, PIECE))


def _wide(shape: tuple) -> tuple:
    """A shape of one axis at least: a single number is read as a vector of one."""
    return shape or (1,)


def _back(values, axes) -> tuple:
    """What stands for a parameter's axes, in the order of its tensor's."""
    return tuple(value for _, value in sorted(zip(axes, values, strict=True), key=lambda x: x[0]))
