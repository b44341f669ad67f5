"""Retrieval of captions by images, and of images by captions, with a dual encoder.

N pairs · P embedding
"""

import numpy as np

from t2i_jax import errors, fields, plugins
from t2i_jax.data import loader
from t2i_jax.quality import retrieval

PLACES = (1, 5, 10)  # the k of recall at k
NAMES = tuple(f"{way}_at_{k}" for way in ("image_to_text", "text_to_image") for k in PLACES)
NAMES += ("r_precision", "num_images")


def make(
    predict,
    *,
    data,
    num_images: fields.Size = 1024,
    batch_size: fields.Size = 64,
    candidates: fields.Size = 64,
    seed: fields.Seed = 0,
):
    """The evaluator of retrieval.

    Args:
      predict: name -> host function. "batch" makes a batch, and "image_emb" and "text_emb" give its
        unit vectors BP.
      data: options of a source, such as {"source": "shapes", "split": "test"}. By default the split
        "test" of the training data.
      num_images: how many images are tried, from the first. Of several images with one caption the
        first is used. Only whole groups of `candidates` are used.
      batch_size: images at once.
      candidates: pairs in a group, within which recall is measured.
      seed: of R-precision's candidates, which are drawn from all captions.
    Returns:
      run(nets, step) -> a function that gives the recall "image_to_text_at_1", …_5, …_10 and the
      reverse, as means over groups; "r_precision" with as many candidates; and "num_images".
    Raises:
      ConfigError: the family lacks the predictions, or there are not enough captions.
    """
    where = "evaluator retrieval"
    for name in ("image_emb", "text_emb"):
        errors.check_known("prediction", name, predict, where=where, say="the family has no")
    source = plugins.source(data, where=where)
    # A caption that occurs twice would be right for two images, and recall has one right candidate.
    chosen = {}
    for record, example in loader.sound(source, range(min(num_images, len(source)))):
        chosen.setdefault(example["caption"], record)
    groups = len(chosen) // candidates
    # Recall at 10 of 10 candidates would be 1 whatever the model is.
    if not groups or candidates <= max(PLACES):
        raise errors.ConfigError(
            f"{candidates} candidates of {len(chosen)} different captions",
            where=where,
            fix=f"give more than {max(PLACES)} candidates, and more data",
        )
    records = list(chosen.values())[: groups * candidates]

    def embedded(nets):
        parts = ([], [])  # images, captions
        # A short last batch is filled up, as another size would compile again.
        for start in range(0, len(records), batch_size):
            examples = [
                source[r] for r in np.resize(records[start : start + batch_size], batch_size)
            ]
            batch = predict["batch"](
                [e["image"] for e in examples], [e["caption"] for e in examples]
            )
            for part, name in zip(parts, ("image_emb", "text_emb"), strict=True):
                part.append(np.asarray(predict[name](nets, batch)))
        return [np.concatenate(part)[: len(records)].astype(np.float64) for part in parts]

    def run(nets, step):
        image_NP, text_NP = embedded(nets)
        return lambda: measured(image_NP, text_NP, candidates, seed)

    run.names = NAMES
    return run


def measured(image_NP, text_NP, candidates: int, seed: int = 0) -> dict[str, float]:
    """The metrics of `make`, from unit vectors. Image i and caption i are a pair."""
    values, count = {}, len(image_NP) // candidates
    groups = [
        (image_CP @ text_CP.T)
        for image_CP, text_CP in zip(
            np.split(image_NP, count), np.split(text_NP, count), strict=True
        )
    ]
    for k in PLACES:
        both = [[retrieval.recall_at(g, k), retrieval.recall_at(g.T, k)] for g in groups]
        forth, back = np.mean(both, 0)
        values |= {f"image_to_text_at_{k}": float(forth), f"text_to_image_at_{k}": float(back)}
    similarity_NN = image_NP @ text_NP.T
    precision = retrieval.r_precision(similarity_NN, candidates=candidates, seed=seed)
    return {**values, "r_precision": precision, "num_images": float(len(image_NP))}
