"""Where a generator works: in pixels, or in what a frozen autoencoder makes of them.

B batch · H W pixels · C channels
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from t2i_jax import randomness


class Space(NamedTuple):
    """What an objective learns to draw, and its way from and to images.

    shape: of one example x.
    encode: (nets, batch, keys_B) -> x of the batch's images, B and `shape`.
    decode: (nets, x) -> image_BHWC in [-1, 1].
    init: net -> (key, batch) -> variables of a frozen net that encode and decode read.
    """

    shape: tuple[int, ...]
    encode: Callable
    decode: Callable
    init: Mapping[str, Callable] = {}

    def of_images(self, nets, batch, keys_B, *how):
        """`encode` with keys made of the examples' own, so that other noise of these differs."""
        return self.encode(nets, batch, randomness.fold_each(keys_B, 0), *how)


def pixels(res: int) -> Space:
    """Images themselves, of `res` pixels a side and three channels."""
    return Space(
        shape=(res, res, 3),
        encode=lambda nets, batch, keys_B: batch["image"],
        decode=lambda nets, x_BHWC: x_BHWC,
    )
