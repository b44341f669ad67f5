"""The quick tier of the faults; the whole one is `make faults`."""

import pytest

from tests.faults import broken, inputs, process, storage  # noqa: F401  (they register their rows)
from tests.faults.lab import ROWS, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.filterwarnings(  # TensorStore's threads on a full disk
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
@pytest.mark.parametrize("row", [r for r in ROWS if not r.long], ids=lambda r: r.id)
def test_survives(lab, row):
    text = row.run(lab)
    if text and text.startswith("skipped"):
        pytest.skip(text)


@pytest.mark.parametrize("break_", broken.BREAKS, ids=lambda b: f"{b.row} {b.file}")
def test_every_break_still_has_its_line(break_):
    assert broken.made_wrong(break_) != (broken.ROOT / "t2i_jax" / break_.file).read_text()
