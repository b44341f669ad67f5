"""Handling of SIGTERM and Ctrl-C, from a program's first line to its last.

This file imports nothing heavy, so that `listen` can run before JAX is imported.
"""

import contextlib
import os
import signal
import sys
import threading

from t2i_jax import errors

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEAVING = 5.0  # seconds for `Interrupt.leave`, which for example removes the lock

_training = None  # the Interrupt whose `with` is running


class Stop(BaseException):
    """A signal came during work that may be abandoned.

    It is a BaseException, so that no `except Exception` on the way takes it for a fault.
    """


def listen() -> None:
    """Makes a signal end this process at once, with exit code 75, as long as nothing is lost.

    Nothing is lost before the first step of a training and outside of one. Such an end is like a
    kill, after which the next start goes on. Call it in the main thread of a program of our own.
    """
    # Python runs handlers in the main thread, which may be compiling or importing for minutes. The
    # wakeup pipe is written by the C handler at once, so a thread that reads it is never late.
    reader, writer = os.pipe()
    # Python refuses a pipe that blocks here: its handler must never wait for a reader.
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore_defaults)  # a child shares the pipe
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and "&" ask to ignore it
            # The wakeup pipe needs a handler of Python, even if it does nothing.
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_hear, args=(reader,), daemon=True, name="signals").start()


def _restore_defaults() -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_DFL)


def _hear(reader: int) -> None:
    """Ends the process for a signal that comes when nothing would be lost."""
    while True:
        # Each byte is the number of one signal.
        for number in os.read(reader, 64):
            # Read once, as the main thread may leave its `with` at any moment.
            training = _training
            if number in SIGNALS and (training is None or training.idle):
                where = training.workdir if training else "the start"
                e = preempted(signal.Signals(number).name, where, "before the first step")
                # `leave` may wait for a lock or a disk; the exit does not wait for `leave`.
                limit = threading.Timer(LEAVING, os._exit, (e.exit_code,))
                limit.daemon = True
                limit.start()
                _tell(f"t2i_jax: {e}")
                # Nothing runs after `os._exit`, and `sys.exit` would end this thread alone.
                if training:
                    training.leave()
                os._exit(e.exit_code)


def _tell(text: str) -> None:
    """Writes to the screen by the system call: a signal may have struck within a `print`."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def preempted(name: str, where, when: str) -> errors.Preempted:
    return errors.Preempted(
        f"stopped by {name} {when}", where=str(where), fix="start the same command again to go on"
    )


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a request that is polled. A second Ctrl-C raises.

    With several processes JAX handles SIGTERM, whichever host gets it, and all stop after the same
    step. Ctrl-C is turned into a SIGTERM there. Outside of the main thread no signal is handled.

    Attributes:
      requested: the name of the first signal, or "".
      begun: whether something was trained that a sudden end would lose.
      abandoned: functions that `leave` calls before an end at which nothing is saved.
    """

    def __init__(self, workdir):
        import jax

        self.requested, self.workdir, self.begun, self.abandoned = "", workdir, False, []
        self._alone = not jax.distributed.is_initialized()
        self._at_once, self._old = False, {}

    @property
    def idle(self) -> bool:
        """Whether a sudden end of this process loses nothing."""
        return self._alone and not self.begun

    def __enter__(self):
        global _training
        if threading.current_thread() is threading.main_thread():
            numbers = SIGNALS if self._alone else (signal.SIGINT,)
            numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
            self._old = {n: signal.signal(n, self._catch) for n in numbers}
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._swallowed
            _training = self
        return self

    def __exit__(self, *_):
        global _training
        if _training is self:
            sys.unraisablehook = self._unraisable
            _training = None
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        before = self.requested
        self.requested = before or signal.Signals(number).name  # of two signals the first counts
        if before and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
        if self._at_once:
            raise Stop
        if not before:
            _tell(f"{self.requested}: saving after this step")

    def _swallowed(self, unraisable) -> None:
        """Raises Stop once more where Python had to drop it, as within a garbage collection."""
        if not isinstance(unraisable.exc_value, Stop):
            self._unraisable(unraisable)
        elif self._at_once:
            # Not at once: the collection that dropped it must have ended.
            again = threading.Timer(0.05, self._strike_again)
            again.daemon = True
            again.start()

    def _strike_again(self) -> None:
        if _training is self:  # else the signal would meet somebody else's handler
            os.kill(os.getpid(), signal.SIGTERM)

    def leave(self) -> None:
        """Calls the functions of `abandoned`, whatever each of them raises."""
        for fn in self.abandoned:
            with contextlib.suppress(Exception):  # a kill would leave even more behind
                fn()

    def requested_at(self, n: int) -> bool:
        """Whether to stop after step n. The answer is the same on every process."""
        from jax.experimental import multihost_utils

        if self._alone:
            return bool(self.requested)
        if multihost_utils.reached_preemption_sync_point(n):
            self.requested = "SIGTERM"
            return True
        return False

    def poll(self) -> None:
        """Raises Stop if this lone process is to stop."""
        if self.requested and self._alone:
            raise Stop

    @contextlib.contextmanager
    def at_once(self):
        """Makes a signal within the body raise Stop there. For waits that change nothing."""
        self.poll()
        # Of several processes none may leave alone: the others would wait for it in a collective.
        before, self._at_once = self._at_once, self._alone
        try:
            yield
        finally:
            self._at_once = before

    def awaited(self, fn):
        """The result of `fn()`, run in a thread. A signal raises Stop here; the thread goes on."""
        import concurrent.futures

        # A call into C, such as a compilation, would hold back the exception until its end. A wait
        # for a future does not.
        thread = concurrent.futures.ThreadPoolExecutor(1, "abandoned")
        future = thread.submit(fn)
        # No more work will come, so the pool's thread ends by itself as soon as `fn` does.
        thread.shutdown(wait=False)
        with self.at_once():
            return future.result()
