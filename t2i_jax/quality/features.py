"""The check of features before they are used, and distances between very many of them.

N M rows, one for each image · D features · R rows of a block
"""

import numpy as np
from jax import numpy as jnp

from t2i_jax import errors

BLOCK = 2**24  # numbers in memory at once: 128 MB of float64


def check(where: str, *, rows: int = 1, **features) -> None:
    """Checks that all are finite real matrices of one width, each of at least `rows` rows.

    Args:
      where: the caller, for the error.
      features: name -> array ND of any real dtype. It may be memory-mapped.
    Raises:
      DataError: one is not.
    """
    for name, x_ND in features.items():
        if x_ND.ndim != 2 or not _is_real(x_ND.dtype):
            raise errors.DataError(
                f"{name} features are {x_ND.dtype}{list(x_ND.shape)}, not a matrix of numbers",
                where=where,
                fix="give one row of features a picture",
            )
        if len(x_ND) < rows or not x_ND.shape[1]:
            raise errors.DataError(
                f"{name} features are {len(x_ND)} × {x_ND.shape[1]}",
                where=where,
                fix=f"give features of at least {rows} picture{'s' * (rows > 1)}",
            )
        # Block by block, as a memory-mapped set may be larger than the memory.
        for start, block_RD in _blocks(x_ND):
            finite_R = np.isfinite(block_RD).all(1)
            if not finite_R.all():
                raise errors.DataError(
                    f"{name} features are not finite, first in row {start + finite_R.argmin()}",
                    where=where,
                    fix="look at that picture and at the extractor's dtype",
                )
    widths = {name: x_ND.shape[1] for name, x_ND in features.items()}
    if len(set(widths.values())) > 1:
        raise errors.DataError(
            f"unequal widths: {widths}", where=where, fix="use one extractor for all of them"
        )


def squared_distances(x_ND, y_MD):
    """Yields (first row, squared Euclidean distances float64 RM), one block of rows after another.

    The distance of a pair is exactly 0 where rounding cannot tell the two apart. So an image and
    its copy are at distance 0.
    """
    # |x|² − 2 x·y + |y|² is one matrix product. It loses fewer digits without a common offset.
    centre_D = np.mean(y_MD, 0, np.float64)
    y_MD = np.asarray(y_MD, np.float64) - centre_D
    y_norm_M = np.einsum("md,md->m", y_MD, y_MD)
    # Rounding moves x·y by about D·eps·|x||y| at most, which the sum of both squared norms bounds.
    resolution = (8 + len(centre_D)) * np.finfo(np.float64).eps
    for start, block_RD in _blocks(x_ND, len(y_MD)):
        x_RD = np.asarray(block_RD, np.float64) - centre_D
        norms_RM = np.einsum("rd,rd->r", x_RD, x_RD)[:, None] + y_norm_M
        squared_RM = x_RD @ y_MD.T  # in place from here on: a block is 128 MB
        squared_RM *= -2
        squared_RM += norms_RM
        norms_RM *= resolution
        squared_RM[squared_RM < norms_RM] = 0
        yield start, squared_RM


def _blocks(x_ND, columns: int = 0):
    """Yields (first row, block of rows), so that rows × columns, or × D, stays within BLOCK."""
    size = max(1, BLOCK // max(columns, x_ND.shape[1]))
    for start in range(0, len(x_ND), size):
        yield start, np.asarray(x_ND[start : start + size])


def _is_real(dtype) -> bool:
    # By JAX's rules, as numpy does not know bfloat16 for a float.
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
