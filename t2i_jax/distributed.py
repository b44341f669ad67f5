"""Several processes as one program: start-up by flags or environment, named and timed barriers."""

import os

from absl import flags, logging

from t2i_jax import errors

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a TPU pod slice, SLURM or Open MPI job."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; with --num_processes and --process_id."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead."
)


def start() -> None:
    """Joins the other processes as the flags say, before any device is used; or does nothing.

    Raises:
      ConfigError: flags that contradict each other, or not all processes came in time.
    """
    import jax

    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    given = [x is not None for x in explicit]
    if not any(given) and not _DISTRIBUTED.value:
        return
    if any(given) and not all(given):
        raise errors.ConfigError(
            "the processes are described by halves",
            where="the command line",
            fix="give --coordinator, --num_processes and --process_id together, or --distributed",
        )
    address, count, number = explicit
    if all(given) and not 0 <= number < count:
        raise errors.ConfigError(
            f"process_id is {number} of {count}",
            where="--process_id",
            fix=f"give a number from 0 to {count - 1}",
        )
    if not os.environ.get("JAX_PLATFORMS", "").startswith(("tpu", "cuda", "gpu")):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=_TIMEOUT.value,
            heartbeat_timeout_seconds=_HEARTBEAT.value,
        )
    except Exception as e:
        here = f"process {number} of {count} at {address}" if all(given) else "--distributed"
        raise errors.ConfigError(
            f"the processes did not come together in {_TIMEOUT.value} s: "
            f"{(str(e).splitlines() or ['?'])[0][:300]}",
            where=here,
            fix="start all processes with the same --coordinator and --num_processes and each "
            "--process_id once; see that the port is free and reachable",
        ) from e
    logging.info(
        "process %d of %d, %d of %d devices",
        *(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()),
    )
