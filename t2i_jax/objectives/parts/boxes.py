"""Rectangles of images, which are painted anew or kept.   B batch · H W pixels · C channels"""

from typing import Annotated

import jax.numpy as jnp

from t2i_jax import fields

# Top, left, bottom and right, as shares of the sides.
Box = Annotated[tuple[float, float, float, float], fields.between(0, 1)]


def inside(image_BHWC, box):
    """True for the pixels whose middle lies in a box.   -> bool BHW1"""
    b, h, w, _ = image_BHWC.shape
    top, left, bottom, right = box
    row_H, column_W = ((jnp.arange(n) + 0.5) / n for n in (h, w))
    inside_H = (top <= row_H) & (row_H < bottom)
    inside_W = (left <= column_W) & (column_W < right)
    inside_HW = inside_H[:, None] & inside_W
    return jnp.broadcast_to(inside_HW[..., None], (b, h, w, 1))
