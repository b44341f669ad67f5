"""Which digit an image shows, judged by its nearest neighbours among real digits."""

import functools

import numpy as np
from PIL import Image

from t2i_jax import fields
from t2i_jax.data import digits
from t2i_jax.quality import pixels

NEIGHBOURS = 5
NAMES = ("accuracy", "distance", "diversity", "num_images")


def make(
    predict,
    *,
    num_images: fields.Size = 200,
    batch_size: fields.Size = 64,
    seed: fields.Seed = 0,
    sample=None,
):
    """The evaluator of digits. It draws every digit equally often.

    Args:
      predict: name -> host function; "sample" draws uint8 images for captions.
      num_images: in all.
      batch_size: images drawn together.
      seed: of the noise.
      sample: options of the sampler, by default the model's own.
    Returns:
      run(nets, step) -> a function that gives these metrics:

        - "accuracy": the share of images that show the digit of their caption.
        - "distance": the root mean square difference of 8 × 8 pixels from the nearest digit of the
          test split, as a share of full brightness.
        - "diversity" of the images of a caption, see `quality.pixels.diversity`.
        - "num_images".
    """
    labels_N = np.arange(num_images) % len(digits.NAMES)
    captions = [digits.caption(label) for label in labels_N]

    def run(nets, step):
        images = predict["sample"](
            nets, captions, seed=seed, batch_size=batch_size, **(sample or {})
        )
        return lambda: judged(images, labels_N)

    run.names = NAMES
    return run


def judged(images_NHWC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """The metrics of `make`, from uint8 images and the digits of their captions."""
    # The distance is that from the test digits, so that copies of training images are not at 0.
    small_NP = _small(images_NHWC)
    train, test = (_real(split, images_NHWC.shape[1]) for split in digits.SPLITS)
    distance_N1, _ = test.kneighbors(small_NP, 1)
    groups = [images_NHWC[labels_N == label] for label in np.unique(labels_N)]
    spread = [pixels.diversity(group[None]) for group in groups]
    return {
        "accuracy": float((train.predict(small_NP) == labels_N).mean()),
        "distance": float(np.sqrt(np.square(distance_N1).mean() / small_NP.shape[1])),
        "diversity": float(np.mean(spread)),
        "num_images": float(len(labels_N)),
    }


def _small(images_NHWC) -> np.ndarray:
    """The images at the size of the data, 8 × 8.   -> (N, 64) in 0 … 1"""
    size = (digits.SIDE, digits.SIDE)
    resized = lambda image: image.convert("L").resize(size, Image.Resampling.BOX)
    small_NHW = np.stack([resized(Image.fromarray(image_HWC)) for image_HWC in images_NHWC])
    return small_NHW.reshape(len(small_NHW), -1) / np.float32(255)


@functools.cache
def _real(split: str, res: int):
    """The search for neighbours among the digits of a split.

    The real digits are enlarged and reduced in the same way as drawn ones.
    """
    from sklearn import neighbors

    source = digits.make(split=split, res=res)
    _, labels_N = digits.read(split)
    points_NP = _small([source[i]["image"] for i in range(len(source))])
    return neighbors.KNeighborsClassifier(NEIGHBOURS).fit(points_NP, labels_N)
