"""Reading of small text files from any origin."""

import functools
import os

LIMIT = 2**27  # bytes of a file that is read at once, such as a tokenizer's


def read_text(path, *, limit: int = LIMIT) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
      limit: bytes of the largest file.
    Raises:
      OSError: the file does not exist, is a folder, or cannot be read.
      ValueError: it is larger than `limit`, or in another encoding.
    """
    # Its size is not asked first: that of a pipe or of a file in /proc is 0.
    with open(path, "rb") as file:
        # The byte beyond the limit tells that there are more, without reading them all.
        data = file.read(limit + 1)
    if len(data) > limit:
        size = max(os.path.getsize(path), len(data))  # of a pipe, what was read
        raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
    return data.decode("utf-8-sig")


def remembered(read):
    """`read(folder, *args)` with a cache. It reads again only if a file in the folder has changed.

    Callers share the result and must not change it.
    """
    cached = functools.lru_cache(maxsize=32)(lambda folder, args, version: read(folder, *args))

    @functools.wraps(read)
    def again(folder, *args):
        stats = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
        # The inode tells of a file that was replaced by one as long, within a tick of the clock.
        version = sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)
        return cached(folder, args, tuple(version))

    return again
