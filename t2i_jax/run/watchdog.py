"""A limit of time for every phase of a run. Past it the process shows all stacks and ends."""

import contextlib
import faulthandler
import os
import sys
import threading
import time

from t2i_jax.run import distributed

LIMITS = {  # seconds
    "start": 14400.0,  # opening the data, and everything before training without its own phase
    "reading frozen nets": 14400.0,
    "caches": 86400.0,
    "restore": 3600.0,
    "compile": 7200.0,
    "training": 3600.0,  # the parts of a step without their own phase
    "reading data": 3600.0,
    "step": 1800.0,
    "save": 3600.0,
    "hooks": 14400.0,
}

_phases: list[list] = []  # [name, limit, deadline] of each open phase, the innermost last


@contextlib.contextmanager
def phase(name: str):
    """Ends the process with exit code 70 if the body takes longer than the phase's limit.

    The time of inner phases does not count: after each of them the limit begins anew. The
    environment variable T2I_PHASE_SECONDS sets one limit, in seconds, for all phases.

    Args:
      name: a key of LIMITS.
    """
    # A thread of its own, as the main one may hang in a C call, where no signal is handled.
    if not any(thread.name == "watchdog" for thread in threading.enumerate()):
        threading.Thread(target=_watch, daemon=True, name="watchdog").start()
    limit = float(os.environ.get("T2I_PHASE_SECONDS", LIMITS[name]))
    # Monotonic time, as a wall clock that is set anew would end a phase, or make it endless.
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
        for name, limit, deadline in _phases[-1:]:  # a copy: the main thread changes the list
            if time.monotonic() > deadline:
                _expire(name, limit)


def _expire(name: str, limit: float) -> None:
    with contextlib.suppress(Exception):  # standard error may be closed
        faulthandler.dump_traceback(file=sys.stderr)
    distributed.end(
        f"{name} did not end in {limit:.0f} s (at {distributed.here()}). Fix: see the stacks "
        "above; the same command goes on from the last checkpoint, with a longer limit in "
        "T2I_PHASE_SECONDS if it was only slow"
    )
