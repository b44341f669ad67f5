"""Runs side by side: what they cost, which is best, and where it is written."""

import base64
import json
import shutil

import absl.flags
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from t2i_jax import errors, images
from t2i_jax.commands import compare
from t2i_jax.quality import protocol
from tests.test_pipeline import start


@pytest.fixture
def runs(run, tmp_path):
    """Two runs: `slow` reaches 0.8 after three core-hours, `fast` 0.4 after one."""
    for name, seconds, values in (("slow", 1800, (0.2, 0.4, 0.8)), ("fast", 600, (0.3, 0.4, 0.4))):
        folder = tmp_path / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "tb"))
        times = [{"step": step, "seconds": seconds} for step in (2, 4, 6)]
        events = [
            {"step": 2 * (i + 1), "shapes/full_match": value} for i, value in enumerate(values)
        ]
        for file, rows in (("times", times), ("events", events)):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        environment = json.loads((folder / "env.txt").read_text())
        assert environment["cores"] >= 1
        (folder / "env.txt").write_text(json.dumps(environment | {"cores": 2}))
    row = {"protocol": "shapes", "full_match": 0.7, "seconds": 9.0, "step": 6, "num_images": 8}
    rows = [row | {"full_match": 0.1}, row]  # the newest counts
    (tmp_path / "slow" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return compare.read([tmp_path / name for name in ("slow", "fast")])


def judge(folder, *rows):
    """Writes a run's results by the protocol `tiny`."""
    rows = [{"protocol": "tiny", "definition": {"num_images": 24}, **row} for row in rows]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_cost_is_counted_in_images_and_core_hours(runs):
    slow, fast = runs
    assert (slow.steps, slow.images_at(6)) == (6, 48)
    assert slow.hours_at(6) == pytest.approx(3 * 1800 * 2 / 3600)
    assert slow.hours_at(3) == pytest.approx(1.5 * 1800 * 2 / 3600)  # within a stretch
    assert fast.hours_at(6) == pytest.approx(1)
    assert slow.values() == {"shapes/full_match": 0.7}  # a protocol's row over the last evaluation


def report(folder, monkeypatch, **flags):
    """report.md of both runs."""
    monkeypatch.chdir(folder)
    absl.flags.FLAGS(["compare"])
    with flagsaver.flagsaver(**flags):
        compare.main(["slow", "fast"])
    return (folder / "report" / "report.md").read_text()


def test_the_best_comes_first_and_less_may_be_better(runs):
    runs = [runs[0]._replace(name="unjudged", events=[], results={}), *runs]
    names = lambda less: [row[0] for row in compare.table(runs, "shapes/full_match", less)[1:]]
    assert names(False) == ["slow", "fast", "unjudged"]
    assert names(True) == ["fast", "slow", "unjudged"]


@pytest.mark.parametrize(
    ("metric", "first", "note"),
    [
        ("tiny/fd-x", "fast", "Ranked by tiny/fd-x, less is better."),
        ("-tiny/colour", "fast", "Ranked by tiny/colour, less is better."),
        ("tiny/colour", "slow", "Ranked by tiny/colour, more is better."),
    ],
)
def test_a_metrics_name_says_what_is_better(runs, tmp_path, monkeypatch, metric, first, note):
    judge(tmp_path / "slow", {"fd-x": 300.0, "colour": 0.9})
    judge(tmp_path / "fast", {"fd-x": 200.0, "colour": 0.1})
    text = report(tmp_path, monkeypatch, metric=metric)
    assert note in text
    assert text.index(f"| {first} |") == text.index("|---|\n") + len("|---|\n")


def test_definitions_of_one_protocol_have_columns_of_their_own(runs, tmp_path):
    one, other = ({"num_images": 24, "seed": seed} for seed in (0, 1))
    named = {**other, "name": "tiny"}  # as rows were hashed once
    judge(
        tmp_path / "slow",
        *({"definition": one, "fd-x": value} for value in (9.0, 1.0)),
        {"definition": named, "definition_sha256": "bbbbbbbb", "fd-x": 2.0, "num_images": 32},
    )
    judge(tmp_path / "fast", {"definition": other, "fd-x": 3.0, "num_images": 31})
    slow, fast = runs = compare.read([tmp_path / "slow", tmp_path / "fast"])
    first, second = (f"tiny@{protocol.digest(d)[:6]}" for d in (one, other))
    assert slow.values().items() >= {f"{first}/fd-x": 1.0, f"{second}/fd-x": 2.0}.items()
    assert {"tiny/fd-x", f"{first}/fd-x"}.isdisjoint(fast.values())
    told = compare.about(runs, "", False)
    assert all(text in told for text in (f"24 by {first}", f"31 or 32 by {second}"))
    head = compare.table(runs, "", False)[0]  # the same name twice: each with its protocol
    assert {f"{first}/fd-x", f"{second}/fd-x"} < set(head)
    (fast,) = compare.read([tmp_path / "fast"])
    assert "fd-x" in compare.table([fast], "", False)[0]
    assert "Columns: full_match by shapes; fd-x by tiny." in compare.about([fast], "", False)
    assert fast.values()["tiny/fd-x"] == 3.0  # with nothing to tell it from


def test_runs_have_the_shortest_names_that_differ(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree("slow", f"{name}/slow")
    assert [run.name for run in compare.read(["a/slow", "b/slow", "fast"])] == [
        *("a/slow", "b/slow", "fast")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "codec"),
        (b'{"cores": 2}' + b" " * compare.ENVIRONMENT, "bytes, more than"),
        (None, "it is no file"),
        (b'{"cores": "two"}', "cores is 'two'"),
        (b"[2]", "cores is None"),
        (b"[" * 10**5, "recursion"),
    ],
)
def test_a_runs_cores_are_read_or_the_file_is_named(runs, tmp_path, content, message):
    path = tmp_path / "slow" / "env.txt"
    path.unlink()
    assert compare.read([tmp_path / "slow"])[0].cores == 1  # as before they were noted
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(errors.DataError, match=rf"not readable: .*{message}.*env\.txt"):
        compare.read([tmp_path / "slow"])


def test_rows_in_a_folder_are_no_rows(runs, tmp_path):
    (tmp_path / "fast" / "events.jsonl").unlink()
    (tmp_path / "fast" / "events.jsonl").mkdir()
    with pytest.raises(errors.DataError, match=r"not readable: it is no file .*events\.jsonl"):
        compare.read([tmp_path / "fast"])


def test_economy_is_the_cost_of_shares_of_the_best(runs):
    head, slow, fast = compare.economy(runs, "shapes/full_match", False)
    assert head[1:] == [f"shapes/full_match ≥ {v}" for v in ("0.4", "0.64", "0.72", "0.8")]
    assert slow == ["slow", "2", "3", "3", "3"]
    assert fast == ["fast", "0.667", "never", "never", "never"]
    _, slow, fast = compare.economy(runs, "shapes/full_match", True)  # 0.2 is the best
    assert slow == ["slow", "1", "1", "1", "1"]
    assert fast == ["fast", "0.333", "0.333", "never", "never"]


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.3, 0.3), (-2.0, -1.0), ()])
def test_economy_is_left_out_where_it_says_nothing(runs, values):
    events = [{"step": step, "shapes/full_match": v} for step, v in enumerate(values, 1)]
    assert not compare.economy([runs[0]._replace(events=events)], "shapes/full_match", False)


def test_costs_have_three_digits(runs):
    run = runs[0]._replace(seconds=[(6, 8.64)])
    head, row = compare.table([run], "", False)
    assert dict(zip(head, row, strict=True))["core-hours"] == "0.0024"


def test_a_report_holds_tables_curves_and_pictures(runs, tmp_path):
    results = tmp_path / "results.md"
    results.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    folders = [str(tmp_path / name) for name in ("slow", "fast")]
    start(
        *("-m", "t2i_jax", "compare", *folders),
        *(f"--output={tmp_path / 'report'}", f"--into={results}"),
    )
    text = (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    assert text.index("| slow | flow | 6 | 48 | 3 |") < text.index("| fast | flow |")
    assert text.startswith("# Runs compared\n")
    assert "<h1>Runs compared</h1>" in page
    for name in ("curves", "run1", "run2"):
        data = (tmp_path / "report" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert f"]({name}.png)" in text
        assert base64.b64encode(data).decode() in page
    for title in ("slow, step 6", "fast, step 6"):
        assert f"![{title}]" in text
        assert f"<b>{title}</b>" in page
    whole = results.read_text()
    assert whole.startswith("before\n")
    assert whole.endswith("after\n")
    assert "old" not in whole
    assert "| slow | flow |" in whole


def test_pictures_come_with_their_prompts(runs, tmp_path, monkeypatch):
    for name in ("slow", "fast"):
        path = tmp_path / name / "samples" / "step_00000010.png"
        images.save(
            path, np.zeros((4, 4, 3), np.uint8), {"prompts": ["a <b> cube", f"a {name} disc"]}
        )
    text = report(tmp_path, monkeypatch)
    assert "![slow, step 10](run1.png)\n\n1. a <b> cube\n2. a slow disc\n" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<b>fast, step 10</b><ol><li>a &lt;b&gt; cube</li><li>a fast disc</li></ol>" in page


def test_a_runs_pictures_over_the_training_stand_from_left_to_right(runs, tmp_path, monkeypatch):
    """Each after twice as many steps as the one before, of one size."""
    samples = tmp_path / "fast" / "samples"
    for step in (8, 11, 12, 25, 50, 100):
        images.save(samples / f"step_{step:08d}.png", np.full((4, 4, 3), step, np.uint8))
    images.save(samples / "step_00000005.png", np.zeros((6, 4, 3), np.uint8))
    text = report(tmp_path, monkeypatch)
    assert "![fast after steps 12, 25, 50, 100](progress2.png)" in text
    with Image.open(tmp_path / "report" / "progress2.png") as strip:
        assert strip.size == (4 * 4 + 3 * 8, 4)
        assert [strip.getpixel((12 * i, 0))[0] for i in range(4)] == [12, 25, 50, 100]
    assert "progress1" not in text


@pytest.mark.parametrize(
    ("workdirs", "flags", "message"),
    [
        (["slow", "slow"], {}, "given twice"),
        (["slow", "nowhere"], {}, "no such folder"),
        (["slow", "slow/samples"], {}, "no config.json in it"),
        (["slow", "exported"], {}, "no metrics.jsonl in it"),
        (["slow"], {"curves": ["model/los"]}, "--curves.*did you mean 'model/loss'"),
        (["slow"], {"metric": "shapes/ful_match"}, "did you mean 'shapes/full_match'"),
        (["slow"], {"into": "slow/config.json"}, "no place for the tables"),
        (["slow"], {"into": "slow"}, "not readable: Is a directory"),
        (["slow"], {"into": "slow/samples/step_00000006.png"}, "not readable: .*codec"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, tmp_path, monkeypatch, workdirs, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    shutil.copy("slow/config.json", "exported")
    absl.flags.FLAGS(["compare"])
    with flagsaver.flagsaver(**flags), pytest.raises(errors.ConfigError, match=message):
        compare.main(workdirs)
    assert not (tmp_path / "report").exists()


def test_a_run_whose_metric_is_not_a_number_comes_last_and_hides_none(runs):
    points = lambda *values: [{"step": n, "a/b": v} for n, v in enumerate(values, 1)]
    made = [runs[0]._replace(name=str(v), events=points(v, v)) for v in (0.9, float("nan"), 0.1)]
    made[0] = made[0]._replace(events=points(0.5, 0.9))
    _, *rows = compare.table(made, "a/b", True)
    assert [row[0] for row in rows] == ["0.1", "0.9", "nan"]
    head, *_ = compare.economy(made[::-1], "a/b", False)
    assert "nan" not in " ".join(head)


def test_results_of_a_run_that_was_begun_again_are_not_of_the_new_one(runs, tmp_path):
    file = tmp_path / "slow" / "results.jsonl"
    row = json.loads(file.read_text().splitlines()[0]) | {"full_match": 0.99, "step": 9000}
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    assert compare.read([tmp_path / "slow"])[0].values()["shapes/full_match"] == 0.7


def test_hours_on_other_cores_stay_what_they_were(runs, tmp_path):
    rows = [{"step": 2, "seconds": 3600, "cores": 2}, {"step": 4, "seconds": 3600, "cores": 8}]
    (tmp_path / "slow" / "times.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert compare.read([tmp_path / "slow"])[0].hours_at(4) == 10


def test_a_line_that_a_kill_has_cut_is_left_out(runs, tmp_path):
    with (tmp_path / "slow" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "model/lo')
    assert compare.read([tmp_path / "slow"])[0].steps == 6
