"""Where numbers go: metrics.jsonl with one row a step, TensorBoard, a bar or plain lines."""

import json
import math
import pathlib
import sys
import time

import jax
import tensorboardX
import tqdm
from absl import logging


class Writer:
    """Writes the metrics of a run. Values of a step are read from the device only at `flush`.

    A row of metrics.jsonl is {"step": n, name: value, …}; step n is the n-th update, from 1. Rows
    beyond `start`, left by a run that was killed after its last checkpoint, are cut, so that every
    step has exactly one row.
    """

    def __init__(self, workdir: pathlib.Path, *, start: int, stop: int, batch_size: int):
        self._path = workdir / "metrics.jsonl"
        for name in ("metrics", "events", "quarantine"):
            _cut(workdir / f"{name}.jsonl", start)
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start + 1)
        self._pending: list[tuple[int, dict]] = []
        self._batch_size, self._stop = batch_size, stop
        self._terminal = sys.stderr.isatty()
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
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if rows:
            self._show(rows[-1])
        return rows

    def event(self, step: int, values: dict) -> None:
        """Results that come now and then, such as an evaluation: a row of events.jsonl."""
        with self._path.with_name("events.jsonl").open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
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
        self._since, self._done = now, row["step"]
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, row["step"])
        losses = {k: v for k, v in row.items() if k.endswith("/loss")}
        text = " ".join(f"{k} {v:.4f}" for k, v in losses.items())
        if steps > 0:
            self._board.add_scalar("images_per_second", rate * self._batch_size, row["step"])
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
        self._file.close()
        self._board.close()


def _cut(path: pathlib.Path, start: int) -> None:
    """Drops rows after step `start` and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= start:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
