"""Shared fixtures; the tests run on the CPU, without network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/goldens")


@pytest.fixture(scope="session")
def update_golden(request):
    return request.config.getoption("--update-golden")
