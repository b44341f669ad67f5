"""How well an autoencoder keeps images that training never shows, and how it uses its codes.

B images · H W pixels · C channels · K codes
"""

import itertools

import numpy as np

from t2i_jax import errors, fields, images, plugins
from t2i_jax.data import loader
from t2i_jax.models import quantise
from t2i_jax.quality import extractor as networks
from t2i_jax.quality import pixels, statistics

WHERE = "evaluator reconstruction"
PIXELS = ("psnr", "ssim", "psnr_objects", "num_images")
CODES = ("usage", "perplexity")
SHOWN = 16  # images of the grid, at most
# In dB, of the mean error 1/12 that rounding to whole numbers makes. Equal images would be inf.
BEST = 10 * np.log10(12 * 255**2)


def make(
    predict,
    *,
    data,
    num_images: fields.Size = 256,
    batch_size: fields.Size = 64,
    extractor: str = "",
    perceptual: str = "",
):
    """The evaluator of reconstructions.

    Args:
      predict: name -> host function. "batch" makes a batch, "reconstruct" gives its images again,
        and "code_shares", where there are codes, the share of each of them.
      data: options of a source, such as {"source": "shapes", "split": "test"}. By default the split
        "test" of the training data.
      num_images: how many images are tried, from the first. Broken ones are left out.
      batch_size: images at once.
      extractor: an image network in whose pooled features images are compared, such as "inception"
        or the folder of a CLIP checkpoint.
      perceptual: "lpips", or a folder with that network.
    Returns:
      run(nets, step) -> a function that gives these metrics, means over images:

        - "psnr" in dB and "ssim", see `quality.pixels`.
        - "psnr_objects": the PSNR of the pixels that are not of the image's median colour, which is
          the ground of drawings. NaN where there are none.
        - "usage": the share of the codes that some place of the images has.
        - "perplexity": e to the entropy of the codes; K where all are used alike.
        - "fd": the Fréchet distance of all images from all reconstructions in the extractor's
          features. Few images make it larger, so compare numbers of as many.
        - "lpips": the mean LPIPS distance (arXiv:1801.03924).
        - "num_images".
        - "grid": uint8 images, each above its reconstruction.
    Raises:
      ConfigError: the family lacks the prediction, a network is not there, or there are no images
        (for the extractor: fewer than two).
      DataError: all images are broken. `run` raises it.
    """
    errors.check_known("prediction", "reconstruct", predict, where=WHERE, say="the family has no")
    source = plugins.source(data, where=WHERE)
    num_images = min(num_images, len(source))
    if not num_images:
        raise errors.ConfigError("there are no pictures", where=WHERE, fix="give another data")
    if extractor and num_images < 2:
        raise errors.ConfigError(
            "one picture has no Fréchet distance", where=WHERE, fix="give more, or no extractor"
        )
    compare = {}  # metric -> host function of images and their reconstructions
    if extractor:
        features = networks.Extractor(extractor)
        pooled = lambda x_NHWC: features(x_NHWC, ["pooled"])["pooled"].astype(np.float64)
        gaussian = lambda x_NHWC: statistics.of(pooled(x_NHWC))
        compare["fd"] = lambda x, y: statistics.frechet(gaussian(x), gaussian(y))
    if perceptual:
        distance = networks.Perceptual(perceptual).distance
        compare["lpips"] = lambda x, y: distance(x, y).mean()

    def run(nets, step):
        whole, again, share_BK = [], [], []
        for batch, number in batches(predict, source, num_images, batch_size):
            whole.append(images.to_uint8(batch["image"])[:number])
            again.append(images.to_uint8(np.asarray(predict["reconstruct"](nets, batch)))[:number])
            if "code_shares" in predict:
                share_BK.append(number * np.asarray(predict["code_shares"](nets, batch)))
        if not whole:
            raise errors.DataError(
                f"all of {num_images} held-out pictures are broken",
                where=WHERE,
                fix="mend them, or give another data",
            )
        whole, again = np.concatenate(whole), np.concatenate(again)
        # Networks need all processes, and of what is returned the first alone has need.
        found = {name: float(fn(whole, again)) for name, fn in compare.items()}
        return lambda: measured(whole, again, share_BK) | found

    run.names = PIXELS + (CODES if "code_shares" in predict else ()) + (*compare,)
    return run


def batches(predict, source, num_images: int, batch_size: int):
    """(batch, how many images of it count). Others have the weight 0: another size would compile
    again.
    """
    size = min(batch_size, num_images)
    examples = (example["image"] for _, example in loader.sound(source, range(num_images)))
    while some := [*itertools.islice(examples, size)]:
        filled = [some[i % len(some)] for i in range(size)]
        batch = predict["batch"](filled, None)
        batch["weight"] = (np.arange(size) < len(some)).astype(np.float32)
        yield batch, len(some)


def measured(whole_BHWC, again_BHWC, share_BK=()) -> dict:
    """The metrics of `make`, of uint8 images and their reconstructions.

    share_BK: of each batch, the codes' shares times the batch's number of images; none without
      codes.
    """
    psnr_B = np.minimum(pixels.psnr(whole_BHWC, again_BHWC), BEST)
    objects_B = psnr_of_objects(whole_BHWC, again_BHWC)
    found = {
        "psnr": float(psnr_B.mean()),
        "ssim": float(pixels.ssim(whole_BHWC, again_BHWC).mean()),
        "psnr_objects": float(np.mean(objects_B)) if len(objects_B) else float("nan"),
        "num_images": float(len(whole_BHWC)),
    }
    if len(share_BK):
        share_K = np.sum(share_BK, 0) / len(whole_BHWC)
        found["usage"] = float((share_K > 0).mean())
        found["perplexity"] = float(np.exp(quantise.entropy(share_K)))
    pairs_BHWC = np.concatenate([whole_BHWC, again_BHWC], axis=1)
    return found | {"grid": pairs_BHWC[:SHOWN]}


def psnr_of_objects(whole_BHWC, again_BHWC) -> np.ndarray:
    """PSNR in dB over the pixels of objects, of the images that have any.   -> float64

    A pixel is an object's if any channel differs from the image's median.
    """
    ground_B11C = np.median(whole_BHWC, axis=(1, 2), keepdims=True)
    object_BHW = (whole_BHWC != ground_B11C).any(-1)
    error_BHW = np.square(whole_BHWC.astype(float) - again_BHWC).mean(-1)
    some = object_BHW.any((1, 2))
    error_B = (error_BHW * object_BHW).sum((1, 2))[some] / object_BHW.sum((1, 2))[some]
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(255**2 / error_B), BEST)
