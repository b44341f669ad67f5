"""Maximum mean discrepancies of two sets of features: KID and CMMD.

N M rows, one for each image · D features · S rows of a subset
"""

from typing import NamedTuple

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features


class Estimate(NamedTuple):
    """Mean and standard deviation (of the population) over parts of the data."""

    mean: float
    spread: float


def kid(
    real_ND, fake_MD, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel inception distance: squared MMD with the kernel (x·y/D + 1)³ (arXiv:1801.01401).

    The estimate is unbiased, so a small distance may come out negative (Bińkowski et al. 2018). It
    is called KID where the features are Inception's 2048. Otherwise name the extractor.

    Args:
      subsets: how many pairs of subsets are drawn, each without replacement.
      subset_size: images of a subset, the same number of both sets.
      seed: of the draws.
    Raises:
      DataError: bad features.
      ConfigError: subsets larger than a set.
    """
    where = "quality.kernel.kid"
    features.check(where, rows=2, real=real_ND, fake=fake_MD)
    if not (2 <= subset_size <= min(len(real_ND), len(fake_MD)) and subsets >= 1):
        raise errors.ConfigError(
            f"{subsets} subsets of {subset_size} of {len(real_ND)} real and {len(fake_MD)} fake "
            "pictures",
            where=where,
            fix="draw at least one subset of at least 2, and at most all of the smaller set",
        )
    rng = np.random.default_rng(seed)
    draw = lambda x_ND: x_ND[rng.choice(len(x_ND), subset_size, replace=False)].astype(np.float64)
    distances = [
        _unbiased(draw(np.asarray(real_ND)), draw(np.asarray(fake_MD))) for _ in range(subsets)
    ]
    return Estimate(float(np.mean(distances)), float(np.std(distances)))


def cmmd(real_ND, fake_MD) -> float:
    """CMMD: 1000 times the squared MMD with a Gaussian kernel of σ = 10 (Jayasumana et al. 2024).

    All pairs count, also an image with itself (Gretton et al. 2012, eq. 5), as in its authors' code
    (arXiv:2401.09603). So it is at least 0, and 0 for a set with itself. It is called CMMD where
    the features are embeddings of CLIP ViT-L/14@336 of length 1. σ and the factor suit these.

    Raises:
      DataError: bad features.
    """
    features.check("quality.kernel.cmmd", real=real_ND, fake=fake_MD)
    within = _lowered(real_ND, real_ND) + _lowered(fake_MD, fake_MD)
    # The sum is at least 0 (all pairs count), but rounding may bring it below.
    return max(1000.0 * (within - 2 * _lowered(real_ND, fake_MD)), 0.0)


def _unbiased(x_SD, y_SD) -> float:
    """The squared MMD without the pairs of an image with itself."""
    size, width = x_SD.shape
    mean = 0.0
    for a_SD in (x_SD, y_SD):
        kernel_SS = (a_SD @ a_SD.T / width + 1) ** 3
        # The diagonal, an image with itself, would make the estimate too large on average.
        mean += (kernel_SS.sum() - np.trace(kernel_SS)) / (size * (size - 1))
    return mean - 2 * np.mean((x_SD @ y_SD.T / width + 1) ** 3)


def _lowered(x_ND, y_MD) -> float:
    """The mean of the Gaussian kernel, minus 1."""
    # The kernel is near 1 everywhere. In the sum of three means the ones cancel, and most digits of
    # the means with them; expm1 keeps these digits.
    total = 0.0
    for _, squared_RM in features.squared_distances(x_ND, y_MD):
        squared_RM *= -1 / (2 * 10.0**2)
        total += np.expm1(squared_RM, out=squared_RM).sum()
    return total / (len(x_ND) * len(y_MD))
