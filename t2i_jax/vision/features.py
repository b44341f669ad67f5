"""What image networks give.   B pictures · H W pixels · C channels · D K features, classes"""

from typing import NamedTuple

import jax


class Features(NamedTuple):
    """Of each picture; None where the network has no such thing.

    pooled_BD: what distances between sets of pictures are measured in.
    logits_BK: of its classes.
    spatial_BD: with their places, for the spatial Fréchet distance.
    maps: BHWC after some of its layers, from fine to coarse.
    """

    pooled_BD: jax.Array
    logits_BK: jax.Array | None = None
    spatial_BD: jax.Array | None = None
    maps: tuple[jax.Array, ...] = ()
