"""One writer for a workdir: a lock that says who holds it and is taken over from the dead."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid

import jax
from absl import logging

from t2i_jax import errors, images

BEAT = 5.0  # seconds between signs of life
STALE = 60.0  # seconds without one, after which an owner on another host counts as dead


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
    with signals.at_once():
        images.make_folder(workdir, "--workdir")
        holder.acquire()
    try:
        signals.abandoned.append(holder.release)
        yield holder.check
    finally:
        holder.release()


class Owner:
    """Holds <workdir>/lock from `acquire` to `release`.

    The lock names host, process and a random id, and a counter that a thread raises. An owner on
    this host is dead when its process is; one elsewhere when its counter stands still for `stale`
    seconds of our own clock. `check` tells an owner that was only paused that it lost the workdir.
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
        seen, since = None, time.monotonic()
        while True:
            with self._alone():
                found = self._read()
                if found is None or self._dead(found) or self._still(found, seen, since):
                    if found:
                        logging.warning("taking %s over from %s", self._path.parent, _who(found))
                    self._write(0)
                    break
            if found["machine"] == self._me["machine"]:
                raise self._taken(found)
            if seen is None:
                logging.info("%s holds %s: watching it", _who(found), self._path.parent)
            elif found != seen:
                raise self._taken(found)
            seen = found if seen is None else seen
            time.sleep(min(self._beat, self._stale) / 2)
        threading.Thread(target=self._live, daemon=True, name="owner").start()

    def check(self) -> None:
        """Raises OwnerError if the lock is another's by now."""
        found = self._read()
        if found is None or found["id"] != self._me["id"]:
            raise errors.OwnerError(
                f"the run was taken over by {_who(found)}" if found else "the lock was removed",
                where=str(self._path),
                fix="let the other process go on; this one writes nothing more",
            )

    def release(self) -> None:
        self._ended.set()
        with contextlib.suppress(errors.OwnerError, OSError), self._alone():
            self.check()
            self._path.unlink()

    @contextlib.contextmanager
    def _alone(self):
        """Nobody else on this file system reads and writes the lock meanwhile."""
        with self._path.with_name("lock.mutex").open("w") as f:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def _live(self) -> None:
        count = 0
        while not self._ended.wait(self._beat):
            count += 1
            with contextlib.suppress(OSError), self._alone():
                found = self._read()
                if self._ended.is_set() or found is None or found["id"] != self._me["id"]:
                    return
                self._write(count)

    def _dead(self, found) -> bool:
        here = found["machine"] == self._me["machine"]
        return here and _started(found["pid"]) != found["started"]

    def _still(self, found, seen, since) -> bool:
        return found == seen and time.monotonic() - since > self._stale

    def _taken(self, found):
        return errors.OwnerError(
            f"{_who(found)} trains there",
            where=str(self._path.parent),
            fix=f"stop process {found['pid']} on {found['host']}, or use another --workdir",
        )

    def _read(self) -> dict | None:
        try:
            if not self._path.is_file():  # a pipe would block
                return None
            found = json.loads(self._path.read_bytes())
            return found if set(self._me) < set(found) else None
        except (OSError, ValueError):
            return None

    def _write(self, beat: int) -> None:
        text = json.dumps(
            {**self._me, "beat": beat, "time": time.strftime("%FT%TZ", time.gmtime())}
        )
        images.write_whole(self._path, text.encode())


def _who(found) -> str:
    return f"process {found['pid']} on {found['host']} (last sign of life {found['time']})"


def _machine() -> str:
    """This boot of this machine, and its process namespace: where a pid means one process."""
    parts = []
    for read in (
        lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(os.stat("/proc/self/ns/pid").st_ino),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return ":".join([socket.gethostname(), *parts])


def _started(pid: int):
    """When a living process started, in the kernel's ticks; None if it is dead.

    Without /proc, 0 for every process that lives.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return 0
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])
