"""Whether a run is still well: steps that were not finite, and metrics beyond their limits."""

import collections
import json

import jax
from absl import logging

from t2i_jax import errors, images, step
from t2i_jax.run import distributed, fingerprint, rundir

SKIPS_IN_A_ROW = 10  # non-finite steps that end a run
SKIPS_OF_1000 = 10  # more of the last thousand steps end it, too
BEYOND_IN_A_ROW = 10  # steps beyond a limit of config.watch with which a run has diverged


class Skips:
    """Counts steps dropped as non-finite; `rows` are those before this start."""

    def __init__(self, rows):
        self._window = collections.deque((bool(row["skipped"]) for row in rows), maxlen=1000)
        self.steps = [row["step"] for row in rows if row["skipped"]]

    def over(self, row) -> bool:
        """Counts a row; True if that ends the run."""
        self._window.append(bool(row["skipped"]))
        if row["skipped"]:
            self.steps = [*(s for s in self.steps if s > row["step"] - 1000), row["step"]]
        too_many = sum(self._window) > SKIPS_OF_1000
        # A sound step never ends the run, even where the window is full of skipped ones before it.
        return bool(row["skipped"]) and (row["skipped"] >= SKIPS_IN_A_ROW or too_many)


class Health:
    """Ends a run that is no longer well.

    Args:
      rows: metrics of the steps before this start.
      limits: metric -> the largest value, config.watch.
      examples: step -> the numbers of the records that it read.
      nets: trained net -> shapes of its variables.
    """

    def __init__(self, workdir, rows, limits, examples, nets):
        self._skips, self._watch = Skips(rows), Watch(limits)
        self._workdir, self._examples, self._nets = workdir, examples, nets

    def check(self, rows) -> None:
        """Raises NonFiniteError or DivergedError at the first of the rows that ends the run."""
        for row in rows:
            if self._skips.over(row):
                raise self._faulty(row)
            self._watch.check(row)

    def _faulty(self, row) -> errors.NonFiniteError:
        """The error of a row; nonfinite.json keeps which examples and arrays were not finite."""
        n, records = row["step"], self._examples(row["step"])
        arrays = [path for name in self._nets for path in self._faulty_array(row, name)]
        told = {"step": n, "records": records, "arrays": arrays, "skipped": self._skips.steps[-10:]}
        if jax.process_index() == 0:
            try:
                images.write_whole(self._workdir / "nonfinite.json", json.dumps(told).encode())
            except OSError as e:  # the error itself is worth more than its file
                logging.warning("cannot write %s: %s", e.filename, e.strerror)
        e = errors.NonFiniteError(
            f"{len(self._skips.steps)} of the last thousand steps were not finite, the last in the "
            f"gradient or update of {arrays or 'none, but in the loss'} with records "
            f"{records[:8]}{' …' if len(records) > 8 else ''}",
            where=f"step {n}",
            fix=f"see nonfinite.json; {errors.NonFiniteError.ADVICE}",
        )
        # The first skipped step of those just before. A run that goes back drops the checkpoints
        # from there on.
        e.step = min(s for s in self._skips.steps if s > n - SKIPS_IN_A_ROW)
        return e

    def _faulty_array(self, row, name: str) -> list[str]:
        """The path of a net's first faulty array, if there is one."""
        place = row[f"{name}/{step.FAULTY}"]
        if place < 0:
            return []
        path, _ = jax.tree_util.tree_leaves_with_path(self._nets[name]["params"])[place]
        return [f"{name}/params/{fingerprint.path_of(path)}"]


class Watch:
    """Ends a run whose metrics stay beyond their limits; `limits`: metric -> the largest value."""

    def __init__(self, limits):
        self._limits, self._beyond = dict(limits), dict.fromkeys(limits, 0)

    def check(self, row) -> None:
        """Raises DivergedError at the last of BEYOND_IN_A_ROW rows."""
        for name, limit in self._limits.items():
            # A NaN is not at most the limit, so it counts as beyond.
            self._beyond[name] = 0 if row[name] <= limit else self._beyond[name] + 1
            if self._beyond[name] == BEYOND_IN_A_ROW:
                e = errors.DivergedError(
                    f"{name} is {row[name]:.4g}, for {BEYOND_IN_A_ROW} steps above {limit:g}",
                    where=f"step {row['step']}",
                    fix="lower the learning rate, strengthen the penalties, or let the run go back "
                    "to an earlier checkpoint: config.rollbacks",
                )
                e.step = row["step"] - BEYOND_IN_A_ROW + 1
                raise e


def check_watched(limits, metrics_there) -> None:
    """Raises ConfigError for an unknown metric of config.watch, or a limit that is no number."""
    for name, limit in limits.items():
        errors.check_known("metric", name, metrics_there, where="config.watch")
        # To Python True is an int.
        if not isinstance(limit, int | float) or isinstance(limit, bool):
            raise errors.ConfigError(
                f"the limit is {limit!r}", where=f"config.watch[{name!r}]", fix="give a number"
            )


def goes_back(e: errors.NonFiniteError, workdir, checkpoints, start: int) -> bool:
    """Sets the checkpoints aside that came after the error, so that a run can begin again before.

    It never begins from scratch: where no checkpoint is older, all stay, and the answer is False.

    Args:
      start: the step of the checkpoint that this start began with.
    """
    # Without one sound step since this start, the checkpoint it came from is at fault, too.
    first = e.step if e.step > start + 1 else min(e.step, start)
    older = sum(step < first for step in checkpoints.steps())
    # The answer must be one for all, and each process may see the folder at another moment.
    if not distributed.as_first(older):
        logging.warning("no checkpoint is older than step %d: none is set aside", first)
        return False
    newest = checkpoints.set_aside_from(first, "diverged")
    if jax.process_index() == 0:
        rundir.note_rollback(workdir, {"step": newest, "why": str(e)})
    distributed.barrier("rollback")
    logging.warning("%s; going back to step %d", e, newest)
    return True
