"""The Inception Score, from probabilities of classes.

N rows, one for each image · K classes
"""

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features, kernel


def inception_score(probability_NK, *, splits: int = 10) -> kernel.Estimate:
    """exp of the mean KL divergence of p(y|x) from p(y) (Salimans et al. 2016, sec. 4), 1 … K.

    It is called Inception Score where the classes are those of Inception on ImageNet.

    Args:
      probability_NK: p(y|x), from 0 to 1. Each row sums to 1.
      splits: parts of the rows, in their order. Shuffle rows that are sorted by class.
    Returns:
      Mean and standard deviation over the parts.
    Raises:
      DataError: rows that are no probabilities.
      ConfigError: more splits than images.
    """
    where = "quality.classes.inception_score"
    features.check(where, probability=probability_NK)
    p_NK = np.asarray(probability_NK, np.float64)
    if (p_NK < 0).any() or (np.abs(p_NK.sum(1) - 1) > 1e-3).any():
        raise errors.DataError(
            f"rows sum to {p_NK.sum(1).min():.4g} … {p_NK.sum(1).max():.4g}, values start at "
            f"{p_NK.min():.4g}",
            where=where,
            fix="give probabilities, the softmax of the logits",
        )
    if not 1 <= splits <= len(p_NK):
        raise errors.ConfigError(
            f"{splits} splits of {len(p_NK)} pictures",
            where=where,
            fix="ask for at least 1 and at most one a picture",
        )
    scores = [np.exp(_divergence(part_NK)) for part_NK in np.array_split(p_NK, splits)]
    return kernel.Estimate(float(np.mean(scores)), float(np.std(scores)))


def _divergence(p_NK) -> float:
    """Mean KL(p(y|x) ‖ p(y)), with 0 log 0 = 0."""
    # Where p is 0 the ratio is 1, whose logarithm is 0. A class that no image has would be 0 / 0.
    ratio_NK = np.divide(p_NK, p_NK.mean(0), out=np.ones_like(p_NK), where=p_NK > 0)
    return (p_NK * np.log(ratio_NK)).sum(1).mean()
