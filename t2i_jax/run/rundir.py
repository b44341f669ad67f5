"""The folder of a run: the files that describe it, and whether a start may go on in it."""

import contextlib
import json
import pathlib
import platform

import jax

import t2i_jax
from t2i_jax import errors, images, weights
from t2i_jax.pretrained import hf
from t2i_jax.run import checkpoint, distributed, logs
from t2i_jax.text import words

# Keys of the config that another start may change. They leave the path of the training as it is, or
# a user changes them on purpose in the middle of a run. Any other difference is refused.
FREE_TO_CHANGE = (
    *("steps", "log_every", "save_every", "sample_every", "eval_every", "evaluators", "keep"),
    *("best", "prompts", "sample", "mesh", "strategy", "init_from", "bad_budget", "cache"),
    *("watch", "rollbacks", "save_minutes", "minutes", "attention"),
)
ROLLBACKS = "rollbacks.jsonl"
WHERE_DATA_LIES = (
    "data.path",
    "data.data_dir",
    "data.prior",
)  # free: the fingerprint tells the data apart
FREE_OF_OPTIM = ("learning_rate", "clip", "warmup")  # config.optim.<net>.<these>, too
FREE_OF_MODEL = ("remat",)  # config.model.<net>.<these>: another program, the same numbers


def describe(path: pathlib.Path, config, source, inputs) -> None:
    """Writes config.json, env.txt and words.txt, and opens log.txt.

    Args:
      source: the training data. words.txt lists the words of its captions.
      inputs: of the family. Without one that reads captions, there is no words.txt.
    """
    reads = any("caption" in one.reads for one in inputs)
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "jax": jax.__version__,
        "t2i_jax": t2i_jax.__version__,
        "processes": jax.process_count(),
        "devices": [str(d) for d in jax.devices()],
        "cores": distributed.cores(),
    }
    with errors.of_storage(path):
        images.write_whole(path / "config.json", weights.to_json(config).encode())
        images.write_whole(path / "env.txt", json.dumps(environment, indent=1).encode())
        # A run refuses other data, so its words stay: one pass over the captions is enough.
        wanted = reads and not (path / words.FILE).exists()
        if wanted and (trained := known_words(config, source)):
            words.write(path, trained)
        logs.open(path / "log.txt")


def meta(config, source, frozen) -> dict:
    """The meta of a checkpoint: what it says about its run, as plain JSON.

    source: the training data.   frozen: net -> digest of the nets no loss trains.
    """
    return {
        "data": source.fingerprint,
        "frozen": frozen,
        "config": json.loads(weights.to_json(config)),  # should config.json be lost
        "t2i_jax": t2i_jax.__version__,
        "jax": jax.__version__,
    }


def check_frozen(path: pathlib.Path, nets) -> None:
    """Raises ConfigError where the run there was trained with other frozen nets."""
    if (path / "checkpoints").is_dir():
        saved = _newest_meta(checkpoint.Checkpoints(path, create=False))
        weights.check_frozen(nets, saved.get("frozen"))


def known_words(config, source) -> set[str] | None:
    """The words of the training captions and of every model of ours that the run starts from.

    None where one of these models has no list of words.
    """
    origins = [s for s in (config.init_from, *weights.sources(config).values()) if s]
    folders = [weights.locate(str(hf.split(s)[0])) for s in origins if weights.is_ours(s)]
    lists = [words.collect(source), *map(words.read, folders)]
    return None if None in lists else set().union(*lists)


def rollbacks(path: pathlib.Path) -> int:
    """How often a run diverged and went back: the lines of rollbacks.jsonl."""
    file = path / ROLLBACKS
    # A damaged line counts, too: forgetting one would give the run a rollback more.
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def note_rollback(path: pathlib.Path, row: dict) -> None:
    """Appends a row to rollbacks.jsonl. The file is written whole, so a kill cannot halve it."""
    file = path / ROLLBACKS
    before = file.read_bytes().splitlines() if file.exists() else []
    lines = (*before, json.dumps(row).encode())
    images.write_whole(file, b"".join(line + b"\n" for line in lines))


def forget_rollbacks(path: pathlib.Path) -> None:
    """Removes rollbacks.jsonl, for a run that begins again."""
    if jax.process_index() == 0:
        (path / ROLLBACKS).unlink(missing_ok=True)


def check_same_run(path: pathlib.Path, config, data: str) -> list[str]:
    """Checks that a start with this config and these data may go on in the folder.

    Args:
      data: the data source's fingerprint.
    Returns:
      The differences from the run's config that are allowed, as text.
    Raises:
      ConfigError: the folder holds an exported model, a run with another config or other data, or
        a run that has done more steps already. Nothing is written.
    """
    if (path / weights.EXPORTED).exists():
        raise errors.ConfigError(
            "an exported model lies there", where=str(path), fix="use a new --workdir"
        )
    if not (path / "checkpoints").is_dir():
        return []
    checkpoints = checkpoint.Checkpoints(path, create=False)
    saved = _newest_meta(checkpoints)
    # Nothing tells what the run was. Damaged checkpoints are left to `restore_newest`.
    if not (path / "config.json").exists() and not saved:
        return []
    before, now = flat(_config_before(path, saved)), flat(config)
    # Any key counts, also one that only the older or the newer version of this package has.
    differences, allowed = [], []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            text = f"{key}: {before.get(key)!r} → {now.get(key)!r}"
            (allowed if _free(key) else differences).append(text)
    if differences:
        raise errors.ConfigError(
            "the workdir holds a run with another config: " + "; ".join(differences[:10]),
            where=str(path),
            fix="use a new --workdir (with --config.init_from to start from this run)",
        )
    if (done := max(checkpoints.steps(), default=0)) > config.steps:
        raise errors.ConfigError(
            f"the run has done {done} steps, the config asks for {config.steps}",
            where="config.steps",
            fix=f"ask for {done} or more, or use a new --workdir",
        )
    if saved and saved["data"] != data:
        raise errors.ConfigError(
            f"the run was trained on other data ({saved['data'][:12]}…, now {data[:12]}…)",
            where=str(path),
            fix="restore the data, or use a new --workdir with --config.init_from=<this run>",
        )
    return allowed


def _config_before(path: pathlib.Path, saved: dict):
    """The config of the run in the folder: from config.json, else from a checkpoint's meta."""
    if (path / "config.json").exists():
        return weights.read_config(path)
    if "config" not in saved:
        raise errors.ConfigError(
            "checkpoints lie there without the config.json of their run",
            where=str(path),
            fix="bring it back from a copy, or use a new --workdir",
        )
    return weights.config_of(saved["config"])


def config_before(path: pathlib.Path):
    """The config of the run in the folder, or None if there is none."""
    if (path / "checkpoints").is_dir():
        saved = _newest_meta(checkpoint.Checkpoints(path, create=False))
        if saved or (path / "config.json").exists():
            return _config_before(path, saved)
    return weights.read_config(path) if (path / "config.json").exists() else None


def _newest_meta(checkpoints) -> dict:
    """The meta of the newest sound checkpoint; {} if there is none."""
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(checkpoint.Damaged):
            return checkpoints.meta(step)
    return {}


def _free(key: str) -> bool:
    """Whether another start may change this key, such as "optim.model.clip"."""
    first, last = key.split(".")[0], key.split(".")[-1]
    if first in ("optim", "model"):
        return last in (FREE_OF_OPTIM if first == "optim" else FREE_OF_MODEL)
    return first in FREE_TO_CHANGE or key in WHERE_DATA_LIES


def flat(config) -> dict:
    """A config as one flat dict of plain values: {"loss.prediction": "x", …}."""
    values = {}

    def visit(prefix, value):
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        else:
            values[prefix] = value

    # Through JSON, as a config that was read from config.json went: tuples become lists.
    visit("", json.loads(weights.to_json(config)))
    return values
