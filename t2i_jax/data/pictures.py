"""Images of any origin in a folder, at their own sizes, for evaluation. Captions are optional.

H W pixels · C channels
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from absl import logging

from t2i_jax import errors
from t2i_jax.data import folder, transforms


class Pictures:
    """The PNG, JPEG and WebP files of a folder, in the order of their names.

    Captions come from where `data.folder` finds them. A broken image is left out, and a warning
    names it.

    Attributes:
      broken: name -> reason, of the broken images that `batches` has met.
    Raises:
      DataError, StorageError: as of `data.folder.scan`.
    """

    def __init__(self, path):
        self._root, sizes, self._names = folder.scan(path)
        self._captions = self._read_captions(sizes)
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    @property
    def captions(self) -> dict[str, str | None]:
        """Image -> its caption; None where it has none, or an empty one."""
        return dict(zip(self._names, self._captions, strict=True))

    @property
    def captioned(self) -> bool:
        """Whether every image has a caption."""
        return None not in self._captions

    @property
    def fingerprint(self) -> str:
        """A hash of all files and captions."""
        digest = hashlib.sha256()
        for name, caption in zip(self._names, self._captions, strict=True):
            try:
                content = hashlib.sha256((self._root / name).read_bytes()).hexdigest()
            except OSError as e:  # `batches` counts it as broken
                content = type(e).__name__
            row = f"{name} {content} {caption}\n"
            digest.update(row.encode(errors="surrogatepass"))  # a file name may not be UTF-8
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[list[np.ndarray], list[str] | None]]:
        """Yields (uint8 images HWC, their captions or None) of all images that are not broken.

        Captions are None unless every image has one.

        Args:
          size: images of a batch. The last batch may have fewer.
        Raises:
          DataError: all images are broken.
        """
        pictures, captions = [], []
        for name, caption in zip(self._names, self._captions, strict=True):
            try:
                pictures.append(transforms.decode((self._root / name).read_bytes()))
                captions.append(caption)
            except (transforms.BadExample, OSError) as e:
                self.broken[name] = str(e)
                logging.warning("%s is left out: %s", folder.printable(name), e)
            if len(pictures) == size:
                yield pictures, captions if self.captioned else None
                pictures, captions = [], []
        if pictures:
            yield pictures, captions if self.captioned else None
        # After the last batch, as only then all files have been tried.
        if len(self.broken) == len(self._names):
            raise errors.DataError(
                f"none of {len(self._names)} files is a whole picture",
                where=str(self._root),
                fix=f"the first: {next(iter(self.broken.values()))}",
            )

    def _read_captions(self, sizes) -> list[str | None]:
        try:
            pairs = folder.captioned(self._root, sizes, self._names, warn=False)
        except errors.DataError as e:
            if "no captions" not in e.what:  # a broken metadata file must not pass for none
                raise
            pairs = []
        captions = dict(pairs)
        texts = {name: text for name, text in captions.items() if isinstance(text, str)}
        return [texts.get(name) or None for name in self._names]
