"""The installed XLA computes what it should: releases that did not are named in setup.py."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np


def test_as_users_compile():
    """The checks below in a process without the tests' flags."""
    names = ("test_batched_small_products_are_right", "test_high_rank_reductions_run")
    code = f"from tests import test_numerics as t; {'; '.join(f't.{name}()' for name in names)}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_batched_small_products_are_right():
    """jax-ml/jax#39103: jaxlib 0.10.2 on CPU is off by 0.8 % here, silently."""
    rows = np.random.default_rng(0).standard_normal((32_769, 3)).astype(np.float32)
    got = jax.jit(jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2)))(rows)
    np.testing.assert_allclose(got, (rows.astype(np.float64) ** 2).sum(1), rtol=1e-5)


def test_high_rank_reductions_run():
    """jax-ml/jax#39257: jaxlib 0.10.2 to 0.11.0 crash on reductions of high rank."""
    x = np.arange(2**9, dtype=np.float32).reshape((2,) * 9)
    got = jax.jit(lambda x: x.sum((0, 2, 4, 6, 8)))(x)
    np.testing.assert_allclose(got, x.sum((0, 2, 4, 6, 8)))
