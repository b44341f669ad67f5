"""Small files of text, whoever wrote them: read whole, or a clear reason why not."""

import os

LIMIT = 2**27  # bytes of a file that is read at once, such as a tokenizer's


def read_text(path, *, limit: int = LIMIT) -> str:
    """The text of a file in UTF-8, without a byte order mark. No more is read than `limit` bytes.

    Raises:
      OSError: it is not there, is a folder, or cannot be read.
      ValueError: it is larger, or in another encoding.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        size = max(os.path.getsize(path), len(data))  # of a pipe, what was read
        raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
    return data.decode("utf-8-sig")
