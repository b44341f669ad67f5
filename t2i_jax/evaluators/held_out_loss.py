"""The training loss of pictures that training never shows, by a prediction of the family.

T values of a prediction, such as losses at fixed times
"""

import itertools

import numpy as np

from t2i_jax import errors, fields, plugins
from t2i_jax.data import loader

NAME = "loss_at_times"


def make(
    predict,
    *,
    data,
    prediction: str = NAME,
    num_images: int = 256,
    batch_size: int = 64,
    seed: int = 0,
):
    """The evaluator.

    Args:
      predict: name -> host function; `prediction` gives the mean losses (T,) of a batch, "batch"
        makes it.
      data: a source's options, such as {"source": "shapes", "split": "test"}; by default the
        training data's split "test".
      num_images: its first ones, without broken ones; whole batches are used alone.
      batch_size: pictures at once.
      seed: of the noise.
    Returns:
      run(nets, step) -> a function that gives "0" … "T − 1", and "mean" of them.
    Raises:
      ConfigError: the family lacks the prediction, or there are no pictures.
      DataError: all pictures are broken; raised by `run`.
    """
    if prediction not in predict:
        raise errors.ConfigError(
            f"the family has no prediction {prediction!r}",
            where="evaluator held_out_loss",
            fix=errors.nearest(prediction, predict),
        )
    options = dict(data)
    module = plugins.load("data", options.pop("source", ""))
    source = fields.build(module.make, options, where="evaluator held_out_loss")
    num_images = min(num_images, len(source))
    if not num_images:
        raise errors.ConfigError(
            "there are no pictures", where="evaluator held_out_loss", fix="give another data"
        )
    batch_size = min(batch_size, num_images)

    def run(nets, step):
        examples, values = loader.sound(source, range(num_images)), []
        while found := [example for _, example in itertools.islice(examples, batch_size)]:
            if values and len(found) < batch_size:
                break
            batch = predict["batch"]([e["image"] for e in found], [e["caption"] for e in found])
            batch["index"] += len(values) * batch_size
            values.append(predict[prediction](nets, batch, seed=seed))
        if not values:
            raise errors.DataError(
                f"all of {num_images} held-out pictures are broken",
                where="evaluator held_out_loss",
                fix="mend them, or give another data",
            )
        return lambda: _named(np.mean(np.asarray(values, np.float64), 0))

    return run


def _named(value_T) -> dict[str, float]:
    return {**{str(i): float(v) for i, v in enumerate(value_T)}, "mean": float(value_T.mean())}
