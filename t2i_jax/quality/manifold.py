"""Where pictures lie among others: precision and recall, density and coverage, memorisation.

N M rows, one a picture · D features · R rows of a block
"""

from typing import NamedTuple

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features


class Manifold(NamedTuple):
    """All are shares from 0 to 1 but density, which may be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Memorised(NamedTuple):
    """The nearest training picture of every fake one."""

    share: float
    index_M: np.ndarray
    distance_M: np.ndarray  # Euclidean
    ratio_M: np.ndarray  # of that distance to the second nearest's, 0 … 1


def compare(real_ND, fake_MD, *, k: int = 3, density_k: int = 5) -> Manifold:
    """How the neighbourhoods of two sets overlap; one is a ball up to the k-th other of its set.

    Improved precision and recall (Kynkäänniemi et al. 2019, eq. 2, arXiv:1904.06991): the share of
    fake pictures within any real neighbourhood, and the reverse. Density and coverage (Naeem et al.
    2020, arXiv:2002.09797): in how many real neighbourhoods a fake picture lies, over k, and the
    share of those that hold one. Balls are closed. All depend on the sizes of the sets: compare
    models at equal ones.

    Args:
      k, density_k: neighbours, for precision and recall, and for density and coverage.
    Raises:
      DataError: bad features. ConfigError: not more pictures than neighbours.
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
    """The share of fake pictures that copy one of the training set.

    One does if its nearest training picture is nearer than `ratio` times the second nearest (Yoon
    et al. 2023; Gu et al. 2023, arXiv:2310.02664). A training set that holds a picture twice hides
    copies near, not at, that picture; unseen real pictures in place of fake ones give the share to
    compare with.

    Args:
      train_ND: all of the training set; a memory-mapped array is read block by block.
    Raises:
      DataError: bad features. ConfigError: a ratio not in (0, 1].
    """
    where = "quality.manifold.memorised"
    features.check(where, train=train_ND, fake=fake_MD)
    features.check(where, rows=2, train=train_ND[:2])
    if not 0 < ratio <= 1:
        raise errors.ConfigError(f"ratio is {ratio}", where=where, fix="give one above 0, up to 1")
    squared_2M = np.full((2, len(fake_MD)), np.inf)  # the nearest two
    index_M = np.zeros(len(fake_MD), int)
    for start, squared_RM in features.squared_distances(train_ND, fake_MD):
        nearest_M = squared_RM.argmin(0)
        new_M = squared_RM.min(0) < squared_2M[0]
        index_M[new_M] = start + nearest_M[new_M]
        both = np.concatenate(
            [squared_2M, np.partition(squared_RM, min(1, len(squared_RM) - 1), 0)[:2]]
        )
        squared_2M = np.sort(both, 0)[:2]
    first_M, second_M = np.sqrt(squared_2M)
    ratio_M = np.divide(first_M, second_M, out=np.zeros_like(first_M), where=second_M > 0)
    return Memorised(float((ratio_M < ratio).mean()), index_M, first_M, ratio_M)


def _radii(x_ND, neighbours) -> np.ndarray:
    """The squared distance of every row to its k-th nearest other, for each k.   -> KN"""
    wanted = [k - 1 for k in neighbours]
    found = np.empty((len(wanted), len(x_ND)))
    for start, squared_RN in features.squared_distances(x_ND, x_ND):
        rows = np.arange(len(squared_RN))
        squared_RN[rows, start + rows] = np.inf
        squared_RN.partition(sorted(set(wanted)), axis=1)
        found[:, start + rows] = squared_RN[:, wanted].T
    return found
