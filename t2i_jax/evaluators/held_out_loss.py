"""The training loss of pictures that training never shows, by a prediction of the family.

T values of a prediction, such as losses at fixed times
"""

import numpy as np

from t2i_jax import errors, plugins

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
      data: a source's options, such as {"source": "shapes", "split": "test"}.
      num_images: its first ones; whole batches are used alone.
      batch_size: pictures at once.
      seed: of the noise.
    Returns:
      run(nets, step) -> a function that gives "0" … "T − 1", and "mean" of them.
    Raises:
      ConfigError: the family lacks the prediction, or there are no pictures.
    """
    if prediction not in predict:
        raise errors.ConfigError(
            f"the family has no prediction {prediction!r}",
            where="evaluator held_out_loss",
            fix=errors.nearest(prediction, predict),
        )
    options = dict(data)
    module = plugins.load("data", options.pop("source", ""))
    source = plugins.call(module.make, where="evaluator held_out_loss", options=options)
    num_images = min(num_images, len(source))
    if not num_images:
        raise errors.ConfigError(
            "there are no pictures", where="evaluator held_out_loss", fix="give another data"
        )
    batch_size = min(batch_size, num_images)
    count = num_images // batch_size

    def run(nets, step):
        values = []
        for number in range(count):
            records = range(number * batch_size, (number + 1) * batch_size)
            examples = [source[record] for record in records]
            batch = predict["batch"](
                [e["image"] for e in examples], [e["caption"] for e in examples]
            )
            batch["index"] += number * batch_size
            values.append(predict[prediction](nets, batch, seed=seed))
        return lambda: _named(np.mean(np.asarray(values, np.float64), 0))

    return run


def _named(value_T) -> dict[str, float]:
    return {**{str(i): float(v) for i, v in enumerate(value_T)}, "mean": float(value_T.mean())}
