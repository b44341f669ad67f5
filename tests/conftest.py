"""Shared fixtures; the tests run on the CPU, without network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from t2i_jax import loop
from tests import runs


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/goldens")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The workdir of a whole :debug run of six steps; not to be changed."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train(runs.config(sample_every=6), workdir)
    return workdir


@pytest.fixture(scope="session")
def update_golden(request):
    return request.config.getoption("--update-golden")
