"""Pictures of unfinished latents, quickly, by a small autoencoder.

BHWC latents or pictures
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, images
from t2i_jax.models.types import Moments
from t2i_jax.pretrained import opener

KNOWN = "hf:madebyollin/taesd (of SDXL taesdxl, of Stable Diffusion 3 taesd3, of FLUX.1 taef1)"


class Preview:
    """Latents as denoisers learn them -> pictures.

    Args:
      source: a folder or "hf:org/name", as `opener.open` reads it.
      autoencoder: that of the model whose latents they are, or None where there is none.
    Raises:
      ConfigError, DataError: as of `opener.open`; the model draws no latents, or others.
    """

    def __init__(self, source: str, autoencoder: str | None):
        checkpoint = opener.open(source)
        self._net = checkpoint.module(Moments)
        theirs = opener.open(autoencoder).module(Moments).latent_channels if autoencoder else 0
        if theirs != self._net.latent_channels:
            raise errors.ConfigError(
                f"it decodes {self._net.latent_channels} channels, and the model draws "
                + (f"latents of {theirs}" if theirs else "no latents"),
                where=f"preview {source}",
                fix=f"give one of the model's kind, such as {KNOWN}" if theirs else "leave it out",
            )
        image = jnp.zeros((1, self._net.factor, self._net.factor, 3))
        shapes = jax.eval_shape(self._net.init, jax.random.key(0), image)
        self._variables = jax.device_put(checkpoint.load(shapes))
        self._decode = jax.jit(functools.partial(self._net.apply, method="decode"))

    def __call__(self, z_BHWC) -> np.ndarray:
        """uint8 BHWC"""
        latent_BHWC = z_BHWC / self._net.scaling_factor + self._net.shift_factor
        return images.to_uint8(self._decode(self._variables, latent_BHWC))
