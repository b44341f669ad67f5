"""PSNR and SSIM of pairs of images, in float64 on their device; diversity of groups of images.

B images · G groups of N · H W pixels · C channels · K taps of the window
"""

import functools

import jax
import numpy as np
from jax import numpy as jnp

from t2i_jax import errors

TAPS, SIGMA = 11, 1.5  # of the Gaussian window
K1, K2 = 0.01, 0.03


def psnr(x_BHWC, y_BHWC, *, span: tuple[float, float] | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio in dB over all pixels and channels.   -> float64 B

    It is inf for equal images.

    Args:
      x_BHWC, y_BHWC: both uint8, or both floats within `span`.
      span: darkest and brightest value of floats, such as (0, 1) or (-1, 1). uint8 needs none.
    Raises:
      DataError: unequal shapes or dtypes, or values that are not finite or outside the span.
      ConfigError: floats without a span.
    """
    low, high = _checked(x_BHWC, y_BHWC, span, "quality.pixels.psnr")
    # In float32 the error of nearly equal images would lose its digits.
    with jax.enable_x64(True):
        error_B = np.asarray(_squared_error(x_BHWC, y_BHWC))
    with np.errstate(divide="ignore"):
        return 10 * np.log10((high - low) ** 2 / error_B)


def ssim(x_BHWC, y_BHWC, *, span: tuple[float, float] | None = None) -> np.ndarray:
    """Structural similarity (Wang et al. 2004, eq. 13), -1 … 1.   -> float64 B

    It is the mean over channels and over every place where the 11 × 11 Gaussian window (σ 1.5)
    fits. Equal images have 1.

    Args and errors are those of `psnr`. An image with a side below 11 is a DataError, too.
    """
    where = "quality.pixels.ssim"
    low, high = _checked(x_BHWC, y_BHWC, span, where)
    if min(x_BHWC.shape[1:3]) < TAPS:
        raise errors.DataError(
            f"pictures of {x_BHWC.shape[1]} × {x_BHWC.shape[2]}",
            where=where,
            fix=f"give at least {TAPS} × {TAPS} pixels",
        )
    # The variances are differences of means of squares, which cancel in float32 on flat images.
    with jax.enable_x64(True):
        return np.asarray(_similarity(x_BHWC, y_BHWC, low, float(high - low)))


def diversity(x_GNHWC: np.ndarray) -> np.ndarray:
    """How much the N images of a group differ, from 0 for equal images.   -> float64 G

    It is the root mean square distance of a pixel from the group's mean, as a share of 255. An
    infinite group would have √(N/(N−1)) times as much.

    Args:
      x_GNHWC: uint8, groups of images.
    """
    return np.sqrt(x_GNHWC.var(1, dtype=np.float64).mean((1, 2, 3))) / 255


@jax.jit
def _squared_error(x_BHWC, y_BHWC):
    # `float` is float64 here, as the callers enable it while this is traced.
    return jnp.square(x_BHWC.astype(float) - y_BHWC.astype(float)).mean((1, 2, 3))


@jax.jit
def _similarity(x_BHWC, y_BHWC, low, height):
    x_BHWC, y_BHWC = ((v.astype(float) - low) / height for v in (x_BHWC, y_BHWC))
    mean_x, mean_y = _smooth(x_BHWC), _smooth(y_BHWC)
    var_x = _smooth(x_BHWC * x_BHWC) - mean_x * mean_x
    var_y = _smooth(y_BHWC * y_BHWC) - mean_y * mean_y
    cov = _smooth(x_BHWC * y_BHWC) - mean_x * mean_y
    # The constants are (K·span)² (Wang et al. 2004). The span is 1 after the division above.
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    below = (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    return (above / below).mean((1, 2, 3))


def _smooth(x_BHWC):
    """The mean over the Gaussian window wherever it fits, along height and then width."""
    reach_K = np.arange(TAPS) - TAPS // 2
    weight_K = np.exp(-0.5 * (reach_K / SIGMA) ** 2)
    weight_K /= weight_K.sum()
    # The window is a product of two one-dimensional ones: 22 terms in place of 121.
    for axis in (1, 2):
        size = x_BHWC.shape[axis] - TAPS + 1
        parts = (
            weight * jax.lax.slice_in_dim(x_BHWC, tap, tap + size, axis=axis)
            for tap, weight in enumerate(weight_K.tolist())
        )
        x_BHWC = functools.reduce(jnp.add, parts)
    return x_BHWC


def _checked(x_BHWC, y_BHWC, span, where: str) -> tuple[float, float]:
    """The span of the images' values, as two floats. Raises as `psnr` does."""
    got = [f"{x.dtype}{list(x.shape)}" for x in (x_BHWC, y_BHWC)]
    floats = [bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in (x_BHWC, y_BHWC)]
    kinds = {"float" if f else str(x.dtype) for f, x in zip(floats, (x_BHWC, y_BHWC), strict=True)}
    alike = x_BHWC.shape == y_BHWC.shape and kinds in ({"uint8"}, {"float"})
    if not alike or x_BHWC.ndim != 4 or not x_BHWC.size:
        raise errors.DataError(
            f"pictures are {got[0]} and {got[1]}",
            where=where,
            fix="give two batches BHWC of one shape, both uint8 or both floats",
        )
    if not all(floats):
        span = (0, 255) if span is None else span
        if tuple(span) != (0, 255):
            raise errors.ConfigError(
                f"uint8 pictures within {span}", where=where, fix="leave span out"
            )
        return 0.0, 255.0
    if span is None or not span[0] < span[1]:
        raise errors.ConfigError(
            f"float pictures within {span}", where=where, fix="say span=(-1, 1) or span=(0, 1)"
        )
    for x in (x_BHWC, y_BHWC):
        least, most = float(x.min()), float(x.max())
        if not span[0] <= least <= most <= span[1]:  # false for NaN, too
            raise errors.DataError(
                f"values from {least:.4g} to {most:.4g} within {span}",
                where=where,
                fix="clip the pictures, or give the span they have",
            )
    return float(span[0]), float(span[1])
