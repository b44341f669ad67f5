"""Decoding in parts, for pictures whose activations do not fit a device all at once.

B pictures · H W places of the latents · C channels · N tiles of one row or column, or of all ·
P Q pixels of a whole side, or of a tile's
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

OVERLAP = 0.25  # of a tile's side, at least: the next tile has it, too


def tiled(decode, latent_BHWC, *, tile: int, factor: int):
    """Decodes tiles that overlap, and blends them linearly where they do.   -> image_BHWC

    All tiles have one size, so one program decodes them in turn; the last one of a row or column
    ends with the picture. Norms and attention see a tile alone. So the picture differs a little
    from one that is decoded as a whole.

    Args:
      decode: latent_BHWC -> image_BHWC in three channels, `factor` times as high and wide.
      tile: side of a tile in places of the latents, 2 or more. What has no longer side is decoded
        as a whole.
    """
    b, *sides, c = latent_BHWC.shape
    if max(sides) <= tile:
        return decode(latent_BHWC)
    size = [min(tile, side) for side in sides]
    cuts = [_cut(side, tile, factor) for side in sides]
    pairs = list(itertools.product(*(zip(*cut, strict=True) for cut in cuts)))
    start_N2, row_NP, column_NQ = (
        np.array(x) for x in zip(*(((y, x), wy, wx) for (y, wy), (x, wx) in pairs), strict=True)
    )

    def add(image_BHWC, at):
        start_2, row_P, column_Q = at
        places = lambda unit: (0, start_2[0] * unit, start_2[1] * unit, 0)
        tile_BHWC = decode(jax.lax.dynamic_slice(latent_BHWC, places(1), (b, *size, c)))
        tile_BHWC *= row_P[:, None, None] * column_Q[:, None]
        tile_BHWC += jax.lax.dynamic_slice(image_BHWC, places(factor), tile_BHWC.shape)
        return jax.lax.dynamic_update_slice(image_BHWC, tile_BHWC, places(factor)), None

    nothing_BHWC = jnp.zeros((b, *(side * factor for side in sides), 3))
    return jax.lax.scan(add, nothing_BHWC, (start_N2, row_NP, column_NQ))[0]


def sliced(decode, latent_BHWC):
    """Decodes one picture at a time.   -> image_BHWC"""
    return jax.lax.map(lambda latent_HWC: decode(latent_HWC[None])[0], latent_BHWC)


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
