"""The data source of named drawings in several styles."""

import io
import json
import subprocess
import tarfile

import pytest

from t2i_jax import errors
from t2i_jax.data import emoji, emoji_tfds

pytest.importorskip("resvg_py")

THINGS = [f"thing-{i}" for i in range(60)]
RED = '<rect x="8" y="8" width="16" height="16" fill="#f00"/>'


def icons(package):
    """A package's drawings, of which Firefox's are larger and its names without dashes."""
    names = THINGS if package.style != "firefox" else [name.replace("-", "") for name in THINGS]
    found = {name: {"body": RED} for name in names}
    toned = ("wave-dark-skin-tone", "baby-light", "baby-medium-dark", "baby-dark")
    found |= {name: {"body": RED} for name in toned} | {"gone": {"body": RED, "hidden": True}}
    return {"icons": found, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("icons")
    for i, package in enumerate(emoji_tfds.PACKAGES):
        own = path / ("node_modules/@iconify-json" if i % 2 else "") / package.name
        own.mkdir(parents=True)
        (own / "icons.json").write_text(json.dumps(icons(package)))
    return path


@pytest.fixture(scope="module")
def sources(folder):
    """Both splits, of 16 pixels."""
    make = lambda split: emoji.make(split=split, icons=str(folder), data_dir=str(folder), res=16)
    return {split: make(split) for split in ("train", "test")}


def drawings(source):
    """thing -> styles."""
    found = {}
    for example in (source[i] for i in range(0, len(source), len(emoji.WORDINGS))):
        thing, _, style = example["caption"].partition(", ")
        found.setdefault(thing, set()).add(style)
    return found


def test_a_held_out_pair_has_its_thing_in_other_styles(sources):
    train, test = drawings(sources["train"]), drawings(sources["test"])
    assert len(train) == len(THINGS)  # no skin tones, nothing hidden, one name in all styles
    assert 4 <= len(test) <= 25  # a twentieth of 300 pairs, of one thing once
    for thing, styles in test.items():
        assert len(styles) == 1
        assert styles.isdisjoint(train[thing])
        assert len(train[thing] | styles) == len(emoji_tfds.PACKAGES)


def test_a_light_is_no_skin_tone():
    names = {"police-car", "police-car-light", "hand", "hand-light", "hand-dark"}
    names |= {"hand-medium-dark", "wave-dark-skin-tone"}
    toned = {name for name in names if emoji_tfds.has_tone(name, names)}
    assert names - toned == {"police-car", "police-car-light", "hand"}


def test_a_drawing_has_several_captions(sources):
    source = sources["train"]
    found = [source[i] for i in range(len(emoji.WORDINGS))]
    for example, wording in zip(found, emoji.WORDINGS, strict=True):
        ground = wording.partition(" on a ")[2]
        assert example["caption"].endswith("background") == bool(ground)
        corner, middle = example["image"][0, 0].tolist(), example["image"][64, 64].tolist()
        assert middle == [255, 0, 0]
        colour = example["caption"].split()[-2] if ground else None
        assert corner == list(emoji.shapes.COLOURS.get(colour, (255, 255, 255)))
    assert list(source.captions())[: len(found)] == [example["caption"] for example in found]


def test_fewer_captions_are_the_first(folder, sources):
    one = emoji.make(icons="gone", data_dir=str(folder), captions=1)  # it is built already
    assert len(one) * len(emoji.WORDINGS) == len(sources["train"])
    assert one.fingerprint != sources["train"].fingerprint
    assert all(caption.endswith(" style") for caption in one.captions())
    with pytest.raises(errors.ConfigError, match=r"captions is 9.*use 1 … 4"):
        emoji.make(data_dir=str(folder), captions=9)


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(errors.DataError, match=r"no fluent-emoji-flat/icons.json.*npm install"):
        dict(emoji_tfds.read(str(tmp_path)))
    monkeypatch.setattr(emoji_tfds.shutil, "which", lambda name: None)
    with pytest.raises(errors.DataError, match=r"npm, which is not installed.*config.data.icons"):
        dict(emoji_tfds.read())
    (package, *_) = emoji_tfds.PACKAGES
    for text in (b"[]", b"{", b'{"icons": {"a": {"body": 3}}}', b'{"icons": {"a": []}}'):
        with pytest.raises(errors.DataError, match=r"no drawings.*at fluent-emoji-flat"):
            emoji_tfds._icons(package, text)


def test_npm_gives_what_was_published(tmp_path, monkeypatch):
    (package, *_) = emoji_tfds.PACKAGES
    text = json.dumps(icons(package)).encode()
    calls = []

    def pack(command, cwd, **options):
        calls.append(command[1:])
        with tarfile.open(f"{cwd}/a.tgz", "w:gz") as file:
            member = tarfile.TarInfo("package/icons.json")
            member.size = len(text)
            file.addfile(member, io.BytesIO(text))
        return subprocess.CompletedProcess(command, int(len(calls) == 2), "a.tgz\n", "no net\n")

    monkeypatch.setattr(emoji_tfds.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(emoji_tfds.subprocess, "run", pack)
    with pytest.raises(errors.DataError, match="is not the one published"):
        emoji_tfds.fetched(str(tmp_path), package)
    with pytest.raises(errors.DataError, match=r"npm cannot fetch @iconify.*: no net"):
        emoji_tfds.fetched(str(tmp_path), package)
    own = package._replace(digest=emoji_tfds.hashlib.sha256(text).hexdigest())
    assert emoji_tfds.fetched(str(tmp_path), own) == text
    assert "--ignore-scripts" in calls[0]
