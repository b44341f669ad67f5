"""One writer for a workdir: a lock that names its holder. A dead holder loses it."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import stat
import threading
import time
import uuid

import jax
from absl import logging

from t2i_jax import errors, images

BEAT = 5.0  # seconds between signs of life
STALE = 60.0  # seconds without one after which an owner on another host counts as dead


@contextlib.contextmanager
def held(workdir, signals):
    """Makes a workdir and holds its lock during the body; yields what checks that it still does.

    Of several processes the first holds it for all. A signal that ends the process releases it.

    Args:
      signals: the `interrupt.Interrupt` that is entered.
    Raises:
      OwnerError: a living process holds it.
      StorageError: the folder cannot be written.
    """
    if jax.process_index():
        yield lambda: None
        return
    holder = Owner(workdir)
    # `acquire` may watch another host's lock for a minute. A signal need not wait for that.
    with signals.at_once():
        images.make_folder(workdir, "--workdir")
        holder.acquire()
    try:
        # A signal may end the process by `os._exit`, which does not run the `finally` below.
        signals.abandoned.append(holder.release)
        yield holder.check
    finally:
        holder.release()


class Owner:
    """Holds <workdir>/lock from `acquire` to `release`.

    The lock names the host, the process and a random id, and holds a counter that a thread raises.
    An owner on this host is dead when its process is. One on another host is dead when its counter
    stands still for `stale` seconds. An owner that was only paused learns by `check` that it lost
    the workdir.

    Args:
      beat: seconds between two raises of the counter.
      stale: seconds without a raise after which an owner on another host counts as dead.
    """

    def __init__(self, workdir, *, beat: float = BEAT, stale: float = STALE):
        self._path = pathlib.Path(workdir) / "lock"
        self._beat, self._stale = beat, stale
        self._me = {"id": uuid.uuid4().hex, "pid": os.getpid(), "started": _started(os.getpid())}
        self._me |= {"host": socket.gethostname(), "machine": _machine()}
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          OwnerError: a living process holds it.
        """
        # `first` is the lock as it was at the first look. Its age is measured by our own monotonic
        # clock, as the clocks of two hosts may differ by more than `stale`.
        first, since = None, time.monotonic()
        while True:
            with self._alone():
                holder = self._read()
                if holder is None or self._dead(holder) or self._still(holder, first, since):
                    if holder:
                        logging.warning("taking %s over from %s", self._path.parent, _who(holder))
                    self._write(0)
                    break
            if holder["machine"] == self._me["machine"]:  # /proc has said that it lives
                raise self._taken(holder)
            if first is None:
                logging.info("%s holds %s: watching it", _who(holder), self._path.parent)
            # Its counter was raised meanwhile, so the holder lives.
            elif holder != first:
                raise self._taken(holder)
            first = holder if first is None else first
            time.sleep(min(self._beat, self._stale) / 2)
        threading.Thread(target=self._live, daemon=True, name="owner").start()

    def check(self) -> None:
        """Raises OwnerError if another process has taken the lock, or the lock is gone.

        StorageError: it cannot be read, which tells nothing about its holder.
        """
        with errors.of_storage(self._path):
            holder = self._read()
        if holder is None or holder["id"] != self._me["id"]:
            raise errors.OwnerError(
                f"the run was taken over by {_who(holder)}" if holder else "the lock was removed",
                where=str(self._path),
                fix="let the other process go on; this one writes nothing more",
            )

    def release(self) -> None:
        """Removes the lock, unless it has another holder."""
        self._ended.set()
        # Within the mutex: else another process might take the lock between check and removal.
        with contextlib.suppress(errors.OwnerError, OSError), self._alone():
            self.check()
            self._path.unlink()

    @contextlib.contextmanager
    def _alone(self):
        """Keeps other processes from reading and writing the lock within the body."""
        # A file of its own: the lock itself is replaced by a rename at every beat, and a flock
        # would stay with the old file. The kernel drops a flock when its process dies.
        with self._path.with_name("lock.mutex").open("w") as f:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def _live(self) -> None:
        count = 0
        while not self._ended.wait(self._beat):
            count += 1
            # A full disk costs a beat, not the run. `release` may have come between the wait and
            # the mutex, so `_ended` is asked again: else the lock would be written once more.
            with contextlib.suppress(OSError), self._alone():
                holder = self._read()
                if self._ended.is_set() or holder is None or holder["id"] != self._me["id"]:
                    return
                self._write(count)

    def _dead(self, holder) -> bool:
        here = holder["machine"] == self._me["machine"]
        # Process ids are given again, so the time at which the process started must be equal, too.
        return here and _started(holder["pid"]) != holder["started"]

    def _still(self, holder, first, since) -> bool:
        return holder == first and time.monotonic() - since > self._stale

    def _taken(self, holder):
        return errors.OwnerError(
            f"{_who(holder)} trains there",
            where=str(self._path.parent),
            fix=f"stop process {holder['pid']} on {holder['host']}, or use another --workdir",
        )

    def _read(self) -> dict | None:
        """What the lock holds; None if there is none. An OSError says neither."""
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):  # opening a named pipe would block
                return None
            # A lock has all our keys and two more, see `_write`. Anything else counts as no lock.
            holder = json.loads(self._path.read_bytes())
            return holder if set(self._me) < set(holder) else None
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def _write(self, beat: int) -> None:
        # The time is there for messages alone. Who lives is told by the counter, as clocks differ.
        text = json.dumps(
            {**self._me, "beat": beat, "time": time.strftime("%FT%TZ", time.gmtime())}
        )
        images.write_whole(self._path, text.encode())


def _who(holder) -> str:
    return f"process {holder['pid']} on {holder['host']} (last sign of life {holder['time']})"


def _machine() -> str:
    """Names the space in which a process id means one process: host, boot and pid namespace.

    Containers of one host may share its name but not its process ids.
    """
    parts = []
    for read in (
        lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(os.stat("/proc/self/ns/pid").st_ino),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return ":".join([socket.gethostname(), *parts])


def _started(pid: int):
    """The time at which a living process started, in the kernel's ticks; None if it is dead.

    Without /proc it is 0 for every living process.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        # There is a /proc, so what it lacks is this process.
        if pathlib.Path("/proc/self/stat").exists():
            return None
        try:
            # Signal 0 is not delivered. The call only tells whether the process exists.
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:  # no permission to signal it: it lives
            pass
        return 0
    # The second field is the program's name in parentheses. It may hold spaces and parentheses, so
    # fields are counted from the last one (proc_pid_stat(5): state is field 3, starttime 22).
    state, *rest = stat.rpartition(")")[2].split()
    # A zombie (Z) has ended. Only its entry stays until its parent asks for the exit status.
    return None if state in "ZX" else int(rest[18])
