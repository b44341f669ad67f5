"""The inputs and outputs of pretrained networks: tokens, conditions, features, latents.

B batch · H W pixels · C channels · L text length · D width · K classes or numbers
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
    numbers_BK: further numbers that a pretrained network learned with, such as the sizes of Stable
      Diffusion XL. None where there are none.
    """

    seq_BLD: jax.Array
    mask_BL: jax.Array
    pooled_BD: jax.Array
    numbers_BK: jax.Array | None = None


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


class Moments(NamedTuple):
    """What an autoencoder makes of images: a normal for each number of the latents, BHWC.

    logvar_BHWC: None where the latents are the mean itself.
    """

    mean_BHWC: jax.Array
    logvar_BHWC: jax.Array | None = None


class Output:
    """What a denoiser gives, as its return annotation: BHWC, the noise, a velocity or the image."""
