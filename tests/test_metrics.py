"""Where numbers and lines go: nothing is lost on a full disk, nothing waits, nothing is drowned."""

import contextlib
import json
import logging as std_logging
import struct
import sys
import types

import numpy as np
import pytest
import tensorboardX
from absl import logging
from tensorboardX.proto import event_pb2

from t2i_jax import errors
from t2i_jax.run import logs, metrics, rundir


def refused(path):
    """A path on which every write fails for want of room."""
    path.symlink_to("/dev/full")
    return path


def test_what_a_full_disk_refuses_is_told_once_and_written_later(tmp_path, caplog):
    path = refused(tmp_path / "rows")
    file = metrics.Growing(path)
    for number in range(30):
        file.append([b"%d\n" % number])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert str(path) in told[0]
    assert "No space left" in told[0]
    with pytest.raises(errors.StorageError, match="30 records") as caught:
        file.close()
    assert caught.value.exit_code == 74
    assert str(path) in str(caught.value)
    path.unlink()
    file.append([b"30\n"])
    file.close()
    assert path.read_text().split() == [str(n) for n in range(31)]


def checksum(data: bytes) -> int:
    """CRC-32C, bit by bit, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
    """What TensorBoard reads of a folder with one file, without the times."""
    (path,) = folder.glob("*tfevents*")
    data, found = path.read_bytes(), []
    while data:
        (size,), (sum_of_size,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        assert checksum(data[:8]) == sum_of_size
        body, data = data[12 : 12 + size], data[12 + size :]
        assert struct.unpack("<I", data[:4])[0] == checksum(body)
        data = data[4:]
        event = event_pb2.Event.FromString(body)
        assert event.wall_time > 1e9
        event.wall_time = 0
        found.append(event)
    return found


def test_events_are_those_of_tensorboardx(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (tmp_path / "ours").mkdir()
    board = metrics.Board(tmp_path / "ours", 7)
    board.scalar(7, "model/loss", 0.25)
    board.picture(8, "samples", picture)
    board.flush()
    with tensorboardX.SummaryWriter(str(tmp_path / "theirs"), purge_step=7) as writer:
        writer.add_scalar("model/loss", 0.25, 7)
        writer.add_image("samples", picture, 8, dataformats="HWC")
    ours, theirs = events(tmp_path / "ours"), events(tmp_path / "theirs")
    assert ours[0].file_version == theirs[0].file_version
    values = lambda found: [e for e in found if e.HasField("summary")]
    starts = lambda found: [e.step for e in found if e.HasField("session_log")]
    assert values(ours) == values(theirs)
    assert starts(ours) == starts(theirs) == [7]


def test_rows_that_are_broken_are_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": n}).encode() for n in range(1, 6)]
    rows[1] = rows[1].replace(b"s", b"\xff")
    path.write_bytes(b"\n".join((*rows[:3], b"7", b"[]", b"", *rows[3:])) + b'\n{"step": 6, "lo')
    writer = metrics.Writer(tmp_path, start=4, stop=9, batch_size=2)
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]


@pytest.fixture
def notebook(monkeypatch):
    """As in a kernel of Jupyter."""
    shell = types.SimpleNamespace(kernel=object())
    fake = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)


def test_a_notebook_sees_a_bar_with_loss_speed_and_time_to_go(notebook, tmp_path, capsys):
    with logs.told():
        logs.open(tmp_path / "log.txt")
        writer = metrics.Writer(tmp_path, start=0, stop=4, batch_size=2)
        for n in range(1, 5):
            writer.step(n, {"model/loss": np.float32(n / 8)})
            writer.flush()
        writer.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    for part in ("100%", "4/4", "<", "model/loss 0.5000", "images/s"):
        assert part in shown, shown
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 4
    assert "step 1/4 · model/loss 0.1250 · " in lines[0]


def test_without_a_screen_that_can_move_there_are_plain_lines(tmp_path, caplog, capsys):
    with logs.told():
        writer = metrics.Writer(tmp_path, start=0, stop=2, batch_size=2)
        writer.step(1, {"model/loss": np.float32(1)})
        writer.flush()
        writer.close()
    assert capsys.readouterr().err == ""
    assert "step 1/2 · model/loss 1.0000" in caplog.text
    assert "to go" in caplog.text


def say(path: str, level: int, text: str) -> None:
    """As code in that file would."""
    logger = logging.get_absl_logger()
    if logger.isEnabledFor(level):
        logger.handle(logger.makeRecord("absl", level, path, 1, text, (), None))


def test_only_our_lines_are_in_the_log_and_no_remarks_of_libraries_on_the_screen(tmp_path, caplog):
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # as in a notebook
    theirs, ours = "/site-packages/orbax/checkpoint/a.py", rundir.__file__
    try:
        with logs.told():
            logs.open(tmp_path / "log.txt")
            say(theirs, std_logging.INFO, "a remark")
            say(theirs, std_logging.WARNING, "a warning")
            say(ours, std_logging.INFO, "a line")
        say(ours, std_logging.INFO, "too late")
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(verbosity)
    assert [record.getMessage() for record in caplog.records] == ["a warning", "a line"]
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("a line")


def test_a_log_that_cannot_grow_is_told_once(tmp_path, caplog):
    with logs.told():
        logs.open(refused(tmp_path / "log.txt"))
        for number in range(5):
            say(rundir.__file__, std_logging.INFO, f"line {number}")
    told = [r.getMessage() for r in caplog.records if r.levelno == std_logging.WARNING]
    assert len(told) == 1
    assert "log.txt" in told[0]


def test_times_before_a_pause_are_taken_for_as_long_as_those_behind_it(tmp_path, monkeypatch):
    """Rows of times.jsonl cover all steps, though the clock begins anew after each evaluation."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with contextlib.closing(metrics.Writer(tmp_path, start=0, stop=8, batch_size=1)) as writer:
        for step in range(1, 9):
            now[0] += 2.0
            writer.step(step, {"model/loss": np.float32(1)})
            if step in (3, 6):
                now[0] += 100.0  # an evaluation
                writer.pause()
            if step in (4, 8):
                writer.flush()
    rows = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [(row["step"], row["seconds"]) for row in rows] == [(4, 8.0), (8, 8.0)]
