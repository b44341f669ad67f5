"""What a run tells: our own messages and everybody's warnings, on the screen and in log.txt."""

import contextlib
import logging as std_logging
import pathlib
import sys

import tqdm
from absl import logging

from t2i_jax import errors

PACKAGE = f"{pathlib.Path(__file__).parent.parent}/"
CHATTY = ("/orbax/", "/jax/_src/")  # whose remarks are not for a user


def of_interest(record) -> bool:
    """Whether a record is one of ours, or a warning."""
    if "/asyncio/" in record.pathname:  # of Orbax's tasks; whoever waits for them learns it, too
        return False
    chatty = any(part in record.pathname for part in CHATTY)
    if chatty:
        record.exc_info = record.exc_text = None
    return record.levelno > std_logging.INFO or not chatty


@contextlib.contextmanager
def told():
    """Within the body our messages reach the screen and log.txt, whatever absl is set to.

    In a notebook or a plain script absl shows no more than warnings; handlers that somebody has
    set up stay as they are.
    """
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    screen = None if logger.hasHandlers() else _Screen(sys.stderr)
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
    """Sends what is told to a file, too, instead of the one before."""
    close()
    with errors.of_storage(path):
        handler = _File(path)
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(_ours)
    logging.get_absl_logger().addHandler(handler)


def close() -> None:
    """The file before is written no more."""
    logger = logging.get_absl_logger()
    for old in [h for h in logger.handlers if isinstance(h, _File)]:
        logger.removeHandler(old)
        with contextlib.suppress(OSError):
            old.close()


def note(text: str) -> None:
    """A line for the file alone, where the screen shows the same in another way."""
    logger = logging.get_absl_logger()
    record = logger.makeRecord(logger.name, std_logging.INFO, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, _File):
            handler.handle(record)


def _ours(record) -> bool:
    return record.pathname.startswith(PACKAGE)


class _Screen(std_logging.StreamHandler):
    """Lines above a progress bar."""

    def emit(self, record):
        with tqdm.tqdm.external_write_mode(self.stream):
            super().emit(record)


class _File(std_logging.FileHandler):
    """A file whose disk may be full: told once, and the training goes on."""

    told = False

    def handleError(self, record):
        e = sys.exc_info()[1]
        if not isinstance(e, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True  # before the warning, which comes here, too
            logging.warning("cannot write %s: %s", self.baseFilename, e.strerror)
