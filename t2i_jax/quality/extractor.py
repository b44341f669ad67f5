"""Features of pictures of any size, batch by batch, over all devices.

N pictures · H W pixels · C channels · D K features, classes
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t2i_jax import errors
from t2i_jax.data import transforms
from t2i_jax.models.types import Features
from t2i_jax.pretrained import opener, text_encoder
from t2i_jax.quality import resize
from t2i_jax.run import fingerprint

COLUMNS = {"pooled": "pooled_BD", "logits": "logits_BK", "spatial": "spatial_BD"}
BATCH = 32  # pictures a device takes at once


class Extractor:
    """An image network with its weights, and the rule by which pictures come to its side.

    label: what results call it. fingerprint: of weights, sizes and rule.
    """

    def __init__(self, source: str, rule: str = "clean"):
        resize.check(rule)
        self._rule = rule
        module, variables = _opened(source)
        self._module = module
        self.label = source.rstrip("/").rpartition("/")[2].partition("@")[0]
        sizes = " ".join(repr(module).split())
        self.fingerprint = f"{fingerprint.digest(variables)[:32]}:{sizes}:{rule}"
        columns = lambda *args: module.apply(*args)._replace(maps=())  # megabytes a picture
        self._apply = _Apply(columns, variables)

    def __call__(self, pictures, wanted) -> dict[str, np.ndarray]:
        """Columns, of COLUMNS, of uint8 pictures HWC: the same on every process.   -> ND, NK

        Raises:
          ConfigError: the network has no such thing.
        """
        squares = [resize.resize(p, self._module.res, self._rule) for p in pictures]
        found = self._apply(np.stack(squares) / np.float32(127.5) - 1)
        found = {name: getattr(found, COLUMNS[name]) for name in wanted}
        for name, value in found.items():
            if value is None:
                raise errors.ConfigError(
                    f"{self.label} gives no {name} features",
                    where="extractor",
                    fix="use another extractor, or leave out the metrics of these",
                )
        return found


class DualEncoder:
    """A CLIP checkpoint's two towers: pictures and captions to embeddings in one space."""

    def __init__(self, source: str, rule: str = "clean"):
        self._image = Extractor(source, rule)
        self.label, self.fingerprint = self._image.label, self._image.fingerprint
        module = text_encoder.make(source)
        self._tokenizer = text_encoder.tokenizer(source, module.positions)
        tokens = [jax.ShapeDtypeStruct((1, module.positions), t) for t in ("int32", "bool")]
        shapes = jax.eval_shape(module.init, jax.random.key(0), *tokens)
        pooled = lambda *args: module.apply(*args).pooled_BD
        self._text = _Apply(pooled, opener.load(source, shapes))

    def images(self, pictures) -> np.ndarray:
        """Embeddings of uint8 pictures HWC.   -> ND"""
        return self._image(pictures, ["pooled"])["pooled"]

    def texts(self, captions) -> np.ndarray:
        """Embeddings of captions.   -> ND"""
        return self._text(*self._tokenizer(captions)[0])


class Perceptual:
    """LPIPS of uint8 pictures, at their own size."""

    label = "lpips"

    def __init__(self, source: str = "lpips"):
        module, variables = _opened(source)
        self.fingerprint = fingerprint.digest(variables)
        distance = lambda v, x, y: module.apply(v, x, y, method="distance")
        diversity = lambda v, x: jax.vmap(lambda g: module.apply(v, g, method="diversity"))(x)
        self._distance = _Apply(distance, variables, batch=8)
        self._diversity = _Apply(diversity, variables, batch=4)

    def distance(self, x_NHWC, y_NHWC) -> np.ndarray:
        """Of every picture from its partner.   -> N"""
        return self._distance(transforms.to_float(x_NHWC), transforms.to_float(y_NHWC))

    def diversity(self, x_GNHWC) -> np.ndarray:
        """The mean distance of all pairs within each of G groups of N pictures.   -> G"""
        return self._diversity(transforms.to_float(x_GNHWC))


def _opened(source: str):
    """An image network and its variables."""
    checkpoint = opener.open(source)
    module = checkpoint.module(Features)
    image = jax.ShapeDtypeStruct((1, module.res, module.res, 3), "float32")
    return module, checkpoint.load(jax.eval_shape(module.init, jax.random.key(0), image))


class _Apply:
    """`fn(variables, *arrays)` of N rows: processes share them, and each its devices."""

    def __init__(self, fn, variables, batch: int = BATCH):
        devices = np.array(jax.local_devices())
        mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        self._fn = jax.jit(fn, out_shardings=self._rows)
        self._size = batch * len(devices)

    def __call__(self, *arrays):
        processes, total = jax.process_count(), len(arrays[0])
        share = -(-total // processes)
        mine = np.arange(share) * processes + jax.process_index()
        parts = []
        for start in range(0, share, self._size):
            rows = np.resize(mine[start : start + self._size], self._size)
            placed = [jax.device_put(x[np.minimum(rows, total - 1)], self._rows) for x in arrays]
            part = jax.device_get(self._fn(self._variables, *placed))
            parts.append(jax.tree.map(lambda x, n=min(self._size, share - start): x[:n], part))
        found = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        if processes > 1:
            found = jax.tree.map(_woven, multihost_utils.process_allgather(found))
        return jax.tree.map(lambda x: x[:total], found)


def _woven(x_PN):
    """Row i of process p is row i·P + p of all."""
    return np.swapaxes(x_PN, 0, 1).reshape(-1, *x_PN.shape[2:])
