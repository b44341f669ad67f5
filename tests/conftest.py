"""Shared fixtures; the tests run on the CPU, without network."""

import fcntl
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has what its parent set
    # Runs of one session share their compiled programs, those in other processes too. Whoever works
    # on the tests can name a folder that is kept: later sessions then compile only what changed.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = (COMPILED := tempfile.TemporaryDirectory()).name
    # Nothing of the tests lies in the user's cache folder, and nothing there helps them.
    os.environ["XDG_CACHE_HOME"] = (CACHES := tempfile.TemporaryDirectory()).name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # Half of the time went into making machine code fast that runs for milliseconds; test_numerics
    # and the benchmarks compile as users do.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # two thirds of the time

import pytest

# A shell's background job ignores Ctrl-C, and so would every program that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from t2i_jax import loop
from tests import runs

# Traced programs are many small objects that live long. Looking for rings among them takes a tenth
# of the time.
gc.set_threshold(100_000, 50, 1000)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/goldens")


def pytest_collection_modifyitems(items):
    """The file with the dearest fixture comes first: work is stolen from the end."""
    items.sort(key=lambda item: item.path.name != "test_sharding.py")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The workdir of a whole :debug run of six steps; not to be changed."""
    parts = "PYTEST_XDIST_WORKER" in os.environ  # then the first process trains, each has a copy
    base = tmp_path_factory.getbasetemp()
    trained = (base.parent if parts else base) / "trained"
    with (trained.with_suffix(".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not trained.exists():
            loop.train(runs.config(sample_every=6), part := trained.with_suffix(".part"))
            part.rename(trained)  # whole, or not there
    return shutil.copytree(trained, base / "run") if parts else trained


@pytest.fixture(scope="session")
def update_golden(request):
    return request.config.getoption("--update-golden")


@pytest.fixture
def readers():
    """`readers(wait)`: how many threads of this test read ahead, after `wait` seconds to end in."""
    before = set(threading.enumerate())
    count = lambda: sum("prefetch" in t.name for t in set(threading.enumerate()) - before)

    def readers(wait=0):
        deadline = time.monotonic() + wait
        while count() and time.monotonic() < deadline:
            time.sleep(0.01)
        return count()

    return readers
