"""Mean and covariance of features, gathered batch by batch, and the Fréchet distance (FID).

All is float64 on the host: the distance is a small difference of large traces (ADR 11).

N rows, one for each image · D features · R rank of a covariance
"""

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import linalg

from t2i_jax import errors, images
from t2i_jax.quality import features

GATHER, ROWS = "quality.statistics.gather", 2048
AGAIN = "make the file again"
DAMAGE = (OSError, LookupError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile)
TOLERANCE = 5e-7  # share of the distance that rounding may cost at worst on the fast route


class Statistics(NamedTuple):
    """Count, mean and scatter matrix of N features, in float64. JAX would make them float32."""

    count: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray  # Σ (x - mean)(x - mean)ᵀ, that is (N - 1) times the covariance


# ---- Gathering ----


def of(features_ND) -> Statistics:
    """The statistics of features of any real dtype, at least one row.

    Raises:
      DataError: features that are no matrix of finite numbers.
    """
    features.check("quality.statistics.of", given=features_ND)
    x_ND = np.asarray(features_ND, np.float64)
    mean_D = x_ND.mean(0)
    centred_ND = x_ND - mean_D
    return Statistics(len(x_ND), mean_D, centred_ND.T @ centred_ND)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both sets together, equal to one pass over all rows (Chan et al. 1979).

    The order does not matter beyond rounding. So each process may gather its own and merge.

    Raises:
      DataError: the features have unequal widths.
    """
    _check_widths(a, b, "quality.statistics.merge")
    count = a.count + b.count
    # Moments about the means, not sums of squares: those would cancel with most of their digits.
    apart_D = b.mean_D - a.mean_D
    scatter_DD = np.outer(apart_D, apart_D * (a.count * b.count / count))
    # In place, as each such matrix has 32 MiB at 2,048 features.
    scatter_DD += a.scatter_DD
    scatter_DD += b.scatter_DD
    return Statistics(count, a.mean_D + apart_D * (b.count / count), scatter_DD)


def gather(batches) -> Statistics:
    """The statistics of features that come in batches ND, at least one row in all.

    Raises:
      DataError: no features, or a batch that is no matrix of finite numbers.
    """
    # Small batches are joined to ROWS rows: one product of many rows is faster than many of few.
    total, waiting = None, {}
    for number, batch_ND in enumerate(batches):
        waiting[f"batch {number}"] = np.asarray(batch_ND)
        if sum(map(len, waiting.values())) >= ROWS:
            total, waiting = _with(total, waiting), {}
    if total is None and not waiting:
        raise errors.DataError("no features at all", where=GATHER, fix="give at least one batch")
    return _with(total, waiting) if waiting else total


def _with(total, batches) -> Statistics:
    features.check(GATHER, **batches)
    more = of(np.concatenate(list(batches.values())))
    return merge(total, more) if total else more


# ---- Files ----


def save(path, statistics: Statistics, *, source: Mapping[str, str]) -> None:
    """Writes statistics to a file. For the arguments see `save_arrays`."""
    save_arrays(path, statistics._asdict(), source=source)


def load(path, *, expected: Mapping[str, str]) -> Statistics:
    """Reads statistics that `save` wrote. For the arguments and errors see `load_arrays`."""
    arrays = load_arrays(path, expected=expected)
    with errors.explained(errors.DataError, "no statistics", where=path, fix=AGAIN, of=DAMAGE):
        return Statistics(**{**arrays, "count": int(arrays["count"])})


def save_arrays(path, arrays: Mapping[str, np.ndarray], *, source: Mapping[str, str]) -> None:
    """Writes an .npz without pickle: the arrays, their source, and a SHA-256 of all.

    Args:
      path: the file, which appears whole or not at all.
      source: what the arrays depend on, such as the hashes of extractor, resizing and data.
    """
    text, data = json.dumps(dict(source), sort_keys=True), io.BytesIO()
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(data, **arrays, source=np.str_(text), sha256=np.str_(_sha256(arrays, text)))
    images.write_whole(path, data.getvalue())


def load_arrays(path, *, expected: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads arrays that `save_arrays` wrote.

    Args:
      expected: entries that the file's source must have, such as the extractor's hash.
    Raises:
      DataError: no such file, a damaged one, or one with another source.
    """
    path = pathlib.Path(path)
    with errors.explained(errors.DataError, "not readable", where=path, fix=AGAIN, of=DAMAGE):
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text, sha256 = str(arrays.pop("source")), str(arrays.pop("sha256"))
        if _sha256(arrays, text) != sha256:
            raise ValueError("the SHA-256 does not match")
        source = json.loads(text)
    stale = [key for key, value in expected.items() if source.get(key) != value]
    if stale:
        stale = [f"{key} {source.get(key)!s:.12} → {expected[key]!s:.12}" for key in stale]
        raise errors.DataError(
            "statistics of something else: " + "; ".join(stale), where=str(path), fix=AGAIN
        )
    return arrays


def load_foreign(path) -> Statistics:
    """Reads `mu` and `sigma`, a mean and a covariance, from an .npz of other programs.

    Such files do not hold the number of images. `count` is one more than the number of features.

    Raises:
      DataError: no such file, or none with a mean and a covariance of one width.
    """
    # `count` bounds the rank in `_root`. D + 1 is the least number that allows the full rank.
    fix = "give an .npz with mu and sigma"
    with errors.explained(errors.DataError, "no statistics", where=path, fix=fix, of=DAMAGE):
        with np.load(path, allow_pickle=False) as file:
            mean_D, covariance_DD = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
        if covariance_DD.shape != mean_D.shape * 2 or mean_D.ndim != 1:
            raise ValueError(f"mu {mean_D.shape}, sigma {covariance_DD.shape}")
    return Statistics(len(mean_D) + 1, mean_D, covariance_DD * len(mean_D))


def _sha256(arrays, text) -> str:
    hashed = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        # One byte order for all machines, so that the same numbers have the same hash.
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        hashed.update(f"{name} {little.dtype.str} {value.shape}".encode())
        hashed.update(np.ascontiguousarray(little))
    return hashed.hexdigest()


# ---- Distance ----


def frechet(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6), at least 0.

    It is called FID where the features are Inception's 2048. Otherwise name the extractor. It is
    exact for any rank, so also for fewer rows than features. A distance that float64 cannot tell
    from 0 is 0.

    Raises:
      DataError: fewer than two rows, unequal widths, or values that are not finite.
    """
    where = "quality.statistics.frechet"
    _check_widths(a, b, where)
    for name, statistics in (("first", a), ("second", b)):
        if statistics.count < 2:
            raise errors.DataError(
                f"the {name} set has {statistics.count} picture, which has no covariance",
                where=where,
                fix="give at least two",
            )
        if not (np.isfinite(statistics.mean_D).all() and np.isfinite(statistics.scatter_DD).all()):
            raise errors.DataError(
                f"the {name} set's statistics are not finite", where=where, fix="make them again"
            )
    # With roots F of the covariances, C = F Fᵀ, the trace of (C_a C_b)^½ is the sum of the singular
    # values of F_aᵀ F_b. These are real and at least 0, unlike the eigenvalues of C_a C_b, which
    # rounding makes complex or negative where a covariance is singular.
    if b.count < a.count:
        a, b = b, a  # the set with fewer rows has the lower rank, and so the smaller product
    power = np.trace(a.scatter_DD) / (a.count - 1) + np.trace(b.scatter_DD) / (b.count - 1)
    apart = np.square(a.mean_D - b.mean_D).sum() + power
    root_DR = _root(a)
    square_RR = root_DR.T @ (b.scatter_DD / (b.count - 1)) @ root_DR
    # The fast route takes roots of eigenvalues, a third of the time of singular values. Where its
    # rounding would show in the distance, the singular values are computed after all.
    shared, error = _roots_of_eigenvalues(square_RR)
    if 2 * error > TOLERANCE * (apart - 2 * shared):
        shared = linalg.svdvals(root_DR.T @ _root(b), check_finite=False).sum()
    distance = apart - 2 * shared
    resolution = 4 * len(a.mean_D) * np.finfo(np.float64).eps * power
    return float(distance) if distance > resolution else 0.0


def _root(statistics) -> np.ndarray:
    """A factor F of the covariance F Fᵀ by pivoted Cholesky, as wide as the covariance's rank."""
    count, mean_D, scatter_DD = statistics
    factor_DD, order_D, rank, _ = linalg.lapack.dpstrf(scatter_DD / (count - 1), lower=True)
    rank = min(rank, count - 1)  # columns beyond are rounding: N rows have at most rank N − 1
    root_DR = np.empty((len(mean_D), rank))
    # LAPACK counts from 1, and its factor is of the rows in pivoted order.
    # It leaves the other triangle of the matrix as it was, hence `tril`.
    root_DR[order_D - 1] = np.tril(factor_DD)[:, :rank]
    return root_DR


def _roots_of_eigenvalues(square_RR) -> tuple[float, float]:
    """The sum of the roots of a matrix's eigenvalues, and a bound on its rounding error.

    Rounding moves every eigenvalue by about the last digit of the largest. For the root of a small
    eigenvalue that is much.
    """
    if not square_RR.size:
        return 0.0, 0.0
    value_R = linalg.eigvalsh(square_RR, lower=True, driver="evd", check_finite=False)
    noise = np.finfo(np.float64).eps * value_R[-1]
    root_R = np.sqrt(np.maximum(value_R, 0))
    # With δ the noise, √(v + δ) − √v is at most δ / √v, and never more than √δ.
    error = (noise / np.maximum(root_R, np.sqrt(noise))).sum() if noise > 0 else 0.0
    return float(root_R.sum()), float(error)


def _check_widths(a: Statistics, b: Statistics, where: str) -> None:
    if len(a.mean_D) != len(b.mean_D):
        raise errors.DataError(
            f"features of unequal widths: {len(a.mean_D)} and {len(b.mean_D)}",
            where=where,
            fix="use one extractor for both",
        )
