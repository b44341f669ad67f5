"""Runs side by side: what they cost, which is best, and where it is written."""

import base64
import json
import shutil

import absl.flags
import pytest
from absl.testing import flagsaver

from t2i_jax import compare, errors
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
    return [compare.read(str(tmp_path / name)) for name in ("slow", "fast")]


def test_cost_is_counted_in_images_and_core_hours(runs):
    slow, fast = runs
    assert (slow.steps, slow.images_at(6)) == (6, 48)
    assert slow.hours_at(6) == pytest.approx(3 * 1800 * 2 / 3600)
    assert slow.hours_at(3) == pytest.approx(1.5 * 1800 * 2 / 3600)  # within a stretch
    assert fast.hours_at(6) == pytest.approx(1)
    assert slow.values() == {"shapes/full_match": 0.7}  # a protocol's row over the last evaluation


def test_the_best_comes_first_and_less_may_be_better(runs):
    names = lambda metric: [row[0] for row in compare.table(runs, metric)[1:]]
    assert names("shapes/full_match") == ["slow", "fast"]
    assert names("-shapes/full_match") == ["fast", "slow"]


def test_economy_is_the_cost_of_shares_of_the_best(runs):
    head, slow, fast = compare.economy(runs, "shapes/full_match")
    assert head[1:] == [f"shapes/full_match ≥ {v}" for v in ("0.4", "0.64", "0.72", "0.8")]
    assert slow == ["slow", "2.00", "3.00", "3.00", "3.00"]
    assert fast == ["fast", "0.67", "never", "never", "never"]
    _, slow, fast = compare.economy(runs, "-shapes/full_match")  # 0.2 is the best
    assert slow == ["slow", "1.00", "1.00", "1.00", "1.00"]
    assert fast == ["fast", "0.33", "0.33", "never", "never"]


def test_a_report_holds_tables_curves_and_pictures(runs, tmp_path):
    results = tmp_path / "results.md"
    results.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    folders = [str(tmp_path / name) for name in ("slow", "fast")]
    start(
        *("-m", "t2i_jax.compare", *folders),
        *(f"--output={tmp_path / 'report'}", f"--into={results}"),
    )
    text = (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    assert text.index("| slow | flow | 6 | 48 | 3.00 |") < text.index("| fast | flow |")
    for name in ("curves", "slow", "fast"):
        data = (tmp_path / "report" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert f"]({name}.png)" in text
        assert base64.b64encode(data).decode() in page
    whole = results.read_text()
    assert whole.startswith("before\n")
    assert whole.endswith("after\n")
    assert "old" not in whole
    assert "| slow | flow |" in whole


@pytest.mark.parametrize(
    ("workdirs", "flags", "message"),
    [
        (["slow", "slow"], {}, "called alike"),
        (["slow", "slow/tb"], {}, "no run"),
        (["slow"], {"metric": "shapes/ful_match"}, "did you mean 'shapes/full_match'"),
        (["slow"], {"into": "slow/config.json"}, "no place for the tables"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, tmp_path, monkeypatch, workdirs, flags, message):
    monkeypatch.chdir(tmp_path)
    absl.flags.FLAGS(["compare"])
    with flagsaver.flagsaver(**flags), pytest.raises(errors.ConfigError, match=message):
        compare.main(workdirs)
    assert not (tmp_path / "report").exists()
