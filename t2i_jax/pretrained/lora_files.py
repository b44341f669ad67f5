"""Files of LoRA adapters: PEFT's layout, which diffusers writes, and kohya's, which is read.

PEFT: `<part>.<module>.lora_A.weight` (rank, in) and `lora_B.weight` (out, rank); of a convolution A
is (rank, in, height, width) and B (out, rank, 1, 1). kohya: `lora_unet_<module>.lora_down.weight`,
`.lora_up.weight` and `.alpha`, with "_" for each dot of the module's name.

An adapter here is a tree: kernel's path -> {"a": (in, rank), "b": (rank, out)}; what it adds is
a·b. Kernels that join several modules of torch share one A when they are written, and have their
A's side by side when they are read.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from flax import traverse_util

from t2i_jax import errors, images
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf, opener, original, tensors

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # PEFT's options as JSON, among the file's notes
KOHYA = {  # what kohya calls a pipeline's parts
    "lora_unet_": ("unet", "transformer"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
}
_PEFT = re.compile(r"(\w+?)\.(.+)\.lora_(A|B)\.weight")
_KOHYA = re.compile(r"(lora_(?:unet|te1?|te2)_)(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")


_OLDER = "text_model."


class Pair(NamedTuple):
    """One module's matrices, (in, rank) and (rank, out); their product is what is added."""

    a: np.ndarray
    b: np.ndarray


def write(folder: pathlib.Path, adapters: Mapping, plans: Mapping, dtype="float32") -> pathlib.Path:
    """Writes adapters in PEFT's layout, their scale multiplied in; returns the file.

    Args:
      folder: is made where it is missing.
      adapters: part, such as "unet" -> its adapter.
      plans: part -> what `tensors.match` found of its network.
    """
    arrays, notes = {}, {}
    for part, adapter in adapters.items():
        ranks, modules = set(), []
        for path, pair in _pairs(adapter).items():
            source = plans[part][path]
            a_L, b_L = (x if source.layers else x[None] for x in pair)
            for of_layer, a, b in zip(source.by_layer, a_L, b_L, strict=True):
                for tensor, b_out in zip(of_layer, np.split(b, len(of_layer), -1), strict=True):
                    module = module_of(tensor)
                    down, up = a.T, b_out.T
                    if len(source.axes) == 4:  # a convolution
                        down = a.reshape(*source.shape[:3], -1).transpose(3, 2, 0, 1)
                        up = up[..., None, None]
                    for name, value in (("lora_A", down), ("lora_B", up)):
                        key = f"{part}.{module}.{name}.weight"
                        arrays[key] = np.ascontiguousarray(value)
                    modules.append(module)
            ranks.add(pair.a.shape[-1])
        rank = max(ranks)
        # With alpha = r PEFT scales by 1, as the scale is in the matrices already.
        own = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
        notes |= {f"{part}.{name}": value for name, value in own.items()}
    note = {"format": "pt", METADATA: json.dumps(notes, sort_keys=True)}
    tensors.check_room(arrays, dtype)
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    folder.mkdir(parents=True, exist_ok=True)
    images.write_whole(folder / WEIGHTS, safetensors.numpy.save(arrays, note))
    return folder / WEIGHTS


def read(path: pathlib.Path, plans: Mapping) -> dict:
    """part -> adapter, of a file in either layout.

    Args:
      plans: part -> what `tensors.match` found of the network that it belongs to.
    Raises:
      DataError: a broken file, one of another kind of adapters, or of another model: it names
        modules that these networks lack, or matrices of other shapes.
    """
    found = _modules(path, plans)
    adapters = {}
    for part, pairs in found.items():
        tree = {}
        for kernel, source in plans[part].items():
            own = [[pairs.pop(module_of(t), None) for t in layer] for layer in source.by_layer]
            if any(map(any, own)):
                tree[kernel] = _stacked(source, own, path)
        if pairs:
            raise _misfit(
                path,
                f"{len(pairs)} modules are none of this model's {part}, such as "
                f"{next(iter(pairs))[:100]}",
            )
        flat = {f"{k}/{name}": x for k, pair in tree.items() for name, x in pair.items()}
        adapters[part] = traverse_util.unflatten_dict(flat, sep="/")
    return adapters


def opened(folder: folders.Folder, shapes: Mapping, files: Mapping[str, float]) -> dict:
    """net -> one adapter that adds what files say, each times its weight.

    Args:
      folder: the pipeline that they adapt.
      shapes: net -> shapes of its parameters.
      files: a file, or a folder with WEIGHTS in it -> its weight.
    """
    parts = {
        part: tree
        for part, tree in folder.by_part(shapes).items()
        if part.startswith("text") or part == folder.recipe.denoiser
    }
    plans = {p: opener.open(folder.part(p)).plan({"params": tree}) for p, tree in parts.items()}
    found = {}
    for name, weight in files.items():
        path = _file(name)
        if not path.is_file():
            raise errors.DataError(
                "no such file",
                where=str(path),
                fix=f"give {WEIGHTS}, or the folder it lies in; export --format=diffusers makes it "
                "of a run",
            )
        for part, adapter in read(path, plans).items():
            found.setdefault(part, []).append((adapter, float(weight)))
    return folder.by_net({part: combined(pairs) for part, pairs in found.items()})


def described(files: Mapping[str, float]) -> list[dict]:
    """The "name", "sha256" and "weight" of each file, for what tells how a picture was drawn."""
    # A list: most files of PEFT have the same name.
    return [
        {"name": _file(name).name, "sha256": hf.sha256(_file(name)), "weight": float(weight)}
        for name, weight in files.items()
    ]


def _misfit(path, what: str, fix: str = "use adapters that were made for this model"):
    return errors.DataError(what, where=str(path), fix=fix)


def _file(name: str) -> pathlib.Path:
    path = pathlib.Path(name).expanduser()
    return path / WEIGHTS if path.is_dir() else path


def combined(adapters):
    """One adapter that adds what several do, each times its weight: [(adapter, weight), …]."""
    sums = {}
    for adapter, weight in adapters:
        for path, (a, b) in _pairs(adapter).items():
            sums.setdefault(path, []).append((a, weight * b))
    flat = {}
    for path, pairs in sums.items():
        # (A₁ A₂)·(B₁ over B₂) = A₁·B₁ + A₂·B₂: exact, and its rank is the sum of the ranks.
        flat[f"{path}/a"] = np.concatenate([a for a, _ in pairs], axis=-1)
        flat[f"{path}/b"] = np.concatenate([b for _, b in pairs], axis=-2)
    return traverse_util.unflatten_dict(flat, sep="/")


def module_of(tensor) -> str:
    """The torch module whose weight a tensor is, as transformers 5 calls it: its CLIP has no
    "text_model." in front, which older ones have.
    """
    return tensor.name.removesuffix(".weight").removeprefix(_OLDER)


def _pairs(adapter) -> dict[str, Pair]:
    flat = traverse_util.flatten_dict(adapter, sep="/")
    paths = {path.rpartition("/")[0] for path in flat}
    return {p: Pair(np.asarray(flat[f"{p}/a"]), np.asarray(flat[f"{p}/b"])) for p in sorted(paths)}


def _stacked(source, layers, path) -> dict:
    """The pair of a kernel, of its layers' pairs; ranks are filled up with zeros."""
    pairs = [_joined(source, source.by_layer[i], own, path) for i, own in enumerate(layers)]
    if not source.layers:
        return pairs[0]
    rank = max(pair["a"].shape[1] for pair in pairs)
    fill = lambda x, axis: np.pad(
        x, [(0, rank - x.shape[axis] if i == axis else 0) for i in range(2)]
    )
    return {k: np.stack([fill(p[k], axis) for p in pairs]) for k, axis in (("a", 1), ("b", 0))}


def _joined(source, tensors, pairs, path) -> dict:
    """The pair of a layer's kernel that joins several modules; those without one add nothing."""
    inputs, outputs = math.prod(source.shape[:-1]), source.shape[-1]
    width = outputs // len(pairs)
    # A layer of which no module has a pair gets rank 0, and `_stacked` fills it up.
    columns, rows = [np.zeros((inputs, 0), np.float32)], [np.zeros((0, outputs), np.float32)]
    for i, pair in enumerate(pairs):
        if pair is None:
            continue
        if pair.a.shape[0] != inputs or pair.b.shape[1] != width:
            raise _misfit(
                path,
                f"{module_of(tensors[i])[:100]} is for {pair.a.shape[0]} inputs and "
                f"{pair.b.shape[1]} outputs, not {inputs} and {width}",
            )
        columns.append(pair.a)
        rows.append(np.pad(pair.b, ((0, 0), (i * width, outputs - (i + 1) * width))))
    return {"a": np.concatenate(columns, axis=1), "b": np.concatenate(rows, axis=0)}


def _modules(path, plans) -> dict[str, dict[str, Pair]]:
    """part -> torch module -> its pair."""
    listed, notes = tensors.header(path)
    found, unread = {}, []
    dotted = functools.cache(lambda part: _dotted(plans.get(part, {})))
    for name, tensor in listed.items():
        if tensor.kind not in hf.STORED:
            unread.append(f"{name} of type {tensor.kind}")
            continue
        if match := _PEFT.fullmatch(name):
            part, module, kind = match.groups()
            module = module.removeprefix(_OLDER)
        elif match := _KOHYA.fullmatch(name):
            prefix, flat, kind = match.groups()
            part = next((part for part in KOHYA[prefix] if part in plans), KOHYA[prefix][0])
            flat = flat.removeprefix(_OLDER.replace(".", "_")) if "_te" in prefix else flat
            module = dotted(part).get(flat, flat)
            kind = {"lora_down.weight": "A", "lora_up.weight": "B"}.get(kind, kind)
        else:
            unread.append(name)
            continue
        found.setdefault(part, {}).setdefault(module, {})[kind] = tensor.whole()
    if unread or not found:
        raise _misfit(
            path,
            f"no LoRA adapters that we read: {', '.join(unread[:3]) or 'no tensors'}",
            "give a file in PEFT's or kohya's layout, of plain LoRA",
        )
    if lacking := found.keys() - plans.keys():
        raise _misfit(path, f"adapters of {', '.join(sorted(lacking))}, which this model has not")
    options = _options(notes, path)
    return {
        part: {
            module: _pair(f"{part}.{module}", kinds, options.get(part, {}), path)
            for module, kinds in modules.items()
        }
        for part, modules in found.items()
    }


def _pair(name: str, kinds: dict, options: dict, path) -> Pair:
    """Matrices in our order, the scale alpha/rank multiplied in."""
    if not {"A", "B"} <= kinds.keys():
        raise _misfit(path, f"{name[:100]} has one matrix of two", "copy it again")
    a, b = (np.asarray(kinds[kind], np.float32) for kind in "AB")
    rank = a.shape[0]
    alpha = _number(kinds.get("alpha", options.get("lora_alpha")), rank)
    parts = _number(options.get("r") or None, rank)
    fits = rank and a.ndim in (2, 4) and b.ndim > 1 and b.size == len(b) * rank
    if not (fits and parts > 0 and all(np.isfinite(x).all() for x in (a, b, alpha))):
        raise _misfit(
            path,
            f"{name[:100]} has matrices of {list(a.shape)} and {list(b.shape)}, alpha {alpha} and "
            f"rank {parts}, or values that are not finite",
            "copy it again, or take adapters of plain LoRA",
        )
    a = a.transpose(2, 3, 1, 0).reshape(-1, rank) if a.ndim == 4 else a.T
    # Rank-stabilised LoRA divides by the root (arXiv:2312.03732, eq. 3).
    scale = alpha / (math.sqrt(parts) if options.get("use_rslora") else parts)
    return Pair(a, scale * b.reshape(b.shape[0], rank).T)


def _number(value, default: float) -> float:
    """What a tensor or a note says; NaN for what is no number."""
    if value is None:
        return default
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.astype(float).item()
    # Not isinstance, by which True would be 1. No comparison holds for NaN.
    fits = type(value) in (int, float) and abs(value) <= hf.LARGE
    return value if fits else math.nan


def _options(notes, path) -> dict[str, dict]:
    """part -> PEFT's options, of the file's notes."""
    try:
        values = json.loads(notes.get(METADATA, "{}"))
        flat = {key: value for key, value in values.items() if key.count(".")}
    # A list has no `items`, and JSON that is nested too deeply ends in a RecursionError.
    except (ValueError, AttributeError, RecursionError) as e:
        raise _misfit(path, f"its note {METADATA} is no JSON object: {e}", "save it again") from e
    options = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        # Ignored, these options would silently change what the adapter adds.
        if name in ("alpha_pattern", "rank_pattern", "use_dora") and value:
            raise _misfit(path, f"{name} is not implemented", "save the adapters merged")
        if name in ("r", "lora_alpha", "use_rslora"):
            options.setdefault(part, {})[name] = value
    return options


def _dotted(plan) -> dict[str, str]:
    """What kohya writes with "_" for dots -> the module, also under its original name."""
    # Names have underscores of their own. So only the network's list tells which were dots.
    modules = {module_of(tensor) for source in plan.values() for tensor in source.tensors}
    names = original.in_unet(modules) | {module: module for module in modules}
    return {name.replace(".", "_"): module for name, module in names.items()}
