"""Features of images of any size, batch by batch, over all devices.

N images · H W pixels · C channels · D features · K classes
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t2i_jax import errors
from t2i_jax.data import transforms
from t2i_jax.models.types import Features
from t2i_jax.pretrained import hf, opener, text_encoder
from t2i_jax.quality import resize
from t2i_jax.run import fingerprint

COLUMNS = {"pooled": "pooled_BD", "logits": "logits_BK", "spatial": "spatial_BD"}
BATCH = 32  # images for a device at once


class Extractor:
    """An image network with its weights, and the rule by which images are resized for it.

    Args:
      source: the network, as for `pretrained.opener.open`.
      rule: one of `resize.RULES`.
    Attributes:
      label: the network's name in results. What `convert` makes of published files has their name,
        wherever it lies. Other weights in a folder of that name have a part of their hash behind.
      width: of pooled features.
      fingerprint: of weights, sizes and rule. Stored features are valid for equal ones alone.
    """

    def __init__(self, source: str, rule: str = "clean"):
        resize.check(rule)
        self._rule = rule
        module, variables = _opened(source)
        self._module = module
        # Flax spreads the text of a module, which holds all its fields, over several lines.
        sizes, digest = " ".join(repr(module).split()), fingerprint.digest(variables)
        self.fingerprint = f"{digest[:32]}:{sizes}:{rule}"
        self.label = _label(source, digest)
        # The maps are megabytes for each image, and no metric reads them.
        columns = lambda *args: module.apply(*args)._replace(maps=())
        image = jax.ShapeDtypeStruct((1, module.res, module.res, 3), "float32")
        self.width = jax.eval_shape(columns, variables, image).pooled_BD.shape[-1]
        self._apply = _Apply(columns, variables)

    def __call__(self, pictures, wanted) -> dict[str, np.ndarray]:
        """The wanted features of images. They are the same on every process.

        Args:
          pictures: uint8 images HWC, the same on every process.
          wanted: names of COLUMNS.
        Returns:
          Name -> float32 ND, or NK for "logits".
        Raises:
          ConfigError: the network has no such features.
        """
        squares = [resize.resize(p, self._module.res, self._rule) for p in pictures]
        outputs = self._apply(np.stack(squares) / np.float32(127.5) - 1)
        columns = {name: getattr(outputs, COLUMNS[name]) for name in wanted}
        for name, value in columns.items():
            if value is None:
                raise errors.ConfigError(
                    f"{self.label} gives no {name} features",
                    where="extractor",
                    fix="use another extractor, or leave out the metrics of these",
                )
        return columns


class DualEncoder:
    """The two towers of a CLIP checkpoint: images and captions to embeddings in one space."""

    def __init__(self, source: str, rule: str = "clean"):
        self._image = Extractor(source, rule)
        self.label, self.fingerprint = self._image.label, self._image.fingerprint
        module = text_encoder.make(source)
        self._tokenizer = text_encoder.tokenizer(source, module.positions)
        tokens = [jax.ShapeDtypeStruct((1, module.positions), t) for t in ("int32", "bool")]
        shapes = jax.eval_shape(module.init, jax.random.key(0), *tokens)
        pooled = lambda *args: module.apply(*args).pooled_BD
        texts = jax.eval_shape(pooled, shapes, *tokens).shape[-1]
        if texts != self._image.width:
            raise errors.ConfigError(
                f"its text tower gives vectors of {texts} numbers, its image tower of "
                f"{self._image.width}",
                where=source,
                fix="use a dual encoder, whose towers project into one space",
            )
        self._text = _Apply(pooled, opener.load(source, shapes))

    def images(self, pictures) -> np.ndarray:
        """Embeddings of uint8 images HWC, of any length.   -> float32 ND"""
        return self._image(pictures, ["pooled"])["pooled"]

    def texts(self, captions) -> np.ndarray:
        """Embeddings of captions, of any length.   -> float32 ND"""
        return self._text(*self._tokenizer(captions)[0])


class Perceptual:
    """LPIPS of uint8 images at their own size (Zhang et al. 2018, arXiv:1801.03924)."""

    label = "lpips"

    def __init__(self, source: str = "lpips"):
        module, variables = _opened(source)
        self.fingerprint = fingerprint.digest(variables)
        distance = lambda v, x, y: module.apply(v, x, y, method="distance")
        diversity = lambda v, x: jax.vmap(lambda g: module.apply(v, g, method="diversity"))(x)
        self._distance = _Apply(distance, variables, batch=8)
        self._diversity = _Apply(diversity, variables, batch=4)

    def distance(self, x_NHWC, y_NHWC) -> np.ndarray:
        """The distance of every image from its partner.   -> float32 N"""
        return self._distance(transforms.to_float(x_NHWC), transforms.to_float(y_NHWC))

    def diversity(self, x_GNHWC) -> np.ndarray:
        """The mean distance of all pairs within each of G groups of N images.   -> float32 G"""
        return self._diversity(transforms.to_float(x_GNHWC))


def _label(source: str, digest: str) -> str:
    """The name of a network whose variables have this digest."""
    checkpoint, name = opener.open(source), source.rstrip("/").rpartition("/")[2].partition("@")[0]
    if published := hf.published(checkpoint.folder, checkpoint.config):
        return published
    return f"{name}-{digest.rpartition(':')[2][:8]}" if name in hf.CONVERTED else name


def _opened(source: str):
    """The image network of a source, and its variables."""
    checkpoint = opener.open(source)
    module = checkpoint.module(Features)
    image = jax.ShapeDtypeStruct((1, module.res, module.res, 3), "float32")
    return module, checkpoint.load(jax.eval_shape(module.init, jax.random.key(0), image))


class _Apply:
    """Applies `fn(variables, *arrays)` to N rows, split over processes and their devices."""

    def __init__(self, fn, variables, batch: int = BATCH):
        # A mesh of this process alone: its programs never wait for other processes.
        devices = np.array(jax.local_devices())
        mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        self._fn = jax.jit(fn, out_shardings=self._rows)
        self._size = batch * len(devices)

    def __call__(self, *arrays):
        # Every process computes equally many rows, as the gathering below wants equal shapes. The
        # rows beyond the last one repeat it, and are cut off at the end.
        processes, total = jax.process_count(), len(arrays[0])
        share = -(-total // processes)
        mine = np.arange(share) * processes + jax.process_index()
        parts = []
        for start in range(0, share, self._size):
            # Short batches are filled up: another shape would be another compilation.
            rows = np.resize(mine[start : start + self._size], self._size)
            placed = [jax.device_put(x[np.minimum(rows, total - 1)], self._rows) for x in arrays]
            part = jax.device_get(self._fn(self._variables, *placed))
            parts.append(jax.tree.map(lambda x, n=min(self._size, share - start): x[:n], part))
        outputs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        if processes > 1:
            outputs = jax.tree.map(_interleaved, multihost_utils.process_allgather(outputs))
        return jax.tree.map(lambda x: x[:total], outputs)


def _interleaved(x_PN):
    """All rows in order, where row i of process p is row i·P + p of all."""
    return np.swapaxes(x_PN, 0, 1).reshape(-1, *x_PN.shape[2:])
