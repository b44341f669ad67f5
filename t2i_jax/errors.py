"""Errors a user can act on: what happened, where, and the fix. Each kind has its own exit code."""

import contextlib
import errno
import os
import re
import sysconfig
import traceback

# The errno values of storage. In order: no room or no right, read-only or broken disks, names and
# files that are too long, paths that lead nowhere or to another kind of thing. All others, such as
# errors of the network, stay what they are.
OF_DISKS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.EFBIG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    errno.ELOOP,
)
# RecursionError: of JSON whose brackets are nested by the thousand.
UNREADABLE = (OSError, ValueError, RecursionError)


class Error(Exception):
    """One clear error: "<what> (at <where>). Fix: <fix>".

    The commands show it without a traceback, unless --debug is set. Then they end with `exit_code`.
    """

    exit_code = 70

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        super().__init__(f"{what} (at {where}). Fix: {fix}" if where else what)
        self.what, self.where, self.fix = what, where, fix


class ConfigError(Error, ValueError):
    """A wrong config, flag or combination, which another start would not cure."""

    exit_code = 78


class DataError(Error, ValueError):
    """Bad data, weights or checkpoints."""

    exit_code = 65


class StorageError(Error, OSError):
    """A disk that is full, read-only or failing."""

    exit_code = 74


@contextlib.contextmanager
def of_storage(where):
    """Turns an OSError of the disk within the body into a StorageError.

    where: the path that the error names where the OSError names none.
    """
    try:
        yield
    except Error:
        raise
    except OSError as e:
        # An OSError may also come from a socket. Advice about disks would mislead there.
        if e.errno not in OF_DISKS:
            raise
        raise StorageError(
            e.strerror, where=str(e.filename or where), fix="make room or choose another place"
        ) from e


@contextlib.contextmanager
def explained(kind: type[Error], what: str, *, where, fix: str, of=UNREADABLE, say=None):
    """Turns exceptions within the body into one error of `kind`: "what: reason". Ours pass.

    of: the kinds of exceptions, by default those of files that cannot be read or parsed.
    say: exception -> its reason, by default `reason`.
    """
    try:
        yield
    except Error:  # also an OSError or a ValueError, and says more
        raise
    except of as e:
        raise kind(f"{what}: {(say or reason)(e)}", where=str(where), fix=fix) from e


class NonFiniteError(Error, ArithmeticError):
    """Too many steps with a non-finite loss, gradient or update. `step` is the first of them."""

    exit_code = 76
    step = None
    ADVICE = (
        "the checkpoints hold finite values, but the newest may be at fault already: let the run "
        "go back to an earlier one (a larger --config.rollbacks), lower the learning rate, or clip "
        "the gradient (config.optim.<net>.clip)"
    )


class DivergedError(NonFiniteError):
    """A metric went beyond its limit in config.watch."""


class OwnerError(Error):
    """Another process owns the workdir."""

    exit_code = 77


class Preempted(Error):
    """Stopped by a signal. Everything is saved, and another start goes on."""

    exit_code = 75


def check_local(path, where: str) -> None:
    """Raises ConfigError for an address such as gs://bucket/run.

    pathlib would take it for a folder called "gs:" and write there without a word.
    """
    # One slash is enough: a Path has lost the second. A drive of Windows has one letter only.
    if scheme := re.match(r"([a-z][a-z0-9+.-]+):/", str(path), re.IGNORECASE):
        raise ConfigError(
            f"{str(path)!r} lies in no file system: {scheme[1]}:// is not supported",
            where=where,
            fix="mount it, or copy it, and give the local path",
        )


def nearest(name: str, known, else_say: str = "") -> str:
    """A hint for a misspelt name: "did you mean 'x'?", or all names where none is near.

    known: the names that exist.   else_say: the hint in place of all names.
    """
    import difflib

    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return else_say or (f"choose one of {known}" if known else "there is none to choose")


def unknown(kind: str, name, known, *, where: str, say: str = "unknown") -> ConfigError:
    """The error for a name that is none of `known`. Its fix is the hint of `nearest`.

    kind: the kind of name, such as "sampler".   say: what stands before it.
    """
    return ConfigError(f"{say} {kind} {name!r}", where=where, fix=nearest(name, known))


def check_known(kind: str, name, known, *, where: str, say: str = "unknown") -> None:
    """Raises `unknown` for a name that is none of `known`."""
    if name not in known:
        raise unknown(kind, name, known, where=where, say=say)


def misfit(what: str, fix: str = "use the config.json that was saved with the weights"):
    """The ConfigError for a pretrained checkpoint's config.json, whose path its opener puts in."""
    return ConfigError(what, where="config.json", fix=fix)


def misused(what: str, fix: str) -> ConfigError:
    """The error for flags and arguments that do not go together, or for one that is missing."""
    return ConfigError(what, where="the command line", fix=fix)


def named(e: BaseException) -> str:
    """The type of an error and the first line of its text."""
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:500]}"


def place(e: Exception) -> str:
    """The file and line where an error arose, the last ones that are no library's."""
    # A family's file may lie in the package, which may itself be installed among the libraries.
    ours = os.path.dirname(__file__)
    libraries = (*sysconfig.get_paths().values(), os.path.dirname(os.__file__), "<")
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if f.filename.startswith(ours) or not f.filename.startswith(libraries)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def reason(e: Exception) -> str:
    """The text of an error, without the number and the path that Python adds to an OSError."""
    return getattr(e, "strerror", None) or (str(e).splitlines() or [type(e).__name__])[0][:300]
