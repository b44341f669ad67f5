"""Faults on demand, for tests: T2I_FAILPOINT=name[:nth]=action,… and T2I_ENABLE_FAILPOINTS=1."""

import errno
import json
import os
import signal
import sys
import time

_hits: dict[str, int] = {}


def trace(workdir, process: int, step: int, batch) -> None:
    """Appends what a process read for a step to trace.<process>.jsonl, if T2I_TRACE is set."""
    if os.environ.get("T2I_ENABLE_FAILPOINTS") == "1" and os.environ.get("T2I_TRACE"):
        first, records = int(batch.arrays["index"][0]), [int(record) for record in batch.records]
        entry = {"step": step, "first_slot": first, "records": records}
        with (workdir / f"trace.{process}.jsonl").open("a") as f:
            f.write(json.dumps(entry) + "\n")


def hit(name: str, number: int | None = None) -> bool:
    """Carries out the fault that the environment names for this point.

    Args:
      number: is compared with `nth`. By default the visits of the point are counted, from 1. `nth`
        may be a range, `n-m`.
    Returns:
      Whether the point was named. The caller itself carries out actions unknown here.
    """
    if os.environ.get("T2I_ENABLE_FAILPOINTS") != "1":
        return False
    _hits[name] = _hits.get(name, 0) + 1
    at = _hits[name] if number is None else number
    for wanted in filter(None, os.environ.get("T2I_FAILPOINT", "").split(",")):
        where, _, action = wanted.partition("=")
        point, _, nth = where.partition(":")
        first, _, last = nth.partition("-")
        if point == name and int(first or 1) <= at <= int(last or first or 1):
            _act(name, action)
            return True
    return False


def _act(name: str, action: str) -> None:
    print(f"failpoint {name}", file=sys.stderr, flush=True)
    # An unknown action does nothing here: the caller carries it out, by the True of `hit`.
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "raise":
        raise RuntimeError(f"failpoint {name}")
    elif action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep")))
