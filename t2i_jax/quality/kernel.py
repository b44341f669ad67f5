"""Maximum mean discrepancies of two sets of features: KID and CMMD.

N M rows, one a picture · D features · S rows of a subset
"""

from typing import NamedTuple

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features


class Estimate(NamedTuple):
    """Mean and standard deviation (divided by their number) over parts of the data."""

    mean: float
    spread: float


def kid(
    real_ND, fake_MD, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel inception distance (Bińkowski et al. 2018): squared MMD with kernel (x·y/D + 1)³.

    It is unbiased, so small ones may be negative (arXiv:1801.01401). KID where the features are
    Inception's 2048; say which extractor otherwise.

    Args:
      subsets: how often as many pictures are drawn of either set, without replacement.
      subset_size: how many; with all of both, the only subset is the set.
      seed: of the draws.
    Raises:
      DataError: bad features. ConfigError: subsets larger than a set.
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
    found = [
        _unbiased(draw(np.asarray(real_ND)), draw(np.asarray(fake_MD))) for _ in range(subsets)
    ]
    return Estimate(float(np.mean(found)), float(np.std(found)))


def cmmd(real_ND, fake_MD) -> float:
    """CLIP-MMD (Jayasumana et al. 2024): 1000 times the squared MMD, Gaussian kernel of σ = 10.

    All pairs count, a picture with itself too (Gretton et al. 2012, eq. 5), as in its authors'
    code (arXiv:2401.09603): at least 0, and 0 for a set with itself. CMMD where the features are
    CLIP ViT-L/14@336's embeddings of length 1; σ and the factor are meant for these.

    Raises:
      DataError: bad features.
    """
    features.check("quality.kernel.cmmd", real=real_ND, fake=fake_MD)
    within = _lowered(real_ND, real_ND) + _lowered(fake_MD, fake_MD)
    return max(1000.0 * (within - 2 * _lowered(real_ND, fake_MD)), 0.0)


def _unbiased(x_SD, y_SD) -> float:
    """Squared MMD without pairs of a picture with itself."""
    size, width = x_SD.shape
    mean = 0.0
    for a_SD in (x_SD, y_SD):
        kernel_SS = (a_SD @ a_SD.T / width + 1) ** 3
        mean += (kernel_SS.sum() - np.trace(kernel_SS)) / (size * (size - 1))
    return mean - 2 * np.mean((x_SD @ y_SD.T / width + 1) ** 3)


def _lowered(x_ND, y_MD) -> float:
    """The kernel's mean less 1: it is near 1, and the ones would cancel with most digits."""
    total = 0.0
    for _, squared_RM in features.squared_distances(x_ND, y_MD):
        squared_RM *= -1 / (2 * 10.0**2)
        total += np.expm1(squared_RM, out=squared_RM).sum()
    return total / (len(x_ND) * len(y_MD))
