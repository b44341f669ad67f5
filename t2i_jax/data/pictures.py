"""Pictures of any origin in a folder, at their own sizes, to be judged; captions where there are.

H W pixels · C channels
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from absl import logging

from t2i_jax import errors, images
from t2i_jax.data import folder, transforms


class Pictures:
    """The PNG, JPEG and WebP files of a folder in the order of their names.

    Captions are looked for as by `data.folder`, else in the prompts that our PNG files hold. Files
    that are no whole picture are left out, counted in `broken`, and named in a warning.
    """

    def __init__(self, path):
        self._root, sizes, self._names = folder.scan(path)
        self._captions = self._found_captions(sizes)
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    @property
    def captions(self) -> dict[str, str | None]:
        """Picture -> its caption; None where it has none, or an empty one."""
        return dict(zip(self._names, self._captions, strict=True))

    @property
    def captioned(self) -> bool:
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
            digest.update(row.encode(errors="surrogatepass"))  # names need not be UTF-8
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[list[np.ndarray], list[str] | None]]:
        """(uint8 pictures HWC, their captions or None) of all whole files.

        Raises:
          DataError: not one file is a whole picture.
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
        if len(self.broken) == len(self._names):
            raise errors.DataError(
                f"none of {len(self._names)} files is a whole picture",
                where=str(self._root),
                fix=f"the first: {next(iter(self.broken.values()))}",
            )

    def _found_captions(self, sizes) -> list[str | None]:
        beside = any(not name.lower().endswith(folder.PICTURES) for name in sizes)
        try:
            pairs = folder.captioned(self._root, sizes, self._names, warn=False) if beside else []
        except errors.DataError as e:
            if "no captions" not in e.what:
                raise
            pairs = []
        found = dict(pairs)
        return [found.get(name) or self._prompt(name) for name in self._names]

    def _prompt(self, name: str) -> str | None:
        if not name.lower().endswith(".png"):
            return None
        try:
            metadata = images.read_metadata(self._root / name) or {}
        except (OSError, ValueError):
            return None
        prompt = metadata.get("prompt")
        return prompt if isinstance(prompt, str) else None
