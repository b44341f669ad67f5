"""Which digit a picture shows, as its nearest neighbours among the real ones say."""

import functools

import numpy as np
from PIL import Image

from t2i_jax.data import digits

NEIGHBOURS = 5


def make(predict, *, num_images: int = 200, batch_size: int = 64, seed: int = 0, sample=None):
    """The evaluator: draws every digit equally often.

    Args:
      predict: name -> host function; "sample" draws uint8 pictures for captions.
      num_images: in all.
      batch_size: pictures drawn together.
      seed: of the noise.
      sample: options for the sampler; the model's own by default.
    Returns:
      run(nets, step) -> a function that gives "accuracy", the share of pictures that show what
      their caption says; "distance", the root mean square of an 8 × 8 pixel's distance to the
      nearest real digit, of 1; "diversity", the mean standard deviation over pictures of one
      caption, of 1; and "num_images".
    """
    labels_N = np.arange(num_images) % len(digits.NAMES)
    captions = [digits.caption(label) for label in labels_N]

    def run(nets, step):
        images = predict["sample"](
            nets, captions, seed=seed, batch_size=batch_size, **(sample or {})
        )
        return lambda: judged(images, labels_N)

    return run


def judged(images_NHWC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """What `make` promises, of uint8 pictures."""
    small_NP = np.stack([_small(image) for image in images_NHWC])
    nearest = _real()
    distance_NK = nearest.kneighbors(small_NP)[0]
    spread = [small_NP[labels_N == label].std(0).mean() for label in np.unique(labels_N)]
    return {
        "accuracy": float((nearest.predict(small_NP) == labels_N).mean()),
        "distance": float(np.sqrt(np.square(distance_NK[:, 0]).mean() / small_NP.shape[1])),
        "diversity": float(np.mean(spread)),
        "num_images": float(len(labels_N)),
    }


def _small(image_HWC: np.ndarray) -> np.ndarray:
    """A picture as the data has them.   -> (64,) from 0 to 1"""
    grey = Image.fromarray(image_HWC).convert("L")
    size = (digits.SIDE, digits.SIDE)
    return np.asarray(grey.resize(size, Image.Resampling.BOX), np.float32).ravel() / 255


@functools.cache
def _real():
    from sklearn import neighbors

    images_NHW, labels_N = digits.read("train")
    points_NP = images_NHW.reshape(len(labels_N), -1) / digits.BRIGHTEST
    return neighbors.KNeighborsClassifier(NEIGHBOURS).fit(points_NP, labels_N)
