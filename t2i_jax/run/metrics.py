"""Writers of metrics: JSON lines, TensorBoard, and a progress bar or plain lines."""

import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import sys
import time

import jax
import tqdm
from absl import logging

from t2i_jax import errors, images, plugins
from t2i_jax.run import distributed, logs

# tensorboardX imports torch where it is installed. That costs a second and 250 MB, for nothing.
with plugins.hidden("torch"):
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

# Beginnings of the names of metrics of which lower is better.
FALLING = ("fid", "fd-", "spatial_", "kid", "kd-", "cmmd", "memorised", "distance")


def falls(name: str) -> bool:
    """Whether lower is better for a metric. `name` is "evaluator/metric" or "net/loss"."""
    source, _, short = name.partition("/")
    # LPIPS of an image and its partner is an error. Among a caption's images it is variety.
    if short.startswith("lpips"):
        return not short.startswith("lpips_diversity")
    # An evaluator's own name may say that it measures a loss, as `held_out_loss` does.
    return short.startswith(FALLING) or short.endswith("loss") or source.endswith("loss")


class Growing:
    """A file that grows by whole records. Records that a full disk refuses are written later."""

    def __init__(self, path: pathlib.Path):
        self.path, self._unwritten, self._told = path, [], False

    def append(self, records) -> None:
        """Appends records, each of them bytes.

        If the disk refuses them, a warning is logged once and the next call tries again.
        """
        self._unwritten += records
        if not self._unwritten:
            return
        size = None
        try:
            # Python writes its buffer at the end of the `with`: an error may come only there.
            with self.path.open("ab") as f:
                size = f.tell()
                f.write(b"".join(self._unwritten))
        except OSError as e:
            # Part of them may be written. Without the cut, the next try would leave a broken line.
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            if not self._told:
                logging.warning("cannot write %s, tried again later: %s", self.path, e.strerror)
            self._told = True
            return
        self._unwritten.clear()
        self._told = False

    def close(self) -> None:
        """Raises StorageError if records are left that could not be written."""
        self.append([])
        if self._unwritten:
            raise errors.StorageError(
                f"{len(self._unwritten)} records could not be written",
                where=str(self.path),
                fix="make room there; the same command then goes on from the last checkpoint",
            )


class Board(Growing):
    """Events for TensorBoard, written without a queue and without a thread.

    tensorboardX's own writer has a queue of ten events and a thread. A full disk ends the thread,
    and the eleventh event then waits for ever.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        """start: TensorBoard drops events of this step and later ones from earlier starts."""
        # TensorBoard reads files with "tfevents" in their names, in the order of these names.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(folder / name)
        # TensorBoard wants the version of the format as the first record of a file.
        self._events = [_event(file_version="brain.Event:2")]
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.append(_event(step=start, session_log=begin))

    def scalar(self, step: int, name: str, value: float) -> None:
        self._events.append(_event(step=step, summary=summary.scalar(name, value)))

    def picture(self, step: int, name: str, image_HWC) -> None:
        """Adds a uint8 image HWC."""
        image = summary.image(name, image_HWC, dataformats="HWC")
        self._events.append(_event(step=step, summary=image))

    def flush(self) -> None:
        """Writes the events since the last call."""
        events, self._events = self._events, []
        self.append(events)


class Writer:
    """Writes the metrics of a run. Values of a step are read from the device only at `flush`.

    Each row is one JSON object with the number of its step. Step n is the n-th update, from 1.

    - metrics.jsonl: all values of the step.
    - times.jsonl: "seconds" since the row before, without compiling and evaluating, on so many
      "cores".
    - events.jsonl: results of the step's evaluations.
    - quarantine.jsonl: a broken example. Every process has its own such file. Process 0 alone
      writes the others.

    A run that was killed leaves rows of steps after its last checkpoint. The next start removes
    them, so that every step has exactly one row. Rows that a full disk refuses are written later.

    Args:
      start: the steps done so far. Rows of later steps are removed.
      stop: the steps of the whole run.
      batch_size: examples of a step, for the speed on the screen.
    Raises:
      StorageError: a file cannot be written at the start, or has records left at `close`.
    """

    def __init__(self, workdir: pathlib.Path, *, start: int, stop: int, batch_size: int):
        self._workdir, self._start = workdir, start
        self._first = jax.process_index() == 0
        self._files, self._board = {"quarantine": Growing(quarantine(workdir))}, None
        with errors.of_storage(workdir):
            _cut(quarantine(workdir), start)
            if self._first:
                for name in ("metrics", "times", "events"):
                    self._files[name] = Growing(workdir / f"{name}.jsonl")
                    _cut(workdir / f"{name}.jsonl", start)
                (workdir / "tb").mkdir(exist_ok=True)
                self._board = Board(workdir / "tb", start + 1)
        self._pending: list[tuple[int, dict]] = []
        self._batch_size, self._stop = batch_size, stop
        notebook = _in_notebook()
        terminal = bool(sys.stderr) and sys.stderr.isatty()
        self._shows_bar = self._first and (notebook or terminal)
        self.bar = tqdm.tqdm(
            total=stop,
            initial=start,
            unit="step",
            disable=not self._shows_bar,
            smoothing=0.05,
            mininterval=1.0 if notebook else 0.1,  # a notebook stores every update of the bar
        )
        self._since, self._done, self._noted = time.perf_counter(), start, start

    def step(self, step: int, values) -> None:
        """Keeps one step's values, still on the device."""
        # Reading a value would make the host wait for the step, and no step would be in flight.
        self._pending.append((step, values))
        self.bar.update()

    def flush(self) -> list[dict]:
        """Writes and returns all kept rows. The last one also goes to TensorBoard and the screen.

        This waits for the devices.
        """
        # One call for all steps: JAX starts every copy to the host before it waits for the first.
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
        """Writes results that come now and then, such as an evaluation: a row of events.jsonl."""
        self._append("events", [{"step": step, **values}])
        for name, value in values.items():
            # Some results are text, such as the hash of a protocol.
            if isinstance(value, int | float):
                self._scalar(name, value, step)
        self._flush_board()

    def picture(self, step: int, name: str, image_HWC) -> None:
        """Shows a uint8 image HWC in TensorBoard."""
        if self._board:
            self._board.picture(step, name, image_HWC)
            self._flush_board()

    def broken(self, step: int, slot: int, record: int, reason: str) -> None:
        """Notes an example of this process that got weight 0: a row of quarantine.jsonl."""
        row = {"step": step, "slot": slot, "record": record, "reason": reason}
        self._append("quarantine", [row])

    def before(self, count: int) -> list[dict]:
        """The newest rows of metrics.jsonl from earlier starts, at most `count`."""
        return [row for row, _ in _whole(self._workdir / "metrics.jsonl", self._start)][-count:]

    def _append(self, name: str, rows) -> None:
        if name in self._files:
            self._files[name].append(json.dumps(row).encode() + b"\n" for row in rows)

    def _scalar(self, name: str, value, step: int) -> None:
        if self._board:
            self._board.scalar(step, name, value)

    def _flush_board(self) -> None:
        if self._board:
            self._board.flush()

    def pause(self) -> None:
        """Excludes the time since the last flush from the speed, such as a compilation."""
        # Steps that wait for a flush go with their time. Later they would count as taking none.
        self._done = self._pending[-1][0] if self._pending else self._done
        self._since = time.perf_counter()
        self.bar.unpause()

    def _show(self, row: dict) -> None:
        now = time.perf_counter()
        steps = row["step"] - self._done
        rate = steps / max(now - self._since, 1e-9)
        # A flush right after a `pause` has no timed step, and so no speed.
        if steps > 0:
            # Steps before a pause were not timed: they count as much as those behind it.
            seconds = (now - self._since) * (row["step"] - self._noted) / steps
            timed = {"step": row["step"], "seconds": seconds, "cores": distributed.cores()}
            self._append("times", [timed])
            self._noted = row["step"]
        self._since, self._done = now, row["step"]
        # Only the last row of a flush is shown. metrics.jsonl has all of them.
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._scalar(name, value, row["step"])
        losses = {k: v for k, v in row.items() if k.endswith("/loss")}
        text = " ".join(f"{k} {v:.4f}" for k, v in losses.items())
        if steps > 0:
            self._scalar("images_per_second", rate * self._batch_size, row["step"])
            eta = (self._stop - row["step"]) / rate
            text += f" · {rate * self._batch_size:.0f} images/s"
            if self._shows_bar:
                self.bar.set_postfix_str(text)  # the bar itself shows the time to go
            text += f" · {int(eta // 60)}:{int(eta % 60):02d} to go"
        text = f"step {row['step']}/{self._stop} · {text}"
        if self._shows_bar:
            logs.note(text)
        else:
            logging.info("%s", text)
        self._flush_board()

    def close(self) -> None:
        """Raises StorageError if rows are left that could not be written."""
        self.bar.close()
        self._flush_board()
        with contextlib.ExitStack() as files:  # the others are closed, too, if one cannot be
            for file in (*self._files.values(), *([self._board] if self._board else ())):
                files.callback(file.close)


def evaluated(workdir: pathlib.Path, step: int) -> bool:
    """Whether events.jsonl has a row of this step."""
    return any(row["step"] == step for row, _ in _whole(workdir / "events.jsonl", step))


def quarantine(workdir: pathlib.Path) -> pathlib.Path:
    """The file in which this process notes its broken examples."""
    number = jax.process_index()
    return workdir / f"quarantine{f'.{number}' if number else ''}.jsonl"


def _whole(path: pathlib.Path, start: int):
    """Yields (row, its line) of a file's rows up to step `start`.

    Broken rows are left out, such as a last line that a kill has cut.
    """
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            kept = row["step"] <= start
        except (ValueError, TypeError, KeyError):  # also bytes that are not UTF-8
            continue
        if kept:
            yield row, line + b"\n"


def _cut(path: pathlib.Path, start: int) -> None:
    """Removes rows after step `start` and broken ones from the file."""
    kept = b"".join(line for _, line in _whole(path, start))
    if path.exists() and path.read_bytes() != kept:
        images.write_whole(path, kept)


def _in_notebook() -> bool:
    """Whether this process is a kernel of Jupyter, Colab or the like."""
    # A kernel has imported IPython before. In a plain script an import would only cost time.
    ipython = sys.modules.get("IPython")
    # IPython in a terminal has a shell, too, but no kernel.
    return hasattr(ipython and ipython.get_ipython(), "kernel")


def _event(**parts) -> bytes:
    """An event of TensorBoard as a TFRecord: its length, its bytes, and a checksum of each."""
    event = event_pb2.Event(wall_time=time.time(), **parts).SerializeToString()
    size, sums = struct.pack("<Q", len(event)), record_writer.masked_crc32c
    return b"".join((size, struct.pack("<I", sums(size)), event, struct.pack("<I", sums(event))))
