"""Checkpoints: one folder for each step, written in the background and verified on reading.

Orbax writes <workdir>/checkpoints/<updates done>/{params,ema,opt,meta}. This file writes
manifest.json last. The manifest holds the fingerprint of every array and the size of every file.
A folder without a manifest is no checkpoint and is renamed to <step>.unfinished. A damaged
checkpoint is renamed to <step>.corrupt.
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

    A checkpoint has four items, so that a sampler reads only what it needs:

    - `params`: the trained nets with all their collections.
    - `opt`: the optimiser states and counters.
    - `ema`: the averaged parameters.
    - `meta`: plain JSON.

    Args:
      keep: how many finished checkpoints stay, the newest ones. The best one stays as well.
      create: False for readers. They change nothing on disk.
      guard: is called before anything is written. It raises if another process owns the workdir.
    """

    def __init__(self, workdir, *, keep: int = 2, create: bool = True, guard=lambda: None):
        # Orbax refuses relative paths.
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        if not create and not self._folder.is_dir():
            raise errors.ConfigError(
                "the run has no checkpoints", where=str(self._folder), fix="train it first"
            )
        self._keep, self._guard, self._failures = keep, guard, 0
        self._passed = []  # over by `restore_newest`, for starts from them have died
        self._orbax = self._stage = None
        if create:
            # One process alone tidies up: several would rename the same folders.
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
            self._writing = None

    def steps(self) -> list[int]:
        """Steps that are whole on disk, ascending."""
        # Links are never followed: what they lead to may belong to another run.
        folders = (p for p in self._folder.iterdir() if p.name.isdecimal() and not p.is_symlink())
        return sorted(int(p.name) for p in folders if (p / MANIFEST).is_file())

    def best(self) -> dict | None:
        """{"step", "metric", "value"} of the last `set_best`; None if that checkpoint is gone."""
        try:
            best = _read_json(self._folder / BEST)
            exists = (self._folder / str(best["step"]) / MANIFEST).is_file()
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return best if exists else None

    def set_best(self, step: int, metric: str, value: float) -> None:
        """Protects the checkpoint of this step from removal, in place of the best one so far."""
        best = {"step": step, "metric": metric, "value": value}
        images.write_whole(self._folder / BEST, json.dumps(best).encode())

    def choose(self, step: int | str | None = None) -> int:
        """The number of the newest checkpoint, of the one of `step`, or of the best one.

        Args:
          step: None for the newest, a number, or "best".
        Raises:
          ConfigError: there is no such checkpoint.
        """
        if step == "best":
            if best := self.best():
                return best["step"]
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
        """Copies the state off the devices and returns; a thread then writes the files.

        A failed save is logged and counted, here or in `poll`. Older checkpoints stay.

        Args:
          meta: plain JSON, which `Checkpoints.meta` returns again.
        Raises:
          NonFiniteError: the state holds a value that is not finite. Nothing is written.
          StorageError: three saves in a row have failed.
        """
        step = int(state.step)
        if step in self.steps():  # a stop may ask for a save of a step that was saved just now
            return
        # One save at a time: a second one would overwrite the staged copies of the first.
        self.wait()
        self._guard()
        items = _items(state)
        # The sums come from the devices before Orbax sees the state. Thus they also cover the copy
        # to the host and the write (ADR 8). The same pass finds values that are not finite.
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
            self._orbax = self._orbax or _orbax()
            # `force`: a folder of this name without a manifest is what a failed save has left.
            self._orbax.save(self._folder / str(step), args=ocp.args.Composite(**args), force=True)
        except Exception as e:
            self._failed(step, e)
            return
        self._writing = self._thread.submit(self._finish, step, prints), step

    def poll(self) -> None:
        """Takes the result of a save that ended in the background; raises as `save` does."""
        if self._writing and self._writing[0].done():
            # Forgotten first: `_failed` may raise, and the next call must not meet this save again.
            (writing, step), self._writing = self._writing, None
            try:
                writing.result()
                self._failures = 0
            except errors.OwnerError:  # no fault of the disk: another process has the workdir
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
            with contextlib.suppress(Exception):  # the failure has been logged
                self._orbax.close()
        if self._failures:
            raise self._unwritable("the last save failed")

    def meta(self, step: int) -> dict:
        """The `meta` of `save`, with "step". Raises as `restore` does."""
        self._verify(step)
        return self._read(step, meta=ocp.args.JsonRestore())["meta"]

    def mark(self, step: int) -> str:
        """A hash that tells the state of a step from others. Raises as `restore` does."""
        return _hash_of(self._verify(step))

    def restore(self, step: int, target: State) -> State:
        """The state of a step, with the shapes, types and shardings of `target`.

        Raises:
          Damaged: its files or arrays are not those that were saved.
          DataError: its arrays are not those of `target`.
          ConfigError: there is no such checkpoint, or it has an unknown format.
        """
        items = self._restore(step, _items(target))
        # No array holds the step. The name of the folder tells it, which the manifest confirms.
        number = jax.device_put(jnp.int32(step), target.step.sharding)
        opt, skipped = items["opt"]["opt"], items["opt"]["skipped"]
        return State(number, items["params"], opt, items["ema"], skipped)

    def restore_newest(self, target: State) -> tuple[State, int] | None:
        """The newest sound checkpoint's state and step; None if there never was one.

        A damaged checkpoint is renamed and passed over, with a warning. So is one from which three
        starts died in their first step, see `begins`; it keeps its name until a step from an older
        one has succeeded.

        Raises:
          DataError: there are checkpoints, and none can be used.
        """
        attempts, reasons, advice = self._attempts(), [], ""
        for step in reversed(self.steps()):
            if attempts.get(str(step), 0) >= ATTEMPTS:
                reasons.append(f"{step}: {ATTEMPTS} starts from it died in their first step")
                advice = f"remove {ATTEMPTS_FILE} there if something else killed them, "
                logging.warning("checkpoint %s; to use it, %s", reasons[-1], advice[:-2])
                self._passed.append(step)
                continue
            try:
                return self.restore(step, target), step
            except Damaged as e:
                reasons.append(f"{step}: {e.what}")
                name = self._rename(step, "corrupt")
                logging.warning("checkpoint %d is damaged, set aside as %s: %s", step, name, e)
        # Checkpoints that an earlier start renamed count, too. Otherwise the second start after
        # damage would find an empty folder and begin at step 0 without a word.
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
        """Counts one attempt at the first step from this checkpoint; `progressed` forgets it.

        A process that dies earlier, as it reads or compiles, has not used the state. Its death
        tells nothing about the checkpoint and is not counted.
        """
        distributed.barrier(f"{step}.begins")  # every process has read the count that changes now
        if step in self.steps():
            attempts = self._attempts()
            self._write_attempts({**attempts, str(step): attempts.get(str(step), 0) + 1})

    def progressed(self) -> None:
        """Forgets the attempts of `begins`, after a step has succeeded."""
        # The run goes on from an older checkpoint and will save these steps anew.
        while self._passed:
            self._rename(self._passed.pop(), "died")
        self._write_attempts({})

    def set_all_aside(self) -> None:
        """Renames every checkpoint, so that the run begins again."""
        self.set_aside_from(0, "old")
        if jax.process_index() == 0:
            # Under their old names these would keep `restore_newest` from beginning again.
            for path in [p for kind in SET_ASIDE for p in self._folder.glob(f"*.{kind}")]:
                path.rename(_free_name(path.with_suffix(""), "old"))
        self._write_attempts({})

    def set_aside_from(self, step: int, suffix: str) -> int | None:
        """Renames the checkpoints of this step and later ones; returns the newest that is left."""
        # What comes anew under these numbers is not what was rated.
        if jax.process_index() == 0 and (best := self.best()) and best["step"] >= step:
            (self._folder / BEST).unlink()
        for newer in [n for n in self.steps() if n >= step]:
            self._rename(newer, suffix)
        return max(self.steps(), default=None)

    def restore_nets(self, step: int, target, ema):
        """Net -> variables for sampling. Raises as `restore` does.

        Args:
          target: net -> variables, with shapes, types and shardings.
          ema: the nets whose averaged parameters take the place of the last ones.
        """
        restored = self._restore(step, _items_of_nets(target, ema))
        nets = restored.get("params") or {name: {} for name in target}
        return {
            name: {**nets[name], **({"params": restored["ema"][name]} if name in ema else {})}
            for name in target
        }

    def check_nets(self, step: int, target, ema) -> None:
        """Raises as `restore_nets` where what is saved does not have the shapes of `target`."""
        self._compared(step, _items_of_nets(target, ema))

    def _compared(self, step: int, items) -> dict:
        """The manifest of a step, compared with its files and with the target `items`."""
        manifest = self._verify(step)
        wanted = {
            fingerprint.path_of(path): [str(leaf.dtype), list(leaf.shape)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(items)
        }
        # Only the nets that `items` names are compared: a sampler may want one net of several.
        asked = {(item, net) for item, nets in items.items() for net in nets}
        saved = {
            name: spec[:2]
            for name, spec in manifest["arrays"].items()
            if tuple(name.split("/")[:2]) in asked
        }
        if wanted != saved:
            names = [n for n in {**wanted, **saved} if wanted.get(n) != saved.get(n)]
            lines = [f"{n}: saved {saved.get(n)}, now {wanted.get(n)}" for n in names[:10]]
            raise errors.DataError(
                f"{len(names)} arrays of the checkpoint are not the run's: " + "; ".join(lines),
                where=str(self._folder / str(step)),
                fix="use the config and the version of t2i_jax (env.txt) it was saved with, or a "
                "new --workdir with --config.init_from=<this run>",
            )
        return manifest

    def _restore(self, step: int, items):
        """Items as they were saved, with the shapes and shardings of the target `items`."""
        manifest = self._compared(step, items)
        arrays = manifest["arrays"]
        # Partial, as a sampler may ask for some of the nets in an item.
        args = {
            name: ocp.args.PyTreeRestore(
                item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            for name, item in items.items()
            if item
        }
        # An item without arrays was never written, see `save`.
        restored = {name: {} for name in items} | dict(self._read(step, **args).items())
        prints, _ = fingerprint.of(restored, format=manifest["format"])
        wrong = [name for name in prints if prints[name] != arrays[name]]
        if wrong:
            raise Damaged(
                f"{len(wrong)} arrays are not those that were saved: {wrong[:5]}",
                where=str(self._folder / str(step)),
                fix="remove this folder to use an older checkpoint",
            )
        return restored

    def _verify(self, step: int) -> dict:
        """The manifest of a step. Raises unless its files have the sizes and hashes it names."""
        folder = self._folder / str(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            reason = _difference(folder, step, manifest)
        except FileNotFoundError:
            raise self._gone(step) from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            reason = f"{MANIFEST} cannot be read: {errors.reason(e)}"
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
            # `_verify` has found the files' metadata unchanged, so this is a fault of a program.
            # A checkpoint that is sound must not be set aside for it.
            raise
        except Exception as e:
            if not (folder / MANIFEST).exists():  # the training removed it while we read
                raise self._gone(step) from e
            raise Damaged(
                f"cannot be read: {errors.reason(e)}",
                where=str(folder),
                fix="remove this folder to use an older checkpoint",
            ) from e

    def _staged(self, items):
        """The arrays that Orbax writes: on the CPU copies, in the memory of the last save's copies.

        On the CPU Orbax would refer to the arrays of the state themselves. The next step donates
        these, and XLA then makes a slow copy of every one of them.
        """
        if jax.default_backend() != "cpu":  # Orbax itself copies from other devices to the host
            return items
        self._stage = _copy_into(self._stage, items)
        return self._stage

    def _finish(self, step: int, prints) -> None:
        """Runs in the thread: waits for Orbax, writes the manifest, removes old checkpoints."""
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        folder = self._folder / str(step)
        manifest = {"format": FORMAT, "step": step, "arrays": prints, "files": _files(folder)}
        text = json.dumps({**manifest, "sha256": _hash_of(manifest)})
        failpoints.hit("manifest.before")
        # Writing may have taken minutes, in which another process may have taken over the workdir.
        self._guard()
        images.write_whole(folder / MANIFEST, text.encode())
        # Older checkpoints go only now that the new one counts.
        best = self.best() or {}
        for old in self.steps()[: -self._keep]:
            if old != best.get("step"):
                self._remove(self._folder / str(old))

    def _failed(self, step: int, e: Exception) -> None:
        self._failures += 1
        # A checkpointer whose thread has failed may raise the same error again. So it is thrown
        # away, and the next save makes a new one.
        if self._orbax:
            with contextlib.suppress(Exception):
                self._orbax.close()
        self._orbax = None
        free = shutil.disk_usage(self._folder).free / 1e6
        logging.warning(
            "the save of step %d failed (%d of %d in a row): %s; %.0f MB are free there",
            *(step, self._failures, FAILURES, errors.reason(e), free),
        )
        with contextlib.suppress(OSError):
            if jax.process_index() == 0:
                if not (self._folder / str(step) / MANIFEST).is_file():
                    # On a full disk the half-written folder takes the room of the next save.
                    shutil.rmtree(self._folder / str(step), ignore_errors=True)
                self._sweep()
        if self._failures >= FAILURES:
            raise self._unwritable(errors.reason(e)) from e

    def _unwritable(self, why: str):
        steps = self.steps()
        return errors.StorageError(
            f"checkpoints cannot be written: {why}",
            where=str(self._folder),
            fix="make room there; the same command then goes on "
            + (f"from step {steps[-1]}" if steps else "from the start"),
        )

    def _sweep(self) -> None:
        """Removes what unfinished saves left. Whole folders without a manifest are renamed."""
        for path in list(self._folder.iterdir()):
            link = path.is_symlink()  # never followed, but in the way of a save of that step
            stray = path.name.isdecimal() and (link or not (path / MANIFEST).is_file())
            # Such a folder may be a checkpoint of another version, so its files are not removed.
            if stray and path.is_dir() and not link:
                path.rename(_free_name(path, "unfinished"))
            elif ".orbax-checkpoint-tmp" in path.name or stray or path.suffix == ".removed":
                self._remove(path)

    def _remove(self, path: pathlib.Path) -> None:
        """Removes a checkpoint, a file or a link."""
        if path.is_symlink() or path.is_file():
            path.unlink()
            return
        # One rename hides the whole folder from readers. They never meet one with half its files.
        hidden = path.with_name(path.name + ".removed") if path.suffix != ".removed" else path
        if hidden != path:
            path.rename(hidden)
        shutil.rmtree(hidden)

    def _rename(self, step: int, suffix: str) -> str:
        path = self._folder / str(step)
        name = _free_name(path, suffix)
        if jax.process_index() == 0:
            path.rename(name)
        # The others list the folder next. Before the rename they would choose this step again.
        distributed.barrier(f"{step}.{suffix}")
        return name.name

    def _attempts(self) -> dict:
        try:
            attempts = _read_json(self._folder / ATTEMPTS_FILE)
            return {k: int(v) for k, v in attempts.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write_attempts(self, attempts: dict) -> None:
        path = self._folder / ATTEMPTS_FILE
        if jax.process_index() == 0 and (attempts or path.exists()):
            images.write_whole(path, json.dumps(attempts).encode())


def _read_json(path: pathlib.Path):
    if not path.is_file():  # opening a named pipe would block
        raise FileNotFoundError(path)
    return json.loads(path.read_bytes())


def _free_name(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """A path in the same folder that does not exist: <name>.suffix, else <name>-1.suffix, …."""
    numbered = (f"{path.name}{f'-{n}' if n else ''}.{suffix}" for n in itertools.count())
    return next(p for p in map(path.with_name, numbered) if not p.exists())


def _items(state: State) -> dict:
    return {
        "params": state.nets,
        "ema": state.ema,
        "opt": {"opt": state.opt, "skipped": state.skipped},
    }


def _items_of_nets(target, ema) -> dict:
    """What `Checkpoints.restore_nets` reads."""
    averaged = {name: target[name]["params"] for name in ema}
    # The last parameters are as large as the averaged ones. They are read only where a net
    # needs them: one without an average, or one with other collections.
    only_averaged = all(name in ema and set(target[name]) == {"params"} for name in target)
    return {"ema": averaged} | ({} if only_averaged else {"params": target})


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy_into(old, new):
    """Copies of `new`, in the memory of `old`: a tree of the same shapes, or None.

    No operation reads `old`, so `jit` would drop it; `keep_unused` keeps it for the donation.
    """
    return jax.tree.map(jnp.copy, new)


class _Mapped(ocp.type_handlers.ArrayHandler):
    """Reads arrays from files that are mapped into memory, which saves TensorStore one copy."""

    async def deserialize(self, infos, args=None):
        # Orbax offers no option for this, so every info gets a context of our own.
        # The first two numbers are Orbax's own; the mode is what differs.
        context = tensorstore.Context(
            {
                "cache_pool#ocdbt": {"total_bytes_limit": 10**8},
                "file_io_concurrency": {"limit": 128},
                "file_io_mode": {"mode": "memmap"},
            }
        )
        infos = [copy.copy(info) for info in infos]  # the caller's keep their context
        for info in infos:
            info.ts_context = context
        return await super().deserialize(infos, args)


def _orbax() -> ocp.AsyncCheckpointer:
    # No compression: weights hardly shrink, and compressing would take cores from the training.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _Mapped()))
    handlers = {
        name: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        for name in ITEMS
    }
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), **handlers)
    )


def _files(folder: pathlib.Path) -> dict:
    """Path below the folder -> [size, SHA-256 or None], of all files but the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            size = path.stat().st_size
            # Damage in a large file reaches an array, where the fingerprint finds it (ADR 8).
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if size < SMALL else None
            files[path.relative_to(folder).as_posix()] = [size, digest]
    return files


def _difference(folder: pathlib.Path, step: int, manifest: dict) -> str | None:
    """The first difference between folder and manifest, or None. Pops the manifest's "sha256"."""
    if manifest.pop("sha256") != _hash_of(manifest):
        return f"{MANIFEST} was changed"
    if manifest["step"] != step:
        return f"it is of step {manifest['step']}"
    present, written = _files(folder), manifest["files"]
    differ = [name for name in {**present, **written} if present.get(name) != written.get(name)]
    return f"files differ: {differ[:5]}" if differ else None


def _hash_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
