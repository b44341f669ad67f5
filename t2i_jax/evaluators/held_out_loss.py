"""The loss on images that training never shows, by a prediction of the family.

T values of the prediction, such as losses at fixed times
"""

import itertools
import re

import numpy as np

from t2i_jax import errors, fields, plugins
from t2i_jax.data import loader

NAME, WHERE = "loss_at_times", "evaluator held_out_loss"
NAMES = ("mean", re.compile("[0-9]+"))  # how many there are is the prediction's matter


def make(
    predict,
    *,
    data,
    prediction: str = NAME,
    num_images: fields.Size = 256,
    batch_size: fields.Size = 64,
    seed: fields.Seed = 0,
):
    """The evaluator of the held-out loss.

    Args:
      predict: name -> host function. "batch" makes a batch, and `prediction` gives its mean losses
        (T,).
      data: options of a source, such as {"source": "shapes", "split": "test"}. By default the split
        "test" of the training data.
      prediction: the name of the prediction.
      num_images: how many images are tried, from the first. Broken ones are left out, and an
        incomplete last batch as well.
      batch_size: images at once.
      seed: of the noise.
    Returns:
      run(nets, step) -> a function that gives the losses "0" … "T − 1" and their "mean".
    Raises:
      ConfigError: the family lacks the prediction, or there are no images.
      DataError: all images are broken. `run` raises it.
    """
    known = predict.keys() - {"batch"}  # it makes batches, and is no prediction
    errors.check_known("prediction", prediction, known, where=WHERE, say="the family has no")
    source = plugins.source(data, where=WHERE)
    num_images = min(num_images, len(source))
    if not num_images:
        raise errors.ConfigError("there are no pictures", where=WHERE, fix="give another data")
    batch_size = min(batch_size, num_images)

    def run(nets, step):
        examples, values = loader.sound(source, range(num_images)), []
        while some := [example for _, example in itertools.islice(examples, batch_size)]:
            # A shorter last batch would compile again, and its images would weigh more.
            if values and len(some) < batch_size:
                break
            given = {key: [e[key] for e in some] for key in ("image", "caption")}
            batch = predict["batch"](**given, scale=[e.get("scale", 1.0) for e in some])
            # The index decides about the noise, so each image has its own.
            batch["index"] += len(values) * batch_size
            values.append(predict[prediction](nets, batch, seed=seed))
        if not values:
            raise errors.DataError(
                f"all of {num_images} held-out pictures are broken",
                where=WHERE,
                fix="mend them, or give another data",
            )
        return lambda: _named(np.mean(np.asarray(values, np.float64), 0))

    run.names = NAMES
    return run


def _named(value_T) -> dict[str, float]:
    return {**{str(i): float(v) for i, v in enumerate(value_T)}, "mean": float(value_T.mean())}
