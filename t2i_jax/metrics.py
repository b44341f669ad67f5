"""Where numbers go: metrics.jsonl with one row a step, TensorBoard, a bar or plain lines."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time

import jax
import tensorboardX
import tqdm
from absl import logging

FALLING = ("fid", "fd-", "spatial_", "kid", "kd-", "cmmd", "memorised", "distance")


def falls(name: str) -> bool:
    """Whether less of a metric, "evaluator/metric" or "net/loss", is better."""
    source, _, short = name.partition("/")
    if short.startswith("lpips"):
        return not short.startswith("lpips_diversity")
    return short.startswith(FALLING) or short.endswith("loss") or source.endswith("loss")


class Writer:
    """Writes the metrics of a run. Values of a step are read from the device only at `flush`.

    A row of metrics.jsonl is {"step": n, name: value, …}; step n is the n-th update, from 1. Rows
    beyond `start`, left by a run that was killed after its last checkpoint, are cut, so that every
    step has exactly one row; so are evaluations, in events.jsonl, of steps after `events`. A row of
    times.jsonl is {"step": n, "seconds": …}, all that its steps took since the row before, without
    compiling and evaluating. What a full disk refuses is kept and written later. Only process 0
    writes.
    """

    def __init__(
        self, workdir: pathlib.Path, *, start: int, stop: int, batch_size: int, events: int
    ):
        self._workdir, self._start = workdir, start
        self._first = jax.process_index() == 0
        if self._first:
            for name in ("metrics", "times"):
                _cut(workdir / f"{name}.jsonl", start)
            _cut(workdir / "events.jsonl", events)
            self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start + 1)
        _cut(quarantine(workdir), start)
        self._unwritten: dict[str, list[str]] = {"metrics": [], "events": [], "times": []}
        self._pending: list[tuple[int, dict]] = []
        self._batch_size, self._stop = batch_size, stop
        self._terminal = self._first and bool(sys.stderr) and sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=stop, initial=start, unit="step", disable=not self._terminal, smoothing=0.05
        )
        self._since, self._done = time.perf_counter(), start

    def step(self, step: int, values) -> None:
        """Keeps one step's values, still on the device."""
        self._pending.append((step, values))
        self._bar.update()

    def flush(self) -> list[dict]:
        """Writes and returns all kept rows; the last also goes to TensorBoard and the screen."""
        rows = [
            {"step": step, **{k: v.item() for k, v in sorted(values.items())}}
            for step, values in jax.device_get(self._pending)
        ]
        self._pending = []
        self._append("metrics", rows)
        if rows:
            self._show(rows[-1])
        return rows

    def event(self, step: int, values: dict) -> None:
        """Results that come now and then, such as an evaluation: a row of events.jsonl."""
        self._append("events", [{"step": step, **values}])
        for name, value in values.items():
            if isinstance(value, int | float):
                self._scalar(name, value, step)

    def picture(self, step: int, name: str, image_HWC) -> None:
        """A uint8 picture for TensorBoard."""
        if self._first:
            self._board.add_image(name, image_HWC, step, dataformats="HWC")

    def before(self, count: int) -> list[dict]:
        """The newest rows that earlier starts left, at most `count`."""
        return [row for row, _ in _whole(self._workdir / "metrics.jsonl", self._start)][-count:]

    def _append(self, name: str, rows) -> None:
        """Appends whole lines, or none and keeps them for the next time."""
        lines = self._unwritten[name]
        lines += [json.dumps(row) + "\n" for row in rows]
        if not lines or not self._first:
            lines.clear()
            return
        path = self._workdir / f"{name}.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as f:
                f.write("".join(lines))
            lines.clear()
        except OSError as e:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            logging.warning("%s cannot be written, kept for later: %s", path, e)

    def _scalar(self, name: str, value, step: int) -> None:
        if self._first:
            self._board.add_scalar(name, value, step)

    def pause(self) -> None:
        """Leaves out of the speed what happened since the last flush, such as a compilation."""
        self._since, self._done = time.perf_counter(), self._done_or_pending()

    def _done_or_pending(self):
        return self._pending[-1][0] if self._pending else self._done

    def _show(self, row: dict) -> None:
        now = time.perf_counter()
        steps = row["step"] - self._done
        rate = steps / max(now - self._since, 1e-9)
        if steps > 0:
            self._append("times", [{"step": row["step"], "seconds": now - self._since}])
        self._since, self._done = now, row["step"]
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._scalar(name, value, row["step"])
        losses = {k: v for k, v in row.items() if k.endswith("/loss")}
        text = " ".join(f"{k} {v:.4f}" for k, v in losses.items())
        if steps > 0:
            self._scalar("images_per_second", rate * self._batch_size, row["step"])
            eta = (self._stop - row["step"]) / rate
            text += f" · {rate * self._batch_size:.0f} images/s"
            if not self._terminal:
                text += f" · {int(eta // 60)}:{int(eta % 60):02d} to go"
        if self._terminal:
            self._bar.set_postfix_str(text)
        else:
            logging.info("step %d/%d · %s", row["step"], self._stop, text)

    def close(self) -> None:
        self._bar.close()
        if self._first:
            self._board.close()


def evaluated(workdir: pathlib.Path, step: int) -> bool:
    """Whether events.jsonl tells of a step."""
    return any(row["step"] == step for row, _ in _whole(workdir / "events.jsonl", step))


def quarantine(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process notes its broken examples."""
    number = jax.process_index()
    return workdir / f"quarantine{f'.{number}' if number else ''}.jsonl"


def _whole(path: pathlib.Path, start: int):
    """(row, its line) of a file's rows up to step `start`, without a half-written one."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= start:
            yield row, line + "\n"


def _cut(path: pathlib.Path, start: int) -> None:
    """Drops rows after step `start` and a half-written last line."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line for _, line in _whole(path, start)))
    temporary.replace(path)
