"""Tries every fault, prints a line for each.   python -m tests.faults [--long] [--noise] [ID …]

--noise shows, too, what libraries say of their broken disks and dead peers.
"""

import os
import pathlib
import sys
import tempfile
import time
import traceback

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from tests.faults import inputs, process, storage  # noqa: F401  (they register their rows)
from tests.faults.lab import ROWS, Lab


def main(argv) -> int:
    long, wanted = "--long" in argv, [a for a in argv if not a.startswith("-")]
    chosen = [r for r in ROWS if (r.id in wanted if wanted else long or not r.long)]
    if "--noise" not in argv:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    survived = skipped = 0
    with tempfile.TemporaryDirectory(prefix="faults") as root:
        lab = Lab(pathlib.Path(root), long=long)
        for row in sorted(chosen, key=lambda r: (r.id[0], int(r.id[1:]))):
            since = time.monotonic()
            try:
                text, word = row.run(lab) or "", "survived"
                if text.startswith("skipped"):
                    word, skipped = "skipped", skipped + 1
                survived += word == "survived"
            except (Exception, pytest.fail.Exception):  # the latter of pytest.raises
                text, word = traceback.format_exc(), "FAILED"
            seconds = time.monotonic() - since
            print(f"{row.id:4} {word:9} {seconds:5.1f} s  {row.promise}  {text}", flush=True)
    whole, ids = survived + skipped == len(chosen), {row.id for row in chosen}
    found = [f"{survived}/{len(chosen) - skipped} faults survived"]
    found += ["0 steps lost beyond the interval"] if whole and "P1" in ids else []
    found += ["0 examples repeated or skipped"] if whole and "T2" in ids else []
    print(" · ".join(found))
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
