"""Hostile files, full disks, odd paths: left out and counted, or one error that names the path."""

import errno
import json
import os
import pathlib
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from t2i_jax import errors, images, pipeline, weights
from t2i_jax.commands import cli, prompts
from t2i_jax.data import pictures
from t2i_jax.pretrained import folder as folders
from t2i_jax.run import owner

BUILTIN = weights.BUILTIN / "shapes"
DEEP = "[" * 100_000
SHAPES = [  # of config.json: (key, value) in place of the model's, or a whole text
    *(("load", v) for v in (5, "minilm", [], None, {"text": 5}, {"text": ["minilm", 3]})),
    *(("model", v) for v in ([], "net", {"backbone": 3}, {"wdth": 3}, {"width": "x"})),
    *(("objective", v) for v in (None, 5, [], "flwo", "../flow")),
    *(("loss", v) for v in (3, {"predicton": "v"})),
    *(("optim", 3), ("ema", 3), ("res", "x"), ("res", -1), ("res", None)),
    *(("text_length", 1.5), ("text", 3), ("lora", 3), ("evaluators", 3), ("seed", True)),
    *("[]", "3", "null", "{}", '{"objective": "flow"}', "\udcff", DEEP, ""),
]


def within(seconds: float, fn):
    """What `fn` returns or raises; fails where it never ends."""
    found = []

    def run():
        try:
            found.append(fn())
        except BaseException as e:
            found.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"not ended after {seconds} s"
    return found[0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hostile(folder: pathlib.Path) -> int:
    """Fills a folder with files that are no whole picture.   -> how many count as broken"""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    (folder / "bomb.png").write_bytes(bomb + chunk(b"IEND", b""))
    (folder / "half.png").write_bytes(bomb[:20])
    (folder / "odd.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 3))
    (folder / "empty.png").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    return 4


def picture(path, text: str | None = None) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(images.METADATA_KEY, text)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path, "png", pnginfo=info)


def test_hostile_pictures_are_counted_and_the_others_judged(tmp_path):
    broken = hostile(tmp_path)
    picture(tmp_path / "good.png", json.dumps({"prompt": "a red circle"}))
    picture(tmp_path / "deep.png", DEEP[:30_000])
    picture(os.fsencode(tmp_path) + b"/name\xff.png")

    def judge():
        found = pictures.Pictures(tmp_path)
        batches = [len(batch) for batch, _ in found.batches(4)]
        return found, batches, found.fingerprint

    found, batches, print_ = within(60, judge)
    assert sum(batches) == 3
    assert len(found.broken) == broken
    assert found.captions["good.png"] == "a red circle"
    assert len(print_) == 64


@pytest.mark.parametrize("name", ["bomb.png", "half.png", "odd.png", "empty.png", "pipe.png"])
def test_a_hostile_picture_to_draw_again_is_named(tmp_path, name):
    hostile(tmp_path)
    e = within(60, lambda: prompts.from_picture(tmp_path / name))
    assert isinstance(e, errors.DataError)
    assert name in e.where


def test_a_class_that_is_no_name_is_no_pipeline(tmp_path):
    path = shutil.copytree(folders.TINY, tmp_path / "tiny") / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": ["x"]}))
    with pytest.raises(errors.ConfigError, match=r"unknown pipeline.*model_index\.json"):
        folders.open(str(path.parent))


def test_a_pipe_is_no_file_of_json(tmp_path):
    path = shutil.copytree(folders.TINY, tmp_path / "tiny")
    (path / "scheduler" / "scheduler_config.json").unlink()
    os.mkfifo(path / "scheduler" / "scheduler_config.json")
    e = within(5, lambda: folders.open(str(path)))
    assert isinstance(e, errors.DataError)
    assert "not a regular file (at" in str(e)
    assert "scheduler_config.json" in e.where


def test_deep_json_in_prompts_and_metadata_is_named(tmp_path):
    default = prompts.Request(prompt="", seed=0)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"a":' + DEEP + "\n")
    with pytest.raises(errors.ConfigError, match=r"prompts.jsonl:2"):
        prompts.read_file(tmp_path / "prompts.jsonl", default)
    picture(tmp_path / "deep.png", DEEP[:30_000])
    with pytest.raises(errors.DataError, match=r"no settings of ours.*deep.png"):
        prompts.from_picture(tmp_path / "deep.png")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: repr(s)[:40])
def test_a_senseless_config_json_is_named(tmp_path, shape):
    if isinstance(shape, tuple):
        values = json.loads((BUILTIN / "config.json").read_text())
        shape = json.dumps(values | dict([shape]))
    (tmp_path / "config.json").write_text(shape, errors="surrogateescape")
    (tmp_path / weights.EXPORTED).symlink_to(BUILTIN / weights.EXPORTED)
    with pytest.raises(errors.Error) as caught:
        pipeline.Pipeline.load(str(tmp_path))
    assert caught.value.exit_code in (65, 78)


@pytest.mark.parametrize("name", ["config.json", weights.EXPORTED])
def test_a_pipe_in_an_exported_model_is_refused(tmp_path, name):
    for other in {"config.json", weights.EXPORTED} - {name}:
        (tmp_path / other).symlink_to(BUILTIN / other)
    os.mkfifo(tmp_path / name)
    e = within(60, lambda: pipeline.Pipeline.load(str(tmp_path)))
    assert isinstance(e, errors.DataError)
    assert "not a regular file" in e.what
    assert name in e.where


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a.png"), "out/a.png"),
        (PermissionError(errno.EPERM, "Operation not permitted", "out"), "out"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "a" * 300),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "no/captions.txt"), "no/"),
        (OSError(errno.EIO, "Input/output error"), "written"),
    ],
)
def test_what_a_disk_refuses_ends_any_command_with_74_and_the_path(
    monkeypatch, capsys, error, where
):
    def main():
        raise error

    monkeypatch.setattr(cli, "_parse", lambda *_: ["x"])
    monkeypatch.setattr(cli.logging, "use_absl_handler", lambda: None)
    monkeypatch.setattr(cli.threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(cli.distributed, "leave", lambda code: codes.append(code))
    codes = []
    cli.run(main, argv=["x"])
    assert codes == [74]
    told = capsys.readouterr().err
    assert error.strerror in told
    assert where in told
    assert "Fix: " in told


def test_a_file_is_written_whole_or_the_error_names_it(tmp_path):
    with pytest.raises(OSError, match=r"/a{300}'"):
        images.write_whole(tmp_path / ("a" * 300), b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        images.write_whole(tmp_path / "folder", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_lock_that_cannot_be_read_is_not_taken_for_removed(tmp_path):
    ours, lock = owner.Owner(tmp_path, beat=60), tmp_path / "lock"
    ours.acquire()
    held = lock.read_bytes()
    lock.unlink()
    lock.symlink_to(lock)  # the disk's answer is an error, whoever asks
    with pytest.raises(errors.StorageError, match="symbolic links"):
        ours.check()
    with pytest.raises(OSError, match="symbolic links"):
        owner.Owner(tmp_path).acquire()
    lock.unlink()
    with pytest.raises(errors.OwnerError, match="was removed"):
        ours.check()
    lock.write_bytes(held)
    ours.check()
    ours.release()
    assert not lock.exists()
