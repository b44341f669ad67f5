"""What happens between steps: pictures of fixed prompts, and evaluators behind the training."""

import collections
import concurrent.futures
import math
import pathlib
import re

import jax
import numpy as np
from absl import logging

from t2i_jax import errors, images
from t2i_jax.run import distributed, metrics


class Hooks:
    """Draws and judges with averaged nets between the steps of a run.

    All processes draw together. Process 0 alone judges, in a thread, while training goes on.

    Args:
      predictor: the run's `pipeline.Predictor`.
      prompts: what is drawn every `config.sample_every` steps into samples/.
    """

    def __init__(self, predictor, workdir, prompts=()):
        self._predictor, self._workdir, self._config = predictor, workdir, predictor.config
        self._prompts = prompts
        self._evaluators = {
            name: predictor.evaluator(name, **options)
            for name, options in self._config.evaluators.items()
        }
        self._check_best()
        self._main = jax.process_index() == 0
        # One thread alone, so that evaluations end in the order of their steps.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "evaluators")
        self._jobs = collections.deque()

    def forget(self, start: int) -> None:
        """Removes the pictures of steps after `start`, as `metrics.Writer` does rows: what a former
        start drew would be taken for this one's.
        """
        folder = self._workdir / "samples"
        for path in folder.glob("step_*.png") if self._main else ():
            number = re.match(r"step_(\d+)[_.]", path.name)
            if number and int(number[1]) > start:
                path.unlink()

    def run(self, n: int, state, frozen, writer, *, resumed: bool = False) -> None:
        """Draws and begins to judge what is due after n steps; `collect` writes the results.

        resumed: an earlier start may have done so: what the workdir's files hold is not done again.
        """
        config, picture = self._config, self._picture(n)
        draw = self._due(n, config.sample_every) and self._prompts
        draw = draw and "sample" in self._predictor.bound
        judge = self._due(n, config.eval_every) and self._evaluators
        if resumed:  # the first process alone is sure to see the files
            drawn, judged = picture.exists(), metrics.evaluated(self._workdir, n)
            draw = draw and not distributed.as_first(drawn)
            judge = judge and not distributed.as_first(judged)
        if not (draw or judge):
            return
        nets = {**averaged(state), **frozen}
        if draw:
            drawn = self._predictor.sample(nets, self._prompts, seed=config.seed)
            if self._main:
                self._show(n, "", drawn, writer, {"prompts": self._prompts})
        if judge:
            # All processes must draw together here. One alone then judges what was drawn (ADR 11).
            finish = {name: run(nets, n) for name, run in self._evaluators.items()}
            if self._main:
                self._jobs.append((n, self._thread.submit(_finished, finish)))
        writer.pause()

    def rates(self, n: int) -> bool:
        """Whether the checkpoint of a step may become the best."""
        return bool(
            self._config.best and self._evaluators and self._due(n, self._config.eval_every)
        )

    def collect(self, writer, checkpoints, *, before: int = 0) -> None:
        """Writes results that are there, waiting for those of steps before the given one."""
        while self._jobs and (self._jobs[0][0] < before or self._jobs[0][1].done()):
            n, job = self._jobs.popleft()
            found = job.result()
            for name in [name for name, value in found.items() if isinstance(value, np.ndarray)]:
                self._show(n, f"_{name.replace('/', '_')}", found.pop(name), writer)
            shown = (f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float))
            logging.info("step %d · %s", n, " ".join(shown))
            if self._config.best:  # first, for what has its event is not evaluated again
                self._rate(n, found, checkpoints)
            writer.event(n, found)

    def _picture(self, n: int, name: str = "") -> pathlib.Path:
        return self._workdir / "samples" / f"step_{n:08d}{name}.png"

    def _show(self, n: int, name: str, drawn, writer, metadata=None) -> None:
        """Writes uint8 images NHWC as one picture into samples/ and among the metrics."""
        path, grid = self._picture(n, name), images.grid(drawn)
        path.parent.mkdir(exist_ok=True)
        images.save(path, grid, metadata)
        writer.picture(n, f"samples{name}", grid)

    def _due(self, n: int, every: int) -> bool:
        return bool(every) and n > 0 and (n % every == 0 or n == self._config.steps)

    def _check_best(self) -> None:
        """ConfigError where an evaluator says what it measures, and config.best is none of that."""
        best = self._config.best.removeprefix("-")
        evaluator, _, metric = best.partition("/")
        known = getattr(self._evaluators.get(evaluator), "names", ())
        texts = [name for name in known if isinstance(name, str)]
        patterns = [name for name in known if not isinstance(name, str)]
        if known and not any(p.fullmatch(metric) for p in patterns):
            found = [f"{evaluator}/{name}" for name in texts]
            errors.check_known("metric", best, found, where="config.best")

    def _rate(self, n: int, found, checkpoints) -> None:
        metric = self._config.best.removeprefix("-")
        # A minus in front says that less is better, also where the metric's name does not tell.
        less = metric != self._config.best or metrics.falls(metric)
        errors.check_known("metric", metric, found, where="config.best")
        if not math.isfinite(found[metric]):
            logging.warning("step %d: %s is %s, which is never the best", n, metric, found[metric])
            return
        best = checkpoints.best()
        better = lambda new, old: new < old if less else new > old
        # Another start may name another metric, and values of two metrics cannot be compared.
        known = best and best["metric"] == metric and math.isfinite(best["value"])
        if not known or better(found[metric], best["value"]):
            checkpoints.set_best(n, metric, found[metric])
            logging.info("step %d is the best so far: %s %.4f", n, metric, found[metric])


def _finished(evaluations) -> dict:
    return {
        f"{name}/{key}": value for name, fn in evaluations.items() for key, value in fn().items()
    }


def averaged(state):
    """The trained nets with averaged parameters where there are any."""
    return {
        name: {**net, "params": state.ema[name]} if name in state.ema else net
        for name, net in state.nets.items()
    }
