"""Nothing hangs in silence: every phase of a run has a limit; past it all stacks are shown."""

import contextlib
import faulthandler
import os
import sys
import threading
import time

import jax

LIMITS = {
    "captions": 86400.0,
    "restore": 3600.0,
    "compile": 7200.0,
    "step": 1800.0,
    "save": 3600.0,
    "hooks": 14400.0,
}

_phases: list[tuple[str, float, float]] = []  # name, limit, deadline; the innermost last


@contextlib.contextmanager
def phase(name: str):
    """Ends the process with exit code 70 if the body takes longer than the phase's limit.

    T2I_PHASE_SECONDS sets another limit for all phases.
    """
    if not any(thread.name == "watchdog" for thread in threading.enumerate()):
        threading.Thread(target=_watch, daemon=True, name="watchdog").start()
    limit = float(os.environ.get("T2I_PHASE_SECONDS", LIMITS[name]))
    _phases.append((name, limit, time.monotonic() + limit))
    try:
        yield
    finally:
        _phases.pop()


def _watch() -> None:
    while True:
        time.sleep(0.5)
        for name, limit, deadline in list(_phases):
            if time.monotonic() > deadline:
                _expire(name, limit)


def _expire(name: str, limit: float) -> None:
    with contextlib.suppress(Exception):
        faulthandler.dump_traceback(file=sys.stderr)
        print(
            f"t2i_jax: {name} did not end in {limit:.0f} s (at process {jax.process_index()} of "
            f"{jax.process_count()}). Fix: see the stacks above; the same command goes on from the "
            "last checkpoint, with a longer limit in T2I_PHASE_SECONDS if it was only slow",
            file=sys.stderr,
            flush=True,
        )
    os._exit(70)
