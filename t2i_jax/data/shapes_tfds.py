"""Coloured shapes as a TFDS data set, with the same examples as `data.shapes`.

shapes_tfds.Shapes(config="res64", file_format="array_record").download_and_prepare()
config.data = dict(source="tfds", name="shapes/res64")
"""

import dataclasses
import io

import tensorflow_datasets as tfds
from PIL import Image

from t2i_jax.data import shapes


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """res, size and seed as in `shapes.make`. A size of None is the full size of each split."""

    res: int = 32
    size: int | None = None
    seed: int = 0


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Every split of the shapes, as PNG files and captions. It needs no download."""

    VERSION = tfds.core.Version(f"{shapes.VERSION}.0.0")
    BUILDER_CONFIGS = tuple(Config(name=f"res{res}", res=res) for res in (32, 64, 128))
    code_path = None  # TFDS would look it up with importlib_resources, which may be missing

    def _info(self):
        res = self.builder_config.res
        return tfds.core.DatasetInfo(
            builder=self,
            description="Coloured shapes with captions in which every word can be checked.",
            license="Apache-2.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(res, res, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in shapes.SPLITS}

    def _generate_examples(self, split):
        config = self.builder_config
        source = shapes.make(split=split, res=config.res, size=config.size, seed=config.seed)
        for index, example in enumerate(source):
            png = io.BytesIO()  # a finished file: TFDS needs TensorFlow to encode an array
            Image.fromarray(example["image"]).save(png, "PNG")
            png.seek(0)
            yield index, {"image": png, "caption": example["caption"]}
