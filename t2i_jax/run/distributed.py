"""Several processes as one program: start-up, barriers, and ends that the other processes notice.

JAX is imported inside functions: `here`, `end` and `leave` must work while it is being imported.
"""

import atexit
import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time

from absl import logging

from t2i_jax import errors

ALIVE = "t2i_jax/alive"  # folder of keys, one a process, with a count as its sign of life
DONE = "t2i_jax/done"  # key that process 0 sets when it has nothing left to do
LEAVING, SAVING = 5.0, 600.0  # seconds in which a process must end: all is saved, or a save runs
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
    """Joins the other processes, before any device is used. Without arguments it does nothing.

    Args:
      distributed: JAX finds the others itself: on a TPU pod slice, under SLURM or Open MPI.
      coordinator: host:port of process 0, where JAX cannot find it out.
      num_processes: how many processes there are.
      process_id: the number of this process, from 0.
      join_timeout: seconds to wait for all processes.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead. The
        others then end with exit code 70.
    Raises:
      ConfigError: arguments that contradict each other, or a port that is taken. A process that
        waits in vain for the others ends with the same exit code.
    """
    import jax

    explicit = (coordinator, num_processes, process_id)
    is_set = [x is not None for x in explicit]
    if not any(is_set) and not distributed:
        return
    if any(is_set) and not all(is_set):
        raise errors.misused(
            "the processes are described by halves",
            "give --coordinator, --num_processes and --process_id together, or --distributed",
        )
    if all(is_set) and not 0 <= process_id < num_processes:
        raise errors.ConfigError(
            f"process_id is {process_id} of {num_processes}",
            where="--process_id",
            fix=f"give a number from 0 to {num_processes - 1}",
        )
    # CPU devices of several processes exchange arrays by Gloo. Asking JAX for its backend would
    # start it, which is too early here.
    if not os.environ.get("JAX_PLATFORMS", "").startswith(("tpu", "cuda", "gpu")):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if process_id == 0:
        _check_port(coordinator)
    here = "--distributed"
    if all(is_set):
        here = f"process {process_id} of {num_processes} at {coordinator}"
    # Our own limit comes a minute before JAX's, which would abort with a dump of its stack.
    timer = threading.Timer(join_timeout, _give_up, (join_timeout, here))
    timer.daemon = True
    timer.start()
    what = "no program of several processes"
    with errors.explained(errors.ConfigError, what, where=here, fix=FIX, of=Exception):
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=join_timeout + 60,
            # Later than `_watch_others`, for the same reason.
            heartbeat_timeout_seconds=2 * heartbeat_timeout + 10,
        )
    timer.cancel()
    _watch_others(heartbeat_timeout)
    logging.info(
        "process %d of %d, %d of %d devices",
        *(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()),
    )


def barrier(name: str) -> None:
    """Returns when all processes have come here. The watchdog's phases limit the wait."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def as_first(value: bool | int) -> bool | int:
    """The value of process 0, on every process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def wait_for_first() -> None:
    """Makes the other processes wait until process 0 comes here, too, at the end of a program.

    Process 0 may still evaluate, alone. The others would go on to JAX's barrier at the exit, which
    fails after five minutes. If process 0 dies in the meantime, they end with an error, or JAX's
    own thread aborts them before: the callback that could hear of it ends in a std::bad_cast.
    """
    import jax
    from jax._src.distributed import global_state as shared

    if shared.client is None:
        return
    if shared.process_id == 0:
        shared.client.key_value_set(DONE, "1", allow_overwrite=True)
        return
    while True:
        try:
            # Short waits, so that the death of process 0 is noticed within ten seconds.
            shared.client.blocking_key_value_get(DONE, 10_000)  # ms
            return
        except jax.errors.JaxRuntimeError as e:
            # Only the text tells a wait that ran out from the death of process 0.
            if "DEADLINE_EXCEEDED" not in str(e):
                raise


def here() -> str:
    """The number of this process as text. It asks for no device: that may be what hangs."""
    if "jax" in sys.modules:
        from jax._src.distributed import global_state as shared

        if shared.client is not None:
            return f"process {shared.process_id} of {shared.num_processes}"
    return "process 0 of 1"


def end(text: str, code: int = errors.Error.exit_code) -> None:
    """Ends this process at once, whatever its other threads wait for.

    `os._exit` runs no exit handlers. They would wait for threads that hang.
    """
    with contextlib.suppress(Exception):
        print(f"t2i_jax: {text}", file=sys.stderr, flush=True)
    os._exit(code)


def _watch_others(limit: float) -> None:
    """Gives signs of life to the other processes, and ends this one when theirs stay away.

    Two threads do this. The one that asks process 0 for signs waits for ever when process 0 is
    stopped, so another one looks at the clock.
    """
    from jax._src.distributed import global_state as shared  # the only store of key and value

    client, me, n = shared.client, shared.process_id, shared.num_processes
    last_signs, since, over = {}, dict.fromkeys(range(n), time.monotonic()), threading.Event()

    def ask():
        for count in itertools.count():
            # The store lives in process 0. It is gone when that one is dead, and it may be gone
            # when all processes end. `watch` tells the two apart.
            with contextlib.suppress(Exception):
                client.key_value_set(f"{ALIVE}/{me}", str(count), allow_overwrite=True)
                signs = dict(client.key_value_dir_get(ALIVE))
                # The answer itself is a sign of process 0, which holds the store.
                now = since[0] = time.monotonic()
                for key, sign in signs.items():
                    if last_signs.get(key) != sign:
                        last_signs[key], since[int(key.rpartition("/")[2])] = sign, now
            time.sleep(min(1.0, limit / 10))

    def watch():
        last = time.monotonic()
        while not over.wait(0.2):
            now = time.monotonic()
            # This process itself stood still (SIGSTOP, a suspended machine) and heard nobody. The
            # others get their full time again.
            if now - last > limit / 2:
                since.update(dict.fromkeys(since, now))
            last = now
            silent = [i for i in since if i != me and time.monotonic() - since[i] > limit]
            # Only the first is named: when process 0 is silent, no other one can be heard either.
            for i in silent[:1]:
                end(
                    f"process {i} gave no sign of life for {limit:.0f} s (at {here()}). Fix: see "
                    "its log and its machine, then start all again: they go on from the last "
                    "checkpoint; --heartbeat_timeout sets the seconds"
                )

    # At the end of the program the others end, too, and their silence is no fault.
    atexit.register(over.set)
    for target in (ask, watch):
        threading.Thread(target=target, daemon=True, name=f"processes-{target.__name__}").start()


def lost_peer(e: Exception) -> str | None:
    """The message for an error that another process's death caused; None for other errors."""
    if "jax" not in sys.modules:
        return None
    import jax

    # JAX has no type of its own for a lost peer, so its text decides.
    lost = r"Gloo|NCCL|coordination service|UNAVAILABLE|Connection (reset|closed)"
    failed = re.search(lost, str(e))
    if jax.process_count() == 1 or not isinstance(e, jax.errors.JaxRuntimeError) or not failed:
        return None
    me, n = jax.process_index(), jax.process_count()
    others = [i for i in range(n) if i != me]
    who = f"process {others[0]}" if n == 2 else f"one of the processes {others}"
    return (
        f"{who} died or cannot be reached (at process {me} of {n}). Fix: see the logs of the "
        "others for the cause, then start all again: they go on from the last checkpoint"
    )


def cores() -> int:
    """The number of CPU cores, or of accelerators, that all processes of this run use."""
    import jax

    if jax.default_backend() != "cpu":
        return jax.device_count()
    # `os.cpu_count` would also count cores that this process may not use.
    return len(os.sched_getaffinity(0)) * jax.process_count()


def leave(code: int) -> None:
    """Ends this process without waiting for the others, so that they notice.

    Its own threads, which may hang or compile, get the time that a save may take. Where all is
    saved they get LEAVING seconds.
    """
    if "jax" in sys.modules:
        import jax

        # A normal exit runs JAX's barrier, at which the others would wait in vain. After a success
        # or a preemption every process gets there.
        if jax.distributed.is_initialized() and code not in (0, errors.Preempted.exit_code):
            sys.stderr.flush()
            os._exit(code)
    saved = code == errors.Preempted.exit_code
    limit = threading.Timer(LEAVING if saved else SAVING, _end_over, (code,))
    limit.daemon = True
    limit.start()
    sys.exit(code)


def _end_over(code: int) -> None:
    """Ends a process whose main thread has ended, or waits at its end for the others."""
    # Python joins the threads of pools before it takes the main thread for ended. Only this name of
    # its own tells that the wait has begun.
    if not threading.main_thread().is_alive() or getattr(threading, "_SHUTTING_DOWN", False):
        os._exit(code)


def _check_port(address: str) -> None:
    """Raises ConfigError unless process 0 can listen on the port of `address`."""
    port = address.rpartition(":")[2]
    what, where = f"cannot listen on port {port}", f"--coordinator={address}"
    of = (OSError, ValueError, OverflowError)
    with (
        errors.explained(errors.ConfigError, what, where=where, fix=FIX, of=of),
        socket.socket() as s,
    ):
        # Without it the port of a coordinator that has just ended would count as taken for a while.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("", int(port)))


def _give_up(limit: int, here: str) -> None:
    text = f"the processes did not come together in {limit} s (at {here}). Fix: {FIX}"
    print(f"t2i_jax: {text}", file=sys.stderr, flush=True)
    os._exit(errors.ConfigError.exit_code)
