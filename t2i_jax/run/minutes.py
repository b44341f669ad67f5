"""How many steps fit into `config.minutes` on this machine: fixed once, before the first step."""

import contextlib
import time

import jax
from absl import logging

from t2i_jax import errors
from t2i_jax.run import compile_cache, distributed, rundir, watchdog

TIMED, WARM = 50, 5  # steps that are timed, and those before them


def steps_before(config, workdir) -> int:
    """The steps that an earlier start made of config.minutes; 0 if there was none."""
    before = rundir.config_before(workdir) if config.minutes else None
    if not before:
        return 0
    if before.get("minutes") != config.minutes:
        raise errors.ConfigError(
            f"the run there is of {before.steps} steps, fixed for another time than "
            f"{config.minutes:g} minutes",
            where="config.minutes",
            fix="say how many steps it is to have: --config.steps=…",
        )
    return before.steps


def with_steps(config, steps: int):
    """The config with that many steps."""
    if config.steps == steps:
        return config
    config = config.copy_and_resolve_references()
    config.steps = steps
    return config


def measure(run, signals) -> int:
    """Times steps of a `loop.Run` on its own data, throws their state away, and tells how many
    steps config.minutes are: a multiple of config.log_every, the same on every process.
    """
    config = run.config
    with watchdog.phase("restore"), signals.at_once():
        state, values, compiled = run.fresh_state(), None, None
    with (
        contextlib.closing(run.batches.iterate(0, WARM + TIMED)) as stream,
        watchdog.phase("training"),
        signals.at_once(),
    ):
        for n, batch in enumerate(stream):
            arrays = run.layout.place(batch.arrays)
            if compiled is None:
                args = state, run.frozen, arrays
                compiled = compile_cache.compile_step(run.update, *args, signals=signals)
            # The clock starts when no step is in flight, or earlier steps would count.
            if n == WARM:
                jax.block_until_ready(state)
                started = time.perf_counter()
            before, (state, values) = values, compiled(state, run.frozen, arrays)
            jax.block_until_ready(before)  # one step ahead of the devices
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
    whole = config.log_every
    steps = round(60 * config.minutes * TIMED / seconds / whole) * whole
    # Each process has measured a time of its own.
    steps = distributed.as_first(max(whole, steps))
    logging.info(
        "%d steps took %.1f s: training for %g minutes is %d steps",
        *(TIMED, seconds, config.minutes, steps),
    )
    return steps
