"""Several processes as one program: start-up, barriers, ends that the others notice."""

import os
import re
import socket
import sys
import threading

from absl import logging

from t2i_jax import errors

FIX = (
    "start all processes with the same --coordinator and --num_processes, and each --process_id "
    "once; see that the port is free and can be reached"
)


def start(
    *,
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    join_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes, before any device is used; alone, does nothing.

    Args:
      distributed: JAX finds the others: a TPU pod slice, SLURM, Open MPI.
      coordinator, num_processes, process_id: host:port of process 0, how many there are, and
        which of them this is, where JAX cannot find out.
      join_timeout: seconds to wait for all.
      heartbeat_timeout: seconds of silence after which a process counts as dead.
    Raises:
      ConfigError: arguments that contradict each other, or a port that is taken. A process that
        waits in vain for the others ends with the same exit code.
    """
    import jax

    explicit = (coordinator, num_processes, process_id)
    given = [x is not None for x in explicit]
    if not any(given) and not distributed:
        return
    if any(given) and not all(given):
        raise errors.ConfigError(
            "the processes are described by halves",
            where="the command line",
            fix="give --coordinator, --num_processes and --process_id together, or --distributed",
        )
    if all(given) and not 0 <= process_id < num_processes:
        raise errors.ConfigError(
            f"process_id is {process_id} of {num_processes}",
            where="--process_id",
            fix=f"give a number from 0 to {num_processes - 1}",
        )
    if not os.environ.get("JAX_PLATFORMS", "").startswith(("tpu", "cuda", "gpu")):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if process_id == 0:
        _check_port(coordinator)
    here = "--distributed"
    if all(given):
        here = f"process {process_id} of {num_processes} at {coordinator}"
    # JAX itself would abort with a dump of its stack.
    timer = threading.Timer(join_timeout, _give_up, (join_timeout, here))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=join_timeout + 60,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except Exception as e:
        reason = (str(e).splitlines() or ["?"])[0][:300]
        raise errors.ConfigError(
            f"no program of several processes: {reason}", where=here, fix=FIX
        ) from e
    timer.cancel()
    logging.info(
        "process %d of %d, %d of %d devices",
        *(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()),
    )


def barrier(name: str) -> None:
    """Returns when all processes have come here; the watchdog's phases limit the wait."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def as_first(value: bool | int) -> bool | int:
    """What process 0 found, on every process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def lost_peer(e: Exception) -> str | None:
    """What to say where an exchange with another process failed; None if that is not it."""
    if "jax" not in sys.modules:
        return None
    import jax

    failed = re.search(r"Gloo|NCCL|coordination service|Connection (reset|closed)", str(e))
    if jax.process_count() == 1 or not isinstance(e, jax.errors.JaxRuntimeError) or not failed:
        return None
    me, n = jax.process_index(), jax.process_count()
    others = [i for i in range(n) if i != me]
    who = f"process {others[0]}" if n == 2 else f"one of the processes {others}"
    return (
        f"{who} died or cannot be reached (at process {me} of {n}). Fix: see the logs of the "
        "others for the cause, then start all again: they go on from the last checkpoint"
    )


def leave(code: int) -> None:
    """Ends a process whose others go on: without waiting for them, so that they notice."""
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized() and code not in (0, errors.Preempted.exit_code):
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _check_port(address: str) -> None:
    """Process 0 will listen there."""
    port = address.rpartition(":")[2]
    try:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("", int(port)))
    except (OSError, ValueError, OverflowError) as e:
        raise errors.ConfigError(
            f"cannot listen on port {port}: {e}", where=f"--coordinator={address}", fix=FIX
        ) from e


def _give_up(limit: int, here: str) -> None:
    text = f"the processes did not come together in {limit} s (at {here}). Fix: {FIX}"
    print(f"t2i_jax: {text}", file=sys.stderr, flush=True)
    os._exit(errors.ConfigError.exit_code)
