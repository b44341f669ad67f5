"""The words of training captions: kept with a model, told where a prompt has others."""

import types

import pytest
from absl import logging

from t2i_jax import pipeline, weights
from t2i_jax.data import inputs, loader, shapes
from t2i_jax.run import logs, rundir
from t2i_jax.text import words
from tests import runs

KNOWN = frozenset(["a", "red", "circle", "on", "the", "square"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A red circle, RED!", ["a", "red", "circle", "red"]),
        ("x-ray of the naïve Straße", ["x", "ray", "of", "the", "naïve", "strasse"]),
        ("红色 круг", ["红", "色", "круг"]),
        ("", []),
        ("🔴 … _", []),
    ],
)
def test_words_are_told_apart_by_spaces_and_signs(text, found):
    assert words.of(text) == found


def test_unknown_words_come_once_and_with_those_near_to_them():
    missing = words.unknown("a Circl on a dragon, a circl", KNOWN)
    assert missing == ["circl", "dragon"]
    text = words.message(missing, KNOWN)
    assert "'circl' (near to it: circle)" in text
    assert "it knows: a circle on red square the" in text
    many = KNOWN | {f"word{i}" for i in range(words.FEW)}
    assert "it knows" not in words.message(missing, many)


def test_a_list_that_is_not_there_or_broken_is_none(tmp_path):
    assert words.read(tmp_path) is None
    words.write(tmp_path, KNOWN)
    assert words.read(tmp_path) == KNOWN
    (tmp_path / words.FILE).write_bytes(b"\xff\xfe\xff")
    assert words.read(tmp_path) is None


def test_a_source_of_very_many_words_or_pictures_has_no_list():
    class Source:
        def __init__(self, captions, size):
            self._captions, self._size = captions, size

        def __len__(self):
            return self._size

        def captions(self):
            return self._captions

    many = [str(i) for i in range(words.LIMIT + 1)]
    assert words.collect(Source(many, 2)) is None
    assert words.collect(Source(many[:9], words.SCANNED + 1)) == set(many[:9])
    assert words.collect(Source(iter(many[:9]), words.SCANNED + 1)) is None
    assert words.collect(object()) is None


def test_few_captions_of_shapes_have_all_their_words():
    source = shapes.make(split="train", size=8192)
    assert source.words() == {word for text in source.captions() for word in words.of(text)}


@pytest.mark.parametrize("name", ["shapes", "shapes-gan", "shapes-clip"])
def test_built_in_models_know_the_words_of_shapes(name):
    known = words.read(weights.BUILTIN / name)
    assert known == shapes.make(split="train", size=8192).words()


def test_a_run_knows_its_own_words_and_those_of_the_models_it_uses(tmp_path):
    config = runs.config()
    source = types.SimpleNamespace(words=lambda: {"dragon"})
    assert rundir.known_words(config, source) == {"dragon"}
    config.load.text = ""
    config.load.update(model="builtin:shapes#model")
    assert {"dragon", "circle"} < rundir.known_words(config, source)
    (tmp_path / "config.json").write_text(weights.to_json(config))  # older, without a list
    config.init_from = str(tmp_path)
    assert rundir.known_words(config, source) is None


def test_a_family_without_captions_has_no_words(tmp_path):
    source = types.SimpleNamespace(words=lambda: {"dragon"})
    read = inputs.picture(8), inputs.caption(None)
    for each, there in ((read[:1], False), (read, True)):
        rundir.describe(tmp_path, runs.config(), source, each)
        assert (tmp_path / words.FILE).exists() == there
    logs.close()


def test_a_run_keeps_its_words_and_its_pipeline_tells_others_once(run, caplog, monkeypatch):
    pipe = pipeline.Pipeline.load(str(run))
    assert pipe.words == words.read(run) == loader.make_source(runs.config()).words()
    monkeypatch.setattr(pipe.predictor, "sample", lambda *args, **options: None)
    logging.get_absl_logger().propagate = True
    for _ in range(2):
        pipe(["a red circle", "a red dragon"], negative_prompt="mist")
    pipe("a dragon and a knight")
    told = [r.getMessage() for r in caplog.records if "never saw" in r.getMessage()]
    assert len(told) == 2
    assert "'dragon'" in told[0]
    assert "'mist'" in told[0]
    assert "'red'" not in told[0]
    assert "'dragon'" not in told[1]
    pipe.words = None
    pipe("a wizard")
    assert "wizard" not in caplog.text


def test_of_very_many_unknown_words_a_few_are_named():
    text = words.message([f"word{i}" for i in range(2000)], ["red"])
    assert "'word7'" in text
    assert "'word8'" not in text
    assert "and 1992 more" in text
