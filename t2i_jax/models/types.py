"""The inputs and outputs of encoders: tokens, captions as conditions, images as features.

B batch · H W pixels · C channels · L text length · D width · K classes
"""

from typing import NamedTuple

import jax


class Tokens(NamedTuple):
    """The tokens of captions: ids_BL int32, mask_BL bool (True for a real token).

    An empty caption has no real token, which means no condition.
    """

    ids_BL: jax.Array
    mask_BL: jax.Array


class Cond(NamedTuple):
    """Encoded captions.

    seq_BLD: states of the tokens.   mask_BL: True for a real token.   pooled_BD: one state for all.
    """

    seq_BLD: jax.Array
    mask_BL: jax.Array
    pooled_BD: jax.Array


class Features(NamedTuple):
    """Features of images. A field is None where the network does not have it.

    pooled_BD: for distances between sets of images.
    logits_BK: of the classes.
    spatial_BD: flattened with their places, for the spatial Fréchet distance.
    maps: BHWC after some of the layers, from fine to coarse.
    """

    pooled_BD: jax.Array
    logits_BK: jax.Array | None = None
    spatial_BD: jax.Array | None = None
    maps: tuple[jax.Array, ...] = ()
