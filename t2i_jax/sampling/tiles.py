"""Encoding and decoding in parts, for pictures whose activations do not fit a device all at once.

B pictures · H W places of the latents, or pixels · C channels · N tiles of one row or column, or of
all · P Q entries of the result along a whole side, or along a tile's
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import sharding

OVERLAP = 0.25  # of a tile's side, at least: the next tile has it, too


def tiled(fn, x_BHWC, *, tile: int, factor: int, unit: int = 1):
    """Decodes tiles that overlap, and blends them linearly where they do. Or encodes them.

    All tiles have one size, so one program decodes them in turn; the last one of a row or column
    ends with the picture. Norms and attention see a tile alone. So the picture differs a little
    from one that is decoded as a whole.

    Args:
      fn: decodes latents, or encodes pictures: x_BHWC -> BHWC of any channels.
      tile: side of a tile in places of the latents, 2 or more. What has no longer side is decoded
        as a whole.
      factor: entries of the result to a place, along either side: pixels, or 1 of latents.
      unit: the same of `x_BHWC`.
    """
    b, *sides, c = x_BHWC.shape
    sides = [side // unit for side in sides]
    if max(sides) <= tile:
        return fn(x_BHWC)
    size = [min(tile, side) for side in sides]
    cuts = [_cut(side, tile, factor) for side in sides]
    pairs = list(itertools.product(*(zip(*cut, strict=True) for cut in cuts)))
    start_N2, row_NP, column_NQ = (
        np.array(x) for x in zip(*(((y, x), wy, wx) for (y, wy), (x, wx) in pairs), strict=True)
    )

    def cut(start_2):
        at = (0, start_2[0] * unit, start_2[1] * unit, 0)
        return jax.lax.dynamic_slice(x_BHWC, at, (b, *(side * unit for side in size), c))

    def add(whole_BHWC, at):
        start_2, row_P, column_Q = at
        place = (0, start_2[0] * factor, start_2[1] * factor, 0)
        tile_BHWC = fn(cut(start_2)) * (row_P[:, None, None] * column_Q[:, None])
        tile_BHWC += jax.lax.dynamic_slice(whole_BHWC, place, tile_BHWC.shape)
        return jax.lax.dynamic_update_slice(whole_BHWC, tile_BHWC, place), None

    channels = jax.eval_shape(lambda: fn(cut(start_N2[0]))).shape[-1]
    nothing_BHWC = jnp.zeros((b, *(side * factor for side in sides), channels))
    return jax.lax.scan(add, nothing_BHWC, (start_N2, row_NP, column_NQ))[0]


def sliced(fn, x_BHWC):
    """`fn` of one picture after another, on each device of the mesh in context."""
    parts = sharding.free_parts()
    k = 1 if len(x_BHWC) % parts else parts
    # Those of one time are of different devices' parts of the batch.
    rows = x_BHWC.reshape(k, -1, *x_BHWC.shape[1:]).swapaxes(0, 1)
    out = jax.lax.map(fn, rows).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])


def _cut(side: int, tile: int, factor: int):
    """Where tiles of one side begin, and the weights of their pixels.   -> start_N, weight_NP

    The weights of all tiles at a pixel sum to 1.
    """
    if side <= tile:
        return [0], np.ones((1, side * factor), np.float32)
    # The ramp is at least a pixel wide, as it is divided by that.
    step, blended = int(tile * (1 - OVERLAP)), max(int(tile * factor * OVERLAP), 1)
    start_N = np.array([*range(0, side - tile, step), side - tile])
    # Each tile is laid over those before it: it enters on a ramp, and hides them behind it.
    pixel_NP = np.arange(side * factor) - start_N[:, None] * factor
    enters_NP = np.clip(pixel_NP / blended, 0, 1)
    enters_NP[0] = 1
    shown_NP = np.ones_like(enters_NP)
    shown_NP[:-1] = np.cumprod(1 - enters_NP[:0:-1], axis=0)[::-1]
    weight_NP = (enters_NP * shown_NP).astype(np.float32)
    inside = np.arange(tile * factor) + start_N[:, None] * factor
    return start_N, np.take_along_axis(weight_NP, inside, axis=1)
