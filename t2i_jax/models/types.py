"""What encoders read and hand on: tokens; captions as conditions, pictures as features.

B batch · H W pixels · C channels · L text length · D width · K classes
"""

from typing import NamedTuple

import jax


class Tokens(NamedTuple):
    """Captions as a tokenizer's numbers: ids_BL int32, mask_BL bool (True = a real token).

    An empty caption has no token at all, which means no condition.
    """

    ids_BL: jax.Array
    mask_BL: jax.Array


class Cond(NamedTuple):
    """Encoded captions: token states seq_BLD, mask_BL (True = a real token), pooled_BD."""

    seq_BLD: jax.Array
    mask_BL: jax.Array
    pooled_BD: jax.Array


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
