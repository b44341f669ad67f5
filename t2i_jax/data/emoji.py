"""Named drawings in five styles, built on this machine at first use: emoji of licences that allow
a model of them to be given away.

MIT, Apache-2.0 and CC BY 4.0; `emoji_tfds.CREDITS` names the authors.
"""

import importlib.util
import zlib

from absl import logging

from t2i_jax import errors, fields
from t2i_jax.data import emoji_tfds, shapes, tfds, transforms

# Of a drawing's captions. Where there is a colour, the background has it; else it is white.
WORDINGS = (
    "{thing}, {style} style",
    "{style} style {thing}",
    "a drawing of {thing} in {style} style",
    "{thing}, {style} style, on a {colour} background",
)
COLOURS = tuple(shapes.COLOURS)


class Source(tfds.Source):
    """Every drawing under several captions, which follow each other."""

    def __init__(self, builder, *, split: str, res, captions: int):
        super().__init__(
            builder, split=split, res=res, image_key="image", caption_key="thing", captions=captions
        )
        self.fingerprint += f"-{zlib.crc32(repr(WORDINGS).encode()):08x}"

    def __getitem__(self, index: int) -> dict:
        image, caption, colour = self._drawing(index)
        # Large sides keep what is fine. The loader reduces them to `res`.
        background = shapes.COLOURS.get(colour, "white")
        image_HWC, scale = transforms.decode_scaled(image, max(self._size), background)
        return {"image": image_HWC, "caption": caption, "scale": scale}

    def _read(self, index: int) -> tuple[bytes, str]:
        return self._drawing(index)[:2]

    def _drawing(self, index: int) -> tuple[bytes, str, str]:
        """A drawing, its caption, and the name of the background's colour or ""."""
        image, thing = super()._read(index)
        record, which = divmod(index, self._captions)
        style = self._records[record]["style"].decode()
        wording = WORDINGS[which]
        # The same background in every epoch and on every machine.
        choice = COLOURS[zlib.crc32(f"{thing}/{style}".encode()) % len(COLOURS)]
        colour = choice if "{colour}" in wording else ""
        return image, wording.format(thing=thing, style=style, colour=choice), colour


def make(
    *,
    split: str = "train",
    res: int | tuple[int, int] = 64,
    captions: fields.Size = len(WORDINGS),
    data_dir: str | None = None,
    icons: str = "",
) -> Source:
    """The drawings and their names, such as "red apple, noto style".

    Args:
      split: "train" or "test". "test" has pairs of a thing and a style; training has the thing in
        at least two other styles.
      res: pixels a side of the final squares.
      captions: of each drawing, the first of WORDINGS; with 1 all backgrounds are white.
      data_dir: the folder of TFDS's data, by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      icons: a folder with the packages, each as `<name>/icons.json` or below node_modules; by
        default npm fetches them. It is read when the data set is built.
    Raises:
      ConfigError: more captions than there are wordings.
      DataError: it is not built yet, and what to build it from is missing.
    """
    if not 1 <= captions <= len(WORDINGS):
        raise errors.ConfigError(
            f"captions is {captions}", where="config.data.captions", fix=f"use 1 … {len(WORDINGS)}"
        )
    builder = emoji_tfds.Emoji(icons=icons, data_dir=data_dir, file_format="array_record")
    if not builder.data_path.exists():
        if not importlib.util.find_spec("resvg_py"):
            raise errors.DataError(
                "package missing: resvg_py",
                where="data source emoji",
                fix="pip install -e '.[emoji]'",
            )
        logging.info("building the drawings in %s, once, in some minutes", builder.data_dir)
        builder.download_and_prepare()
    return Source(builder, split=split, res=res, captions=captions)
