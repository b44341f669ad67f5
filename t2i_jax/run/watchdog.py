"""Nothing hangs in silence: every phase of a run has a limit; past it all stacks are shown."""

import contextlib
import faulthandler
import os
import sys
import threading
import time

from t2i_jax.run import distributed

LIMITS = {  # seconds
    "start": 14400.0,  # opening the data, and all that follows and has no name of its own
    "reading frozen nets": 14400.0,
    "captions": 86400.0,
    "restore": 3600.0,
    "compile": 7200.0,
    "training": 3600.0,  # what of a step has no name of its own
    "reading data": 3600.0,
    "step": 1800.0,
    "save": 3600.0,
    "hooks": 14400.0,
}

_phases: list[list] = []  # name, limit, deadline; the innermost last


@contextlib.contextmanager
def phase(name: str):
    """Ends the process with exit code 70 if the body takes longer than the phase's limit.

    The time of phases within it does not count: after each of them the limit begins anew.
    T2I_PHASE_SECONDS sets another limit for all phases.
    """
    if not any(thread.name == "watchdog" for thread in threading.enumerate()):
        threading.Thread(target=_watch, daemon=True, name="watchdog").start()
    limit = float(os.environ.get("T2I_PHASE_SECONDS", LIMITS[name]))
    _phases.append([name, limit, time.monotonic() + limit])
    try:
        yield
    finally:
        _phases.pop()
        if _phases:
            _phases[-1][2] = time.monotonic() + _phases[-1][1]


def _watch() -> None:
    while True:
        time.sleep(0.5)
        for name, limit, deadline in _phases[-1:]:
            if time.monotonic() > deadline:
                _expire(name, limit)


def _expire(name: str, limit: float) -> None:
    with contextlib.suppress(Exception):
        faulthandler.dump_traceback(file=sys.stderr)
    distributed.end(
        f"{name} did not end in {limit:.0f} s (at {distributed.here()}). Fix: see the stacks "
        "above; the same command goes on from the last checkpoint, with a longer limit in "
        "T2I_PHASE_SECONDS if it was only slow"
    )
