"""A cache of compiled programs, kept between starts in a folder of the user's own.

An entry holds machine code, which is run without any further check. So the folder belongs to this
user alone, and it is never part of a run or of a model. The SHA-256 of every entry guards it
against damage. JAX's key holds the program, its options, the version of jaxlib and the kind of
device, but not the CPU. So the names of the files hold that.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import stat
import time
import warnings

import jax
from absl import logging

from t2i_jax import images
from t2i_jax.run import failpoints, watchdog

try:
    from jax._src import compilation_cache  # JAX has no public way to bring a cache of one's own
except ImportError:
    compilation_cache = None

LIMIT = 4 * 2**30  # bytes; beyond them the entries that were unused for longest are removed
MIN_SECONDS = 0.2  # a program that compiles faster is not kept
DIGEST = hashlib.sha256().digest_size


def enable() -> None:
    """Keeps the programs that are compiled from now on, and uses those of earlier starts.

    It does nothing where JAX has a cache already (JAX_COMPILATION_CACHE_DIR) or should use none
    (JAX_ENABLE_COMPILATION_CACHE=0). JAX_COMPILATION_CACHE_MAX_SIZE changes LIMIT. A folder that is
    not safe, or cannot be made, is logged and not used. Then each start compiles again.
    """
    # A variable that is set to nothing counts, too: then JAX is to have no folder.
    named = "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir
    if named or not jax.config.jax_enable_compilation_cache:
        return
    # These names are private. Where another version of JAX lacks them, nothing is kept (ADR 16).
    if not all(hasattr(compilation_cache, name) for name in ("_cache", "_cache_initialized")):
        logging.info("compiled programs are not kept: this JAX has another cache")
        return
    try:
        path = own_folder("compiled")
    except (OSError, RuntimeError) as e:  # RuntimeError: there is no home
        logging.warning("compiled programs are not kept: %s", e)
        return
    limit = jax.config.jax_compilation_cache_max_size
    # In a notebook JAX may have compiled before, and then it remembers that it has no cache.
    compilation_cache.reset_cache()
    # A negative number, JAX's default, means no limit.
    compilation_cache._cache = Folder(path, LIMIT if limit < 0 else limit)
    # This tells JAX that there is a cache already, so that it makes none of its own.
    compilation_cache._cache_initialized = True
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # JAX warns of an entry that another build of the same version left, and compiles it again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def compile_step(update, *args, signals):
    """The jitted step compiled for its arguments; a signal need not wait until that is done."""
    logging.info("compiling the first step …")
    started = time.perf_counter()
    lowered = update.lower(*args)

    def compiled():
        failpoints.hit("compile")
        return lowered.compile()

    with watchdog.phase("compile"):
        program = signals.awaited(compiled)
    logging.info("compiled in %.1f s", time.perf_counter() - started)
    return program


def own_folder(name: str) -> pathlib.Path:
    """The folder <cache of the user>/t2i_jax/<name>, made if need be.

    Raises:
      OSError: it cannot be made, or others could write there.
      RuntimeError: the user has no home.
    """
    # The XDG specification wants relative paths in its variables to be ignored.
    path = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    path = path if path.is_absolute() else pathlib.Path("~/.cache").expanduser()
    # `mkdir` gives its mode to the last folder alone, so both are made, and checked, one by one.
    # Who can write to the upper one could replace the lower.
    for folder in (path / "t2i_jax", path / "t2i_jax" / name):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_own(folder)
    return folder


def _check_own(path: pathlib.Path) -> None:
    """Raises OSError unless the folder is this user's, and no one else may write there."""
    # lstat, not stat: on a shared machine a link could lead into another user's folder.
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{path} is a link or no folder")
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user")
    if os.name == "posix" and status.st_mode & 0o022:
        raise OSError(f"others may write to {path} (chmod 700 mends it)")


class Folder:
    """The cache interface of JAX: bytes by key. It swallows every failure of the file system."""

    def __init__(self, path: pathlib.Path, limit: int):
        self._path, self._limit = path, limit

    def get(self, key: str) -> bytes | None:
        file = self._file(key)
        with contextlib.suppress(OSError):
            whole = file.read_bytes()
            digest, value = whole[:DIGEST], whole[DIGEST:]
            if hashlib.sha256(value).digest() == digest:
                os.utime(file)  # the time of the last use, by which `keep_to_limit` sorts
                return value
            file.unlink()  # damaged
        return None

    def put(self, key: str, value: bytes) -> None:
        # An entry above the limit would push out all others and then itself.
        if len(value) > self._limit:
            return
        try:
            images.write_whole(self._file(key), hashlib.sha256(value).digest() + value)
            keep_to_limit(self._path, self._limit)
        except OSError as e:
            logging.info("a compiled program is not kept: %s", e)

    def _file(self, key: str) -> pathlib.Path:
        return self._path / f"{processor()}-{key}"


def keep_to_limit(folder: pathlib.Path, limit: int) -> None:
    """Removes files, the longest unused first, until the rest has at most `limit` bytes."""
    files = []
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it
            files.append((file.stat().st_mtime, file.stat().st_size, file))
    size = sum(size for _, size, _ in files)
    for _, gone, file in sorted(files):
        if size <= limit:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        size -= gone  # counted also where another process was faster


@functools.cache
def processor() -> str:
    """A hash of what machine code for the CPU depends on: its kind, features and core count."""
    facts = [platform.machine(), platform.processor(), str(os.cpu_count())]
    # XLA:CPU splits loops over the cores that this process may use, so their number counts, too.
    if hasattr(os, "sched_getaffinity"):
        facts.append(str(len(os.sched_getaffinity(0))))
    # The first five begin lines of x86, the last two lines of ARM. Other lines, such as the clock
    # rate, differ from start to start.
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        facts += sorted({line for line in lines if line.startswith(wanted)})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
