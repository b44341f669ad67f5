"""Neighbourhoods of features: precision and recall, density and coverage, memorisation.

N M rows, one for each image · D features · K numbers of neighbours · R rows of a block
"""

from typing import NamedTuple

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features


class Manifold(NamedTuple):
    """Precision, recall, density and coverage. All are shares in 0 … 1, but density may pass 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Memorised(NamedTuple):
    """The nearest training image of every fake one, and the share of fake ones that are copies."""

    share: float  # 0 … 1
    index_M: np.ndarray  # row of the nearest training image
    distance_M: np.ndarray  # Euclidean distance to it
    ratio_M: np.ndarray  # of that distance to the second nearest's, 0 … 1


def compare(real_ND, fake_MD, *, k: int = 3, density_k: int = 5) -> Manifold:
    """How the neighbourhoods of two sets overlap.

    A neighbourhood is the closed ball around an image that reaches to the k-th other image of its
    set. All four values depend on the sizes of the sets. Compare models at equal sizes.

    - Precision: the share of fake images within any real neighbourhood. Recall: the reverse
      (Kynkäänniemi et al. 2019, eq. 2, arXiv:1904.06991).
    - Density: the mean number of real neighbourhoods around a fake image, over k. Coverage: the
      share of real neighbourhoods that hold a fake image (Naeem et al. 2020, arXiv:2002.09797).

    Args:
      k: neighbours for precision and recall.
      density_k: neighbours for density and coverage.
    Raises:
      DataError: bad features.
      ConfigError: not more images than neighbours.
    """
    where = "quality.manifold.compare"
    features.check(where, rows=2, real=real_ND, fake=fake_MD)
    counts = {"real": (len(real_ND), max(k, density_k)), "fake": (len(fake_MD), k)}
    for name, (count, neighbours) in counts.items():
        if not 1 <= min(k, density_k) <= neighbours < count:
            raise errors.ConfigError(
                f"{neighbours} neighbours among {count} {name} pictures",
                where=where,
                fix="ask for at least 1 neighbour and fewer than there are pictures",
            )
    # One pass over blocks of distances, as all N × M would not fit into memory.
    narrow_N, wide_N = _radii(real_ND, (k, density_k))
    (narrow_M,) = _radii(fake_MD, (k,))
    precise_M, recalled, inside, covered = np.zeros(len(fake_MD), bool), 0, 0, 0
    for start, squared_RM in features.squared_distances(real_ND, fake_MD):
        rows = slice(start, start + len(squared_RM))
        precise_M |= (squared_RM <= narrow_N[rows, None]).any(0)
        recalled += (squared_RM <= narrow_M).any(1).sum()
        within_RM = squared_RM <= wide_N[rows, None]
        inside += within_RM.sum()
        covered += within_RM.any(1).sum()
    n, m = len(real_ND), len(fake_MD)
    values = precise_M.mean(), recalled / n, inside / (density_k * m), covered / n
    return Manifold(*map(float, values))


def memorised(train_ND, fake_MD, *, ratio: float = 1 / 3) -> Memorised:
    """The share of fake images that copy an image of the training set.

    A fake image is a copy if its nearest training image is nearer than `ratio` times the second
    nearest (Yoon et al. 2023; Gu et al. 2023, arXiv:2310.02664). An image that the training set
    holds twice hides copies that are near it; exact copies still count. Unseen real images in place
    of fake ones give the share to compare with.

    Args:
      train_ND: the whole training set. A memory-mapped array is read block by block.
      ratio: the largest ratio of a copy, in (0, 1].
    Raises:
      DataError: bad features.
      ConfigError: a ratio out of range.
    """
    where = "quality.manifold.memorised"
    features.check(where, train=train_ND, fake=fake_MD)
    # There must be a second nearest. Two rows show that, and all rows were read just now.
    features.check(where, rows=2, train=train_ND[:2])
    if not 0 < ratio <= 1:
        raise errors.ConfigError(f"ratio is {ratio}", where=where, fix="give one above 0, up to 1")
    squared_2M = np.full((2, len(fake_MD)), np.inf)  # the nearest two
    index_M = np.zeros(len(fake_MD), int)
    for start, squared_RM in features.squared_distances(train_ND, fake_MD):
        nearest_M = squared_RM.argmin(0)
        new_M = squared_RM.min(0) < squared_2M[0]
        index_M[new_M] = start + nearest_M[new_M]
        # The last block may have a single row, of which no second smallest can be asked.
        both = np.concatenate(
            [squared_2M, np.partition(squared_RM, min(1, len(squared_RM) - 1), 0)[:2]]
        )
        squared_2M = np.sort(both, 0)[:2]
    first_M, second_M = np.sqrt(squared_2M)
    # 0 / 0 is an exact copy of an image that the training set holds twice: its ratio is 0.
    ratio_M = np.divide(first_M, second_M, out=np.zeros_like(first_M), where=second_M > 0)
    return Memorised(float((ratio_M < ratio).mean()), index_M, first_M, ratio_M)


def _radii(x_ND, neighbours) -> np.ndarray:
    """The squared distance of every row to its k-th nearest other, for each k.   -> KN"""
    wanted = [k - 1 for k in neighbours]
    radii_KN = np.empty((len(wanted), len(x_ND)))
    for start, squared_RN in features.squared_distances(x_ND, x_ND):
        rows = np.arange(len(squared_RN))
        squared_RN[rows, start + rows] = np.inf  # an image is no neighbour of itself
        squared_RN.partition(sorted(set(wanted)), axis=1)
        radii_KN[:, start + rows] = squared_RN[:, wanted].T
    return radii_KN
