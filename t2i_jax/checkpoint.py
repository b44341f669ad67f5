"""Checkpoints: one folder per step, split into items, written in the background by Orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp

from t2i_jax import errors
from t2i_jax.step import State

FORMAT = 1


class Checkpoints:
    """The checkpoints of one workdir: <workdir>/checkpoints/<updates done>/{params,ema,opt,meta}.

    `params` holds the trained nets with all their collections, `opt` the optimiser states and
    counters, `ema` the averaged parameters and `meta` plain JSON, so that a sampler reads only what
    it needs.
    """

    def __init__(self, workdir, *, keep: int = 2, create: bool = True):
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        if not create and not self._folder.is_dir():
            raise errors.ConfigError(
                "the run has no checkpoints", where=str(self._folder), fix="train it first"
            )
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=("params", "ema", "opt", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=create, enable_async_checkpointing=True
            ),
        )

    def steps(self) -> list[int]:
        """Steps that are whole on disk, ascending."""
        return sorted(self._manager.all_steps())

    def choose(self, step: int | None = None) -> int:
        """The newest step, or the given one if it is there."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise errors.ConfigError(
                f"no checkpoint of step {step}" if steps else "the run has no finished checkpoint",
                where=str(self._folder),
                fix=f"choose --step from {steps}" if steps else "train until the first save",
            )
        return steps[-1] if step is None else step

    def save(self, state: State, meta: dict) -> None:
        """Copies the state off the devices and returns; files are written behind the training."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.nets),
            "opt": ocp.args.StandardSave({"opt": state.opt, "skipped": state.skipped}),
            "meta": ocp.args.JsonSave({**meta, "format": FORMAT, "step": step}),
        }
        if state.ema:  # Orbax refuses an empty item
            items["ema"] = ocp.args.StandardSave(state.ema)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except OSError as e:
            raise self._unwritable(e) from e

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        try:
            self._manager.wait_until_finished()
        except OSError as e:
            raise self._unwritable(e) from e

    def meta(self, step: int) -> dict:
        """What `save` was given, with "step" and "format"; DataError for another format."""
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        if meta["format"] != FORMAT:
            raise errors.DataError(
                f"checkpoint format {meta['format']}, this version reads {FORMAT}",
                where=str(self._folder / str(step)),
                fix="use the version of t2i_jax that env.txt names, see CHANGELOG.md",
            )
        return meta

    def restore(self, step: int, target: State) -> State:
        """The state of a step, with the shapes, types and shardings of `target`."""
        items = {
            "params": ocp.args.StandardRestore(target.nets),
            "opt": ocp.args.StandardRestore({"opt": target.opt, "skipped": target.skipped}),
        }
        if target.ema:
            items["ema"] = ocp.args.StandardRestore(target.ema)
        found = {"ema": {}, **self._restore(step, **items)}
        number = jax.device_put(jax.numpy.int32(step), target.step.sharding)
        return State(
            number, found["params"], found["opt"]["opt"], found["ema"], found["opt"]["skipped"]
        )

    def restore_nets(self, step: int, target, ema):
        """Net -> variables for sampling: averaged parameters for the nets named by `ema`."""
        averaged = {name: target[name]["params"] for name in ema}
        only_averaged = all(name in ema and set(target[name]) == {"params"} for name in target)
        items = {"ema": ocp.args.StandardRestore(averaged)} if averaged else {}
        if not only_averaged:
            items["params"] = ocp.args.StandardRestore(target)
        found = self._restore(step, **items)
        nets = dict(found.get("params") or {name: {} for name in target})
        return {
            name: {**nets[name], **({"params": found["ema"][name]} if name in ema else {})}
            for name in target
        }

    def _unwritable(self, e: OSError):
        return errors.StorageError(
            f"a checkpoint cannot be written: {e.strerror or _first_line(e)}",
            where=str(self._folder),
            fix="make room there; then the same command goes on from the last whole checkpoint",
        )

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:
            raise errors.DataError(
                f"checkpoint cannot be read: {_first_line(e)}",
                where=str(self._folder / str(step)),
                fix="use the config it was saved with, or move this step's folder away to go on "
                "from an older one",
            ) from e

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
