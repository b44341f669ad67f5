"""Sources: folders of pictures, TFDS without TensorFlow, OpenMoji."""

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from t2i_jax import errors
from t2i_jax.data import folder, loader, transforms

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def png(colour, size=(6, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """red.png, sub/green.png, sub/deep/blue.PNG, without captions."""
    for name in ("red.png", "sub/green.png", "sub/deep/blue.PNG"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(png(COLOURS[path.stem]))
    return tmp_path / "pictures"


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(name, text):
    return {"file_name": name, "text": text}


def seen(source):
    return [
        (tuple(e["image"][0, 0].tolist()), e["caption"])
        for e in map(source.__getitem__, range(len(source)))
    ]


WANTED = [(COLOURS[c], f"all {c}") for c in ("red", "blue", "green")]  # in the order of names


def as_jsonl(root):
    rows = [
        row(n, f"all {n[-9:].split('/')[-1][:-4]}")
        for n in ("red.png", "sub/green.png", "./sub/deep/blue.PNG")
    ]
    write_jsonl(root / "metadata.jsonl", *rows)


def as_csv(root):
    with open(root / "metadata.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows([("text", "file_name", "more"), ("all red", "red.png", 1)])
    with open(root / "sub" / "metadata.csv", "w", newline="") as f:
        rows = [("file_name", "text"), ("deep/blue.PNG", "all blue"), ("green.png", "all green")]
        csv.writer(f).writerows(rows)


def as_text(root):
    for path in root.rglob("*.[pP][nN][gG]"):
        path.with_suffix(".txt").write_text(f"all {path.stem}\n", encoding="utf-8-sig")


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_text])
def test_a_folder_reads_alike_in_all_three_forms(pictures, write):
    write(pictures)
    assert seen(folder.make(str(pictures), res=8)) == WANTED


def test_metadata_comes_before_text_files_and_jsonl_before_csv(pictures):
    as_text(pictures)
    write_jsonl(pictures / "metadata.jsonl", row("red.png", "jsonl"), row("red.png", "second"))
    (pictures / "metadata.csv").write_text("file_name,text\nred.png,csv\n")
    captions = [caption for _, caption in seen(folder.make(pictures))]
    assert captions == ["jsonl", "second", "all blue", "all green"]


def test_what_is_left_out_is_named(pictures, caplog):
    write_jsonl(pictures / "metadata.jsonl", row("red.png", ""), row("gone.png", "gone"))
    with caplog.at_level("WARNING"):
        source = folder.make(pictures)
    assert seen(source) == [(COLOURS["red"], "")]
    assert (
        "2 pictures have no caption and are left out: sub/deep/blue.PNG, sub/green.png"
        in caplog.text
    )
    assert "1 rows of metadata name pictures that are not there: gone.png" in caplog.text
    assert "1 captions are empty" in caplog.text


def test_broken_examples_name_their_file(pictures):
    as_text(pictures)
    write_jsonl(pictures / "metadata.jsonl", row("late.png", "late"), row("red.png", ["a", "list"]))
    (pictures / "late.png").write_bytes(png("red"))
    (pictures / "sub" / "green.png").write_bytes(b"<html>")
    source = folder.make(pictures)
    (pictures / "late.png").unlink()
    reasons = []
    for i in (0, 1, 3):
        with pytest.raises(transforms.BadExample) as caught:
            source[i]
        reasons.append(str(caught.value))
    assert reasons[0] == "missing file: late.png"
    assert reasons[1] == "caption is no text: list for red.png"
    assert reasons[2].startswith("unreadable as PNG, JPEG or WebP: ")
    assert reasons[2].endswith(" in sub/green.png")
    assert source[2]["caption"] == "all blue"


def test_padding_keeps_the_whole_picture(pictures):
    as_text(pictures)
    assert folder.make(pictures)[0]["image"].shape == (4, 6, 3)
    image_HWC = folder.make(pictures, pad=True)[0]["image"]
    assert image_HWC.shape == (6, 6, 3)
    assert image_HWC[0, 0].tolist() == [255, 255, 255]


def test_the_fingerprint_follows_names_sizes_and_captions(pictures, tmp_path):
    as_text(pictures)
    prints = [folder.make(pictures).fingerprint]
    moved = pictures.rename(tmp_path / "moved")
    assert folder.make(moved).fingerprint == prints[0]
    (moved / "red.txt").write_text("all rad")
    prints.append(folder.make(moved).fingerprint)
    (moved / "red.png").write_bytes(png("red", (60, 60)))
    prints.append(folder.make(moved).fingerprint)
    (moved / "red.png").rename(moved / "rot.png")
    (moved / "red.txt").rename(moved / "rot.txt")
    prints.append(folder.make(moved).fingerprint)
    assert len(set(prints)) == 4


def test_train_and_test_share_no_picture(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(png("red"))
    write_jsonl(
        tmp_path / "metadata.jsonl", *[row(f"{i // 2}.png", str(i // 2)) for i in range(120)]
    )
    parts = {
        s: {c for _, c in seen(folder.make(tmp_path, split=s, holdout=0.3))} for s in folder.SPLITS
    }
    assert parts["train"] | parts["test"] == {str(i) for i in range(60)}
    assert not parts["train"] & parts["test"]
    assert 8 < len(parts["test"]) < 30
    assert len(folder.make(tmp_path)) == 120
    with pytest.raises(errors.DataError, match="no examples in split 'test'"):
        folder.make(tmp_path, split="test")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "sub/../../secret.png"])
def test_metadata_cannot_leave_the_folder(pictures, name):
    (pictures.parent / "secret.png").write_bytes(png("red"))
    write_jsonl(pictures / "metadata.jsonl", row("red.png", "red"), row(name, "secret"))
    with pytest.raises(errors.DataError, match=r"leads out of the folder .*metadata.jsonl line 2"):
        folder.make(pictures)


def test_links_cannot_leave_the_folder(pictures):
    as_text(pictures)
    os.symlink(pictures / "sub", pictures / "again")  # inside: its pictures are met once
    os.symlink("red.png", pictures / "same.png")
    assert len(folder.make(pictures)) == 3
    (pictures.parent / "other").mkdir()
    for target in ("other", "nowhere"):
        os.symlink(pictures.parent / target, pictures / "out")
        with pytest.raises(errors.DataError, match="'out' leads out of the folder"):
            folder.make(pictures)
        (pictures / "out").unlink()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "red.png", "text": "red"}\n{', "near line 1: JSON"),
        ("metadata.jsonl", '{"file_name": "red.png", "caption": "red"}', "KeyError 'text'"),
        ("metadata.jsonl", '["red.png", "red"]', "near line 1: TypeError"),
        ("metadata.jsonl", "[" * 100_000, "RecursionError"),
        ("metadata.jsonl", '{"file_name": 3, "text": "red"}', "near line 1: TypeError"),
        ("metadata.csv", "name,text\nred.png,red\n", "KeyError 'file_name'"),
        ("metadata.csv", "file_name,text\nred.png," + "a" * 200_000, "field larger than"),
        ("empty.txt", "", "no captions for 3 pictures: looked for metadata.jsonl, metadata.csv"),
        ("metadata.csv", "file_name,text\ngone.png,red\n", "1 rows name pictures that are not"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_read_is_an_error_with_an_example(pictures, name, text, message):
    (pictures / name).write_text(text)
    with pytest.raises(errors.DataError, match=message) as caught:
        folder.make(pictures)
    assert folder.EXAMPLE in str(caught.value)


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(errors.DataError, match=r"no such folder \(at config.data.path\)"):
        folder.make("")
    with pytest.raises(errors.DataError, match="no such folder"):
        folder.make(tmp_path / "nowhere")
    (tmp_path / ".hidden.png").write_bytes(png("red"))
    (tmp_path / "drawing.gif").write_bytes(b"GIF87a")
    with pytest.raises(errors.DataError, match=r"no pictures: looked for \.png, \.jpg"):
        folder.make(tmp_path)


def test_a_loader_goes_on_past_a_folders_broken_files(pictures):
    as_text(pictures)
    (pictures / "sub" / "green.png").write_bytes(png("green")[:40])
    tokenize = lambda captions: (
        (np.zeros((len(captions), 1), np.int32),) * 2 + ([""] * len(captions),)
    )
    stream = loader.Loader(folder.make(pictures), tokenize, batch_size=6, res=4, seed=0)
    for batch in stream.iterate(0, 3):
        assert batch.arrays["weight"].tolist() == (batch.records != 2).tolist()
    assert list(stream.quarantine) == [2]
