"""Logging of a run: our own messages and all warnings, on the screen and in log.txt."""

import contextlib
import logging as std_logging
import pathlib
import sys

import tqdm
from absl import logging

from t2i_jax import errors

PACKAGE = f"{pathlib.Path(__file__).parent.parent}/"
CHATTY = ("/orbax/", "/jax/_src/")  # libraries whose messages below a warning are not shown


def of_interest(record) -> bool:
    """Whether a log record is shown: one of ours, or a warning of anybody."""
    # Failed tasks of Orbax. The code that waits for them gets the same error as an exception.
    if "/asyncio/" in record.pathname:
        return False
    chatty = any(part in record.pathname for part in CHATTY)
    if chatty:  # their warnings lose the traceback, which would bury our own message
        record.exc_info = record.exc_text = None
    return record.levelno > std_logging.INFO or not chatty


@contextlib.contextmanager
def told():
    """Shows our messages on the screen and in log.txt within the body, whatever absl is set to.

    In a notebook or a plain script absl itself shows warnings only. Handlers that the caller has
    set up stay as they are.
    """
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    # A second handler would show every line twice, so there is one only where there is none yet.
    screen = None if logger.hasHandlers() else _Screen(sys.stderr)
    # The numbers of absl grow with the detail: a warning is −1, INFO 0, DEBUG 1.
    logging.set_verbosity(max(verbosity, logging.INFO))
    logger.addFilter(of_interest)
    if screen:
        screen.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(screen)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logger.removeFilter(of_interest)
        if screen:
            logger.removeHandler(screen)
        close()


def open(path: pathlib.Path) -> None:
    """Sends our messages to a file, too, in place of an earlier file.

    Raises:
      StorageError: the file cannot be opened.
    """
    close()
    with errors.of_storage(path):
        handler = _File(path)
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(_ours)
    logging.get_absl_logger().addHandler(handler)


def close() -> None:
    """Closes the file of the last `open`, if there is one."""
    logger = logging.get_absl_logger()
    for old in [h for h in logger.handlers if isinstance(h, _File)]:
        logger.removeHandler(old)
        # Lines that a full disk refuses fail once more here. `handleError` has told of them.
        with contextlib.suppress(OSError):
            old.close()


def note(text: str) -> None:
    """Writes a line to the file alone. The progress bar shows the same on the screen."""
    # Past the logger itself, whose other handlers would show the line a second time.
    logger = logging.get_absl_logger()
    record = logger.makeRecord(logger.name, std_logging.INFO, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, _File):
            handler.handle(record)


def _ours(record) -> bool:
    return record.pathname.startswith(PACKAGE)


class _Screen(std_logging.StreamHandler):
    """Writes lines above the progress bar, not into it."""

    def emit(self, record):
        with tqdm.tqdm.external_write_mode(self.stream):
            super().emit(record)


class _File(std_logging.FileHandler):
    """A log file. A full disk gives one warning, and the training goes on."""

    told = False

    def handleError(self, record):
        e = sys.exc_info()[1]
        if not isinstance(e, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True  # before the warning: its own write to this file fails and comes here
            logging.warning("cannot write %s: %s", self.baseFilename, e.strerror)
