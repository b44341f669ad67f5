"""Writes pipelines back as diffusers' folders: what was trained anew, all else as it was. Writes
autoencoders of our own as such.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from flax import traverse_util

from t2i_jax import errors, images
from t2i_jax.pretrained import autoencoder as autoencoders
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf, opener, tensors

LEFT = ("safety_checker", "image_encoder")  # parts that no pipeline of ours opens


def pipeline(
    opened: folders.Folder, output: pathlib.Path, parts: Mapping, dtype: str, others: Mapping
) -> None:
    """Writes a pipeline's folder with new parameters of some parts.

    Args:
      output: an empty or a new folder.
      parts: part, such as "unet" -> its parameters.
      dtype: of the tensors of these parts; those of others stay as they are.
      others: part -> the source of a network that takes its place. New parameters are written as
        that of its files.
    Raises:
      ConfigError: values that `dtype` has no room for.
    """
    for name, params in parts.items():
        flat = traverse_util.flatten_dict(params, sep="/")
        tensors.check_room({f"{name}/{path}": x for path, x in flat.items()}, dtype)
    for name in opened.index:  # what the hub has is fetched before anything is written
        if opened.has(name) and name not in LEFT and _has_weights(name):
            hf.locate(others.get(name, opened.part(name)))
    base = hf.locate_pipeline(opened.source)
    output.mkdir(parents=True, exist_ok=True)
    index = dict(opened.index)
    for name in index:
        if not opened.has(name):
            continue
        if name in parts:
            component(others.get(name, opened.part(name)), parts[name], output / name, dtype)
        elif name in others:
            other = opener.open(others[name])
            if index[name][0] == "diffusers":  # it may be of another class
                index[name] = ["diffusers", other.config["model_type"]]
            copied(other.folder, output / name)
        elif name in LEFT or not (base / name).is_dir():
            # So diffusers writes a part that a pipeline lacks.
            index[name] = [None, None]
        else:
            copied(base / name, output / name)
    # It comes last: without it, a folder that was cut short is no pipeline.
    text = json.dumps(index, indent=2) + "\n"
    images.write_whole(output / hf.PIPELINE, text.encode())


def component(source: str, params, output: pathlib.Path, dtype: str) -> None:
    """Writes one network of transformers or diffusers with other parameters, in the files and under
    the names that it had.
    """
    checkpoint = opener.open(source)
    plan = checkpoint.plan({"params": params})
    flat = traverse_util.flatten_dict(params, sep="/")
    new = {}
    for path, one in plan.items():
        for tensor, value in zip(one.tensors, one.apart(np.asarray(flat[path])), strict=True):
            new[tensor.name] = value.astype(dtype)
    # Other programs may read what equals a tensor in its place.
    for config in checkpoint.towers().values():
        new |= {same: new[one] for one, same in checkpoint.family.names(config).tied if one in new}
    copied(checkpoint.folder, output, weights=False)
    files = tensors.files_of(checkpoint.folder)
    for file in files:
        arrays = {}
        for name, tensor in tensors.header(file)[0].items():
            # A head, or another tower, is no parameter of ours, but stays in the file.
            arrays[name] = new[name] if name in new else tensor.whole()
        images.write_whole(
            output / _plain(file.name), safetensors.numpy.save(arrays, {"format": "pt"})
        )
    _write_index(hf.weights(checkpoint.folder), output)


def autoencoder(net, params, output: pathlib.Path, dtype: str) -> None:
    """Writes an autoencoder of our own as a folder of diffusers.

    Args:
      net: its module, of `pretrained.autoencoder`.
      output: an empty or a new folder.
    Raises:
      ConfigError: diffusers has none of its kind, or `dtype` has no room for a value.
    """
    config = autoencoders.to_config(net)
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors.check_room(flat, dtype)
    new = {}
    for path, one in tensors.wanted(params, autoencoders.names(config)).items():
        for name, value in zip(one.tensors, one.apart(np.asarray(flat[path])), strict=True):
            new[name] = value.astype(dtype)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "diffusion_pytorch_model.safetensors"
    images.write_whole(file, safetensors.numpy.save(new, {"format": "pt"}))
    # It comes last: without it, a folder that was cut short is no network.
    images.write_whole(output / hf.CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _write_index(index: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the index of shards that lie in `output`, under plain names; nothing for one file."""
    if index.suffix == ".json":
        values = hf.read_json(index)
        values["weight_map"] = {k: _plain(str(v)) for k, v in values["weight_map"].items()}
        size = sum((output / file).stat().st_size for file in {*values["weight_map"].values()})
        values["metadata"] = {"total_size": size}
        images.write_whole(output / _plain(index.name), json.dumps(values, indent=2).encode())


def of_run(config) -> folders.Folder:
    """The pipeline that a run's config begins with.

    Raises:
      ConfigError: it begins with none.
    """
    source = config.load.get("model") or ""
    if isinstance(source, str) and "#" in source:
        whole = source.rpartition("#")[0]
        if folders.is_pipeline(whole):
            return folders.open(whole)
    raise errors.ConfigError(
        "the run's model is no part of a diffusers folder",
        where="--format=diffusers",
        fix="leave the flag out: the model is written in our own layout",
    )


def elsewhere(opened: folders.Folder, sources) -> dict[str, str]:
    """Part -> what a run read in place of the folder's own.   sources: of its nets, by `parse`"""
    texts = opener.each(sources.get("text"))
    read = {e.part: source for e, source in zip(opened.encoders, texts, strict=False)}
    read[folders.AUTOENCODER] = sources.get(folders.AUTOENCODER)
    return {
        part: source for part, source in read.items() if source not in (None, opened.part(part))
    }


def _has_weights(name: str) -> bool:
    return not (name.startswith(("tokenizer", "feature_extractor")) or name == hf.SCHEDULER)


def _plain(name: str) -> str:
    """A file's name without a variant: what is written need not be in half precision."""
    for variant in hf.VARIANTS:
        name = name.replace(f"{variant}.", ".").replace(f"{variant}-", "-")
    return name


def copied(folder: pathlib.Path, output: pathlib.Path, *, weights: bool = True) -> None:
    """Copies the files of a part that we read: texts, and its weights perhaps."""
    output.mkdir(parents=True, exist_ok=True)
    kept = [path for pattern in hf.TEXTS for path in sorted(folder.glob(pattern))]
    index = hf.weights(folder)
    # An index whose shards are not copied would name missing files.
    kept = [path for path in kept if not path.name.endswith(".index.json")]
    for path in kept:
        shutil.copyfile(path, output / path.name)
    if weights and index:
        for path in tensors.files_of(folder):
            shutil.copyfile(path, output / _plain(path.name))
        _write_index(index, output)
