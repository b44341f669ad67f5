"""What the vision transformers share (arXiv:2010.11929).

B pictures · H W pixels, or patches of a grid · C channels · L tokens · D width · O I places of a
resized and of the learned grid
"""

import math

import jax.numpy as jnp
import numpy as np

from t2i_jax import errors

PREPROCESSOR = "preprocessor_config.json"


def statistics(config: dict, mean: tuple[float, ...], std: tuple[float, ...]) -> dict:
    """{"mean": …, "std": …} of RGB in [0, 1]: the preprocessor's, or those given.

    Raises:
      ConfigError: they are no three finite numbers, or a std is not above 0.
    """
    found = {}
    for name, default in (("mean", mean), ("std", std)):
        values = config.get("preprocessor", {}).get(f"image_{name}", default)
        low = 0 if name == "std" else -math.inf
        if not (
            isinstance(values, list | tuple)
            and len(values) == 3
            and all(isinstance(v, int | float) and low < v < math.inf for v in values)
        ):
            raise errors.ConfigError(
                f"image_{name} is {values!r}",
                where=PREPROCESSOR,
                fix=f"it should be like {list(default)}",
            )
        found[name] = tuple(map(float, values))
    return found


def normalise(image_BHWC, mean, std):
    """[-1, 1] -> what the network learned from, float32: (x - mean) / std of x in [0, 1]."""
    # ((x + 1)/2 − mean)/std, with the constants put together.
    mean_C, std_C = (np.asarray(x, np.float32) for x in (mean, std))
    return (jnp.asarray(image_BHWC, jnp.float32) + (1 - 2 * mean_C)) / (2 * std_C)


def states(layers, x_BLD) -> list:
    """BLD before the layers and after each."""
    mask_BL = jnp.ones(x_BLD.shape[:2], bool)
    found = [x_BLD.reshape(-1, x_BLD.shape[-1])]
    for layer in layers:
        found.append(layer(found[-1], mask_BL))
    return [x_ND.reshape(x_BLD.shape) for x_ND in found]


def resized(grid_IID, shape: tuple[int, int], *, antialias: bool):
    """Embeddings of a square grid's places, by bicubic interpolation for another.   -> OOD"""
    if grid_IID.shape[:2] == shape:
        return grid_IID
    # Positions are made of these sums, whose factors accelerators else round.
    rows_OI, columns_OI = (cubic(n, grid_IID.shape[0], antialias=antialias) for n in shape)
    return jnp.einsum("oi,pj,ijd->opd", rows_OI, columns_OI, grid_IID, precision="highest")


def cubic(out: int, n: int, *, antialias: bool) -> np.ndarray:
    """Weights by which each of `out` places is a sum of n, both over the same length.   -> OI

    Cubic convolution (Keys 1981) as torch computes it: a = -0.75, four places, those beyond the
    ends being the ends; with antialias a = -0.5, kernels as wide as a place of the coarser grid,
    cut off at the ends.
    """
    # Between centres of places: what torch calls align_corners=False.
    at_O1 = (np.arange(out)[:, None] + 0.5) * n / out - 0.5
    if antialias:
        stretch = max(n / out, 1.0)
        weight_OI = _keys((np.arange(n) - at_O1) / stretch, -0.5)
    else:
        beyond = np.arange(-2, n + 2)
        padded = _keys(beyond - at_O1, -0.75)
        weight_OI = padded[:, 2:-2]
        weight_OI[:, 0] += padded[:, :2].sum(1)
        weight_OI[:, -1] += padded[:, -2:].sum(1)
    # Stretched kernels, and those cut off at an end, do not sum to 1 by themselves.
    return (weight_OI / weight_OI.sum(1, keepdims=True)).astype(np.float32)


def _keys(x, a: float):
    """Keys' kernel, 0 from |x| = 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def check_side(image_BHWC, patch: int, side: int | None = None) -> None:
    """Raises ConfigError unless pictures are RGB, whole patches wide and high, or `side` both."""
    height, width, channels = image_BHWC.shape[1:]
    fits = (height, width) == (side, side) if side else not (height % patch or width % patch)
    if not (fits and channels == 3):
        want = f"{side} × {side}" if side else f"multiples of {patch}"
        raise errors.ConfigError(
            f"pictures are {height} × {width} × {channels}, the network reads {want} of 3 channels",
            where="an image network",
            fix="resize them to the module's res",
        )


def check_patches(sizes: dict, side: int) -> None:
    """Raises ConfigError where a side has no whole patch."""
    if side < sizes["patch"]:
        raise errors.misfit(f"a side of {side} is shorter than a patch of {sizes['patch']}")
