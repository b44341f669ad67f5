"""Image networks by source: the module that a checkpoint's config.json names, and its parameters.

A checkpoint is a folder with config.json and model.safetensors: of Hugging Face, or made of a torch
file by `python -m t2i_jax convert`.   B pictures · H W pixels · C channels
"""

import os
import pathlib

import flax.linen as nn

from t2i_jax import errors
from t2i_jax.pretrained import clip_vision, dino, efficientnet, hf, inception, lpips, vit

FAMILIES = {
    model_type: family
    for family in (clip_vision, dino, efficientnet, inception, lpips)
    for model_type in family.MODEL_TYPES
}
CONVERTED = ("inception", "efficientnet_lite0", "lpips")  # names of what `convert` makes
FOLDER = "T2I_JAX_WEIGHTS"  # environment variable: where these lie


def locate(source: str) -> pathlib.Path:
    """The folder of a checkpoint: one of CONVERTED, a local folder, or `hf:org/name[@revision]`.

    Raises:
      DataError: it is not there; says where it was looked for, and what to do.
    """
    if source not in CONVERTED:
        if not source.startswith("hf:") and not pathlib.Path(source).is_dir():
            raise errors.DataError(
                f"no image network {source!r}: no such folder",
                where="the source of an image network",
                fix=f"give a folder, hf:org/name, or {errors.nearest(source, CONVERTED)}",
            )
        return hf.locate(source)
    folder = home() / source
    if not (folder / hf.WEIGHTS).is_file():
        raise errors.DataError(
            f"no weights of {source!r}: looked for {folder / hf.WEIGHTS}",
            where=f"{FOLDER} is {os.environ.get(FOLDER, 'not set')}",
            fix=f"make them: python -m t2i_jax convert {source} (needs torch: see --help)",
        )
    return folder


def home() -> pathlib.Path:
    """Where the folders of CONVERTED lie."""
    return pathlib.Path(os.environ.get(FOLDER, "~/.cache/t2i_jax")).expanduser()


def make(source: str) -> nn.Module:
    """A module `image_BHWC -> Features`, still without weights.

    It takes pictures in [-1, 1] of `module.res` pixels a side, and does its own normalisation.
    """
    config, family = _read(locate(source))
    return family.from_config(config)


def check(source: str, abstract_variables) -> None:
    """Raises DataError unless `load` will find every tensor, and no other."""
    _match(source, abstract_variables)


def load(source: str, abstract_variables):
    """Variables {"params": …} of the module `make(source)`: shaped, typed and placed as given."""
    return {"params": hf.load(_match(source, abstract_variables))}


def _match(source, abstract_variables):
    folder = locate(source)
    config, family = _read(folder)
    return hf.match(folder, abstract_variables["params"], family.names(config))


def _read(folder):
    config = hf.read_json(folder / hf.CONFIG)
    if (folder / vit.PREPROCESSOR).is_file():
        config["preprocessor"] = hf.read_json(folder / vit.PREPROCESSOR)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise errors.ConfigError(
            f"model_type {model_type!r} is no image network",
            where=str(folder / hf.CONFIG),
            fix=f"use a checkpoint of one of {', '.join(sorted(FAMILIES))}",
        )
    return config, FAMILIES[model_type]
