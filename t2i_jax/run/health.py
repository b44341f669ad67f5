"""Whether a run is still well: steps that were not finite, and metrics beyond their limits."""

import collections

from t2i_jax import errors

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
        return bool(row["skipped"]) and (row["skipped"] >= SKIPS_IN_A_ROW or too_many)


class Watch:
    """Ends a run whose metrics stay beyond their limits; `limits`: metric -> the largest value."""

    def __init__(self, limits):
        self._limits, self._beyond = dict(limits), dict.fromkeys(limits, 0)

    def check(self, row) -> None:
        """Raises DivergedError at the last of BEYOND_IN_A_ROW rows."""
        for name, limit in self._limits.items():
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
        if name not in metrics_there:
            raise errors.ConfigError(
                f"no metric is called {name!r}",
                where="config.watch",
                fix=errors.nearest(name, metrics_there),
            )
        if not isinstance(limit, int | float) or isinstance(limit, bool):
            raise errors.ConfigError(
                f"the limit is {limit!r}", where=f"config.watch[{name!r}]", fix="give a number"
            )
