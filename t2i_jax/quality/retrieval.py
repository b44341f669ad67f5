"""Retrieval metrics of images and captions, from their similarities.

Q queries · C candidates · N pairs
"""

import numpy as np

from t2i_jax import errors


def recall_at(similarity_QC, k: int, *, truth_Q=None) -> float:
    """The share of queries whose own candidate is among the k most similar, from 0 to 1.

    The result is the expectation over random orders of ties. So equal similarities give k/C, not 1.

    Args:
      similarity_QC: any real numbers, larger for a better fit.
      k: 1 … C.
      truth_Q: the index of each query's candidate; by default the query's own index.
    Raises:
      DataError: similarities that are no finite matrix, or candidates that do not exist.
      ConfigError: k out of range.
    """
    where = "quality.retrieval.recall_at"
    similarity_QC = _checked(similarity_QC, where)
    queries, candidates = similarity_QC.shape
    truth_Q = np.arange(queries) if truth_Q is None else np.asarray(truth_Q)
    if truth_Q.shape != (queries,) or truth_Q.min() < 0 or truth_Q.max() >= candidates:
        raise errors.DataError(
            f"{queries} queries have their own candidates at {list(truth_Q.shape)} places up to "
            f"{truth_Q.max(initial=-1)}",
            where=where,
            fix=f"give one index from 0 to {candidates - 1} a query",
        )
    if not 1 <= k <= candidates:
        raise errors.ConfigError(
            f"k is {k} of {candidates} candidates", where=where, fix="give k from 1 to all"
        )
    own_Q1 = np.take_along_axis(similarity_QC, truth_Q[:, None], 1)
    # In a random order of the `equal` candidates, the own one is among the k best with the chance
    # (k − above) / equal.
    above_Q = (similarity_QC > own_Q1).sum(1)
    equal_Q = (similarity_QC == own_Q1).sum(1)
    return float(np.clip((k - above_Q) / equal_Q, 0, 1).mean())


def r_precision(similarity_NN, *, candidates: int = 100, seed: int = 0) -> float:
    """R-precision (Xu et al. 2018, sec. 4, arXiv:1711.10485), from 0 to 1.

    It is the share of images whose own caption is the most similar one among `candidates`. The
    others are drawn at random from all captions.

    Args:
      similarity_NN: of image i and caption j. Image i and caption i are a pair.
      candidates: captions to choose from, the own one included.
      seed: of the draws.
    Raises:
      DataError: similarities that are no finite square.
      ConfigError: fewer captions than candidates.
    """
    where = "quality.retrieval.r_precision"
    similarity_NN = _checked(similarity_NN, where)
    pictures, captions = similarity_NN.shape
    if pictures != captions:
        raise errors.DataError(
            f"{pictures} pictures and {captions} captions",
            where=where,
            fix="give one caption a picture",
        )
    if not 2 <= candidates <= captions:
        raise errors.ConfigError(
            f"{candidates} candidates of {captions} captions",
            where=where,
            fix="choose from at least 2 and at most all captions",
        )
    rng = np.random.default_rng(seed)
    others_NC = np.stack(
        [rng.choice(captions - 1, candidates - 1, replace=False) for _ in range(pictures)]
    )
    own_N1 = np.arange(pictures)[:, None]
    others_NC += others_NC >= own_N1  # numbers from the own one on move up: all but the own one
    drawn_NC = np.take_along_axis(similarity_NN, np.concatenate([own_N1, others_NC], 1), 1)
    return recall_at(drawn_NC, 1, truth_Q=np.zeros(pictures, int))


def _checked(similarity_QC, where: str) -> np.ndarray:
    similarity_QC = np.asarray(similarity_QC)
    if similarity_QC.ndim != 2 or not similarity_QC.size or not np.isfinite(similarity_QC).all():
        raise errors.DataError(
            f"similarities {list(similarity_QC.shape)} are no finite matrix",
            where=where,
            fix="give a number for every query and candidate",
        )
    return similarity_QC
