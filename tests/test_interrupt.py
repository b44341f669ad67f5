"""Signals that come where Python can only drop what their handler raises."""

import gc
import os
import signal
import sys
import time

import pytest

from t2i_jax.run import interrupt


def test_a_signal_within_a_garbage_collection_is_heard_after_it(tmp_path, monkeypatch, capfd):
    hook = lambda unraisable: print("dropped:", unraisable.exc_value, file=sys.stderr)
    monkeypatch.setattr(sys, "unraisablehook", hook)  # in place of pytest's
    collected = []

    def collecting(phase, info):
        if not collected:
            collected.append(phase)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler raises here

    def waits():
        gc.collect()
        assert collected
        time.sleep(10)

    gc.callbacks.append(collecting)
    try:
        with (
            interrupt.Interrupt(tmp_path) as signals,
            pytest.raises(interrupt.Stop),
            signals.at_once(),
        ):
            waits()
    finally:
        gc.callbacks.remove(collecting)
    assert signals.requested == "SIGTERM"
    assert "dropped" not in capfd.readouterr().err
    assert sys.unraisablehook is hook
