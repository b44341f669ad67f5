"""The quick tier of the faults; the whole one is `make faults`."""

import pytest

from tests.faults import inputs, process, storage  # noqa: F401  (they register their rows)
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
