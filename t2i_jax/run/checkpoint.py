"""Checkpoints: a folder for each step, written behind the training, verified before they are used.

<workdir>/checkpoints/<updates done>/{params,ema,opt,meta} are Orbax's; manifest.json, written last,
holds the fingerprint of every array and the size of every file. A folder without a manifest is no
checkpoint and is renamed to <step>.unfinished. A damaged one is renamed to <step>.corrupt.
"""

import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from t2i_jax import errors, images
from t2i_jax.run import distributed, failpoints, fingerprint
from t2i_jax.step import State

FORMAT = 3
READ = (2, FORMAT)  # formats that are read, each checked by the sums it was written with
MANIFEST, BEST, ATTEMPTS_FILE = "manifest.json", "best.json", "attempts.json"
SMALL = 2**20  # bytes; the manifest holds smaller files' hashes, too
FAILURES = 3  # saves in a row that may fail
ATTEMPTS = 3  # starts from one checkpoint that may die in their first step
SET_ASIDE = ("corrupt", "diverged")  # a run that has only these does not begin again by itself
ITEMS = ("params", "ema", "opt")


class Damaged(errors.DataError):
    """A checkpoint whose bytes are not those that were saved."""


class Checkpoints:
    """The checkpoints of one workdir.

    `params` holds the trained nets with all their collections, `opt` the optimiser states and
    counters, `ema` the averaged parameters and `meta` plain JSON, so that a sampler reads only what
    it needs.

    Args:
      keep: finished checkpoints that stay beside the best, at least 2 of them verified.
      create: False for readers, which change nothing.
      guard: called before anything is written; raises if the workdir is another's by now.
    """

    def __init__(self, workdir, *, keep: int = 2, create: bool = True, guard=lambda: None):
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        if not create and not self._folder.is_dir():
            raise errors.ConfigError(
                "the run has no checkpoints", where=str(self._folder), fix="train it first"
            )
        self._keep, self._guard, self._failures = keep, guard, 0
        self._orbax = self._stage = None
        if create:
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
            self._writing = None

    def steps(self) -> list[int]:
        """Steps that are whole on disk, ascending."""
        found = (p for p in self._folder.iterdir() if p.name.isdecimal() and not p.is_symlink())
        return sorted(int(p.name) for p in found if (p / MANIFEST).is_file())

    def best(self) -> dict | None:
        """{"step", "metric", "value"} as `set_best` was told last; None if it is not there."""
        try:
            found = _read_json(self._folder / BEST)
            there = (self._folder / str(found["step"]) / MANIFEST).is_file()
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if there else None

    def set_best(self, step: int, metric: str, value: float) -> None:
        """From now on that step's checkpoint stays, and the one named before does not."""
        found = {"step": step, "metric": metric, "value": value}
        images.write_whole(self._folder / BEST, json.dumps(found).encode())

    def choose(self, step: int | str | None = None) -> int:
        """The newest step, or the given one if it is there, or "best"."""
        if step == "best":
            if found := self.best():
                return found["step"]
            raise errors.ConfigError(
                "no checkpoint is the best",
                where=str(self._folder),
                fix="train with --config.best=<metric>, or choose a step by its number",
            )
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise errors.ConfigError(
                f"no checkpoint of step {step}" if steps else "the run has no finished checkpoint",
                where=str(self._folder),
                fix=f"choose --step from {steps}" if steps else "train until the first save",
            )
        return steps[-1] if step is None else step

    def save(self, state: State, meta: dict) -> None:
        """Copies the state off the devices and returns; files are written behind the training.

        A save that fails is told and counted here or in `poll`; older checkpoints stay.

        Raises:
          NonFiniteError: the state holds a value that is not finite; nothing is written.
          StorageError: three saves in a row have failed.
        """
        step = int(state.step)
        if step in self.steps():
            return
        self.wait()
        self._guard()
        items = _items(state)
        prints, bad = fingerprint.of(items, format=FORMAT)
        if bad:
            e = errors.NonFiniteError(
                f"the state holds values that are not finite: {bad[:10]}",
                where=f"step {step}",
                fix=errors.NonFiniteError.ADVICE,
            )
            e.step = step
            raise e
        items = self._staged(items)
        args = {k: ocp.args.PyTreeSave(v) for k, v in items.items() if v}  # Orbax wants no {}
        args["meta"] = ocp.args.JsonSave({**meta, "step": step})
        try:
            self._checkpointer().save(
                self._folder / str(step), args=ocp.args.Composite(**args), force=True
            )
        except Exception as e:
            self._failed(step, e)
            return
        self._writing = self._thread.submit(self._finish, step, prints), step

    def poll(self) -> None:
        """Learns of a save that ended in the background; raises as `save` does."""
        if self._writing and self._writing[0].done():
            (writing, step), self._writing = self._writing, None
            try:
                writing.result()
                self._failures = 0
            except errors.OwnerError:
                raise
            except Exception as e:
                self._failed(step, e)

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises as `save` does."""
        if self._writing:
            concurrent.futures.wait([self._writing[0]])
            self.poll()

    def close(self) -> None:
        """Waits. Raises StorageError if the last save failed."""
        self.wait()
        self._thread.shutdown()
        if self._orbax:
            with contextlib.suppress(Exception):  # what failed has been told
                self._orbax.close()
        if self._failures:
            raise self._unwritable("the last save failed")

    def meta(self, step: int) -> dict:
        """What `save` was given, with "step"."""
        self._verify(step)
        return self._read(step, meta=ocp.args.JsonRestore())["meta"]

    def restore(self, step: int, target: State) -> State:
        """The state of a step, with the shapes, types and shardings of `target`.

        Raises:
          Damaged: its files or arrays are not those that were saved.
          DataError: its arrays are not those of `target`.
        """
        found = self._restore(step, _items(target))
        number = jax.device_put(jnp.int32(step), target.step.sharding)
        opt, skipped = found["opt"]["opt"], found["opt"]["skipped"]
        return State(number, found["params"], opt, found["ema"], skipped)

    def restore_newest(self, target: State) -> tuple[State, int] | None:
        """The newest sound checkpoint's state and step; None if there never was one.

        Damaged checkpoints are renamed and passed over, with a warning. One is passed over, too,
        where three starts from it died in their first step, see `begins`.

        Raises:
          DataError: there are checkpoints, and none can be used.
        """
        attempts, reasons, advice = self._attempts(), [], ""
        for step in reversed(self.steps()):
            if attempts.get(str(step), 0) >= ATTEMPTS:
                reasons.append(f"{step}: {ATTEMPTS} starts from it died in their first step")
                advice = f"remove {ATTEMPTS_FILE} there if something else killed them, "
                logging.warning("checkpoint %s; to use it, %s", reasons[-1], advice[:-2])
                continue
            try:
                return self.restore(step, target), step
            except errors.Error as e:
                if not isinstance(e, Damaged):
                    raise
                reasons.append(f"{step}: {e.what}")
                self._set_aside(step, e)
        aside = [p for kind in SET_ASIDE for p in self._folder.glob(f"*.{kind}")]
        reasons += [f"{p.name}: set aside" for p in sorted(aside)]
        if reasons:
            raise errors.DataError(
                "no checkpoint can be used: " + "; ".join(reasons),
                where=str(self._folder),
                fix=f"{advice}bring back a copy, or give --restart_from_scratch to begin again",
            )
        return None

    def begins(self, step: int) -> None:
        """The first step from a checkpoint comes now; a death in it counts against the checkpoint.

        What dies before, while it reads or compiles, has not used the state and says nothing.
        """
        distributed.barrier(f"{step}.begins")  # all have read the number that changes now
        if step in self.steps():
            attempts = self._attempts()
            self._write_attempts({**attempts, str(step): attempts.get(str(step), 0) + 1})

    def progressed(self) -> None:
        """A step was made: earlier deaths in the first step no longer count."""
        self._write_attempts({})

    def set_all_aside(self) -> None:
        """Renames every checkpoint, so that the run begins again."""
        self.set_aside_from(0, "old")
        if jax.process_index() == 0:
            for path in [p for kind in SET_ASIDE for p in self._folder.glob(f"*.{kind}")]:
                path.rename(_free_name(path.with_suffix(""), "old"))
        self._write_attempts({})

    def set_aside_from(self, step: int, suffix: str) -> int | None:
        """Renames the checkpoints of this step and later ones; returns the newest that is left."""
        for newer in [n for n in self.steps() if n >= step]:
            self._rename(newer, suffix)
        return max(self.steps(), default=None)

    def restore_nets(self, step: int, target, ema):
        """Net -> variables for sampling: averaged parameters for the nets named by `ema`."""
        averaged = {name: target[name]["params"] for name in ema}
        only_averaged = all(name in ema and set(target[name]) == {"params"} for name in target)
        items = {"ema": averaged} | ({} if only_averaged else {"params": target})
        found = self._restore(step, items)
        nets = found.get("params") or {name: {} for name in target}
        return {
            name: {**nets[name], **({"params": found["ema"][name]} if name in ema else {})}
            for name in target
        }

    def _restore(self, step: int, items):
        """Items as they were saved, into the shapes and shardings of the targets given."""
        manifest = self._verify(step)
        arrays = manifest["arrays"]
        wanted = {
            fingerprint.path_of(path): [str(leaf.dtype), list(leaf.shape)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(items)
        }
        asked = {(item, part) for item, parts in items.items() for part in parts}
        known = {
            name: spec[:2]
            for name, spec in arrays.items()
            if tuple(name.split("/")[:2]) in asked  # of the nets asked for
        }
        if wanted != known:
            names = [n for n in {**wanted, **known} if wanted.get(n) != known.get(n)]
            lines = [f"{n}: saved {known.get(n)}, now {wanted.get(n)}" for n in names[:10]]
            raise errors.DataError(
                f"{len(names)} arrays of the checkpoint are not the run's: " + "; ".join(lines),
                where=str(self._folder / str(step)),
                fix="use the config and the version of t2i_jax (env.txt) it was saved with, or a "
                "new --workdir with --config.init_from=<this run>",
            )
        args = {
            name: ocp.args.PyTreeRestore(
                item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            for name, item in items.items()
            if item
        }
        found = {name: {} for name in items} | dict(self._read(step, **args).items())
        prints, _ = fingerprint.of(found, format=manifest["format"])
        wrong = [name for name in prints if prints[name] != arrays[name]]
        if wrong:
            raise Damaged(
                f"{len(wrong)} arrays are not those that were saved: {wrong[:5]}",
                where=str(self._folder / str(step)),
                fix="remove this folder to use an older checkpoint",
            )
        return found

    def _verify(self, step: int) -> dict:
        """The manifest of a step, after all its files were found as it says."""
        folder = self._folder / str(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            reason = _difference(folder, step, manifest)
        except FileNotFoundError:
            raise self._gone(step) from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            reason = f"{MANIFEST} cannot be read: {_first_line(e)}"
        if reason:
            raise Damaged(
                f"damaged: {reason}", where=str(folder), fix="use another --step, or train on"
            )
        if manifest["format"] not in READ:
            raise errors.ConfigError(
                f"checkpoint format {manifest['format']}, this version reads {READ}",
                where=str(folder),
                fix="use the version of t2i_jax that env.txt names, see CHANGELOG.md",
            )
        return manifest

    def _gone(self, step: int):
        return errors.ConfigError(
            f"checkpoint {step} is gone",
            where=str(self._folder),
            fix=f"choose --step from {self.steps()}",
        )

    def _read(self, step: int, **args):
        folder = self._folder / str(step)
        try:
            with contextlib.closing(_orbax()) as reader:
                return reader.restore(folder, args=ocp.args.Composite(**args))
        except (TypeError, AttributeError, ImportError):
            raise  # a fault of programs, as the files' metadata were found as they were written
        except Exception as e:
            if not (folder / MANIFEST).exists():
                raise self._gone(step) from e
            raise Damaged(
                f"cannot be read: {_first_line(e)}",
                where=str(folder),
                fix="remove this folder to use an older checkpoint",
            ) from e

    def _staged(self, items):
        """What Orbax is to write, when the state is in the host's memory: copies of it.

        Orbax would look at the arrays themselves, and XLA then copies them all, slowly, when the
        next step donates them. The copies take the memory of those of the save before.
        """
        if jax.default_backend() != "cpu":
            return items
        self._stage = _copy_into(self._stage, items)
        return self._stage

    def _checkpointer(self):
        self._orbax = self._orbax or _orbax()
        return self._orbax

    def _finish(self, step: int, prints) -> None:
        """Behind the training: waits for Orbax, writes the manifest, removes the oldest."""
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        folder = self._folder / str(step)
        manifest = {"format": FORMAT, "step": step, "arrays": prints, "files": _files(folder)}
        text = json.dumps({**manifest, "sha256": _hash_of(manifest)})
        failpoints.hit("manifest.before")
        self._guard()
        images.write_whole(folder / MANIFEST, text.encode())
        best = self.best() or {}
        for old in self.steps()[: -self._keep]:
            if old != best.get("step"):
                self._remove(self._folder / str(old))

    def _failed(self, step: int, e: Exception) -> None:
        self._failures += 1
        if self._orbax:
            with contextlib.suppress(Exception):  # the same again
                self._orbax.close()
        self._orbax = None
        free = shutil.disk_usage(self._folder).free / 1e6
        logging.warning(
            "the save of step %d failed (%d of %d in a row): %s; %.0f MB are free there",
            *(step, self._failures, FAILURES, _first_line(e), free),
        )
        with contextlib.suppress(OSError):
            if jax.process_index() == 0:
                if not (self._folder / str(step) / MANIFEST).is_file():
                    shutil.rmtree(self._folder / str(step), ignore_errors=True)  # it takes room
                self._sweep()
        if self._failures >= FAILURES:
            raise self._unwritable(_first_line(e)) from e

    def _unwritable(self, why: str):
        steps = self.steps()
        return errors.StorageError(
            f"checkpoints cannot be written: {why}",
            where=str(self._folder),
            fix="make room there; the same command then goes on "
            + (f"from step {steps[-1]}" if steps else "from the start"),
        )

    def _sweep(self) -> None:
        """Removes what unfinished saves left, but whole folders without a manifest."""
        for path in list(self._folder.iterdir()):
            link = path.is_symlink()  # never followed, and in the way of a save of that step
            stray = path.name.isdecimal() and (link or not (path / MANIFEST).is_file())
            if stray and path.is_dir() and not link:  # another format's, perhaps
                path.rename(_free_name(path, "unfinished"))
            elif ".orbax-checkpoint-tmp" in path.name or stray or path.suffix == ".removed":
                self._remove(path)

    def _remove(self, path: pathlib.Path) -> None:
        """First out of the readers' sight, by one rename."""
        if path.is_symlink() or path.is_file():
            path.unlink()
            return
        hidden = path.with_name(path.name + ".removed") if path.suffix != ".removed" else path
        if hidden != path:
            path.rename(hidden)
        shutil.rmtree(hidden)

    def _set_aside(self, step: int, e: Exception) -> None:
        name = self._rename(step, "corrupt")
        logging.warning("checkpoint %d is damaged and set aside as %s: %s", step, name, e)

    def _rename(self, step: int, suffix: str) -> str:
        path = self._folder / str(step)
        name = _free_name(path, suffix)
        if jax.process_index() == 0:
            path.rename(name)
        distributed.barrier(f"{step}.{suffix}")
        return name.name

    def _attempts(self) -> dict:
        try:
            found = _read_json(self._folder / ATTEMPTS_FILE)
            return {k: int(v) for k, v in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write_attempts(self, attempts: dict) -> None:
        path = self._folder / ATTEMPTS_FILE
        if jax.process_index() == 0 and (attempts or path.exists()):
            images.write_whole(path, json.dumps(attempts).encode())


def _read_json(path: pathlib.Path):
    if not path.is_file():  # a pipe would block
        raise FileNotFoundError(path)
    return json.loads(path.read_bytes())


def _free_name(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """<name>.suffix beside it, or <name>-1.suffix, …: one that is not taken."""
    numbered = (f"{path.name}{f'-{n}' if n else ''}.{suffix}" for n in itertools.count())
    return next(p for p in map(path.with_name, numbered) if not p.exists())


def _items(state: State) -> dict:
    return {
        "params": state.nets,
        "ema": state.ema,
        "opt": {"opt": state.opt, "skipped": state.skipped},
    }


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy_into(old, new):
    """Copies of `new`, in the memory of `old` (a tree like it, or None)."""
    return jax.tree.map(jnp.copy, new)


class _Mapped(ocp.type_handlers.ArrayHandler):
    """Arrays read from files that are mapped into memory: TensorStore then copies once less."""

    async def deserialize(self, infos, args=None):
        context = tensorstore.Context(
            {
                "cache_pool#ocdbt": {"total_bytes_limit": 10**8},
                "file_io_concurrency": {"limit": 128},
                "file_io_mode": {"mode": "memmap"},
            }
        )
        infos = [copy.copy(info) for info in infos]
        for info in infos:
            info.ts_context = context
        return await super().deserialize(infos, args)


def _orbax() -> ocp.AsyncCheckpointer:
    # Without compression: weights hardly shrink, and the time would be the training's.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _Mapped()))
    handlers = {
        name: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        for name in ITEMS
    }
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), **handlers)
    )


def _files(folder: pathlib.Path) -> dict:
    """Path below the folder -> [size, SHA-256 if small], of all files but the manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            size = path.stat().st_size
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if size < SMALL else None
            found[path.relative_to(folder).as_posix()] = [size, digest]
    return found


def _difference(folder: pathlib.Path, step: int, manifest: dict) -> str | None:
    """What is not as the manifest says; removes its own hash from it."""
    if manifest.pop("sha256") != _hash_of(manifest):
        return f"{MANIFEST} was changed"
    if manifest["step"] != step:
        return f"it is of step {manifest['step']}"
    found, written = _files(folder), manifest["files"]
    differ = [name for name in {**found, **written} if found.get(name) != written.get(name)]
    return f"files differ: {differ[:5]}" if differ else None


def _hash_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]
