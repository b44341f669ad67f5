"""The autoencoder that `config.model.autoencoder` describes, for families that train or read it.

B batch · H W pixels · h w C latents
"""

import jax.numpy as jnp

from t2i_jax import errors, objective, plugins, randomness
from t2i_jax import space as spaces
from t2i_jax.models.types import Moments
from t2i_jax.pretrained import autoencoder

NET = "autoencoder"
KINDS = {  # how its latents are kept
    "kl": autoencoder.Autoencoder,  # as a normal for each number
    "vq": autoencoder.Quantised,  # as the nearest entry of a codebook
    "fsq": autoencoder.FiniteScalar,  # as numbers rounded to levels
}
MOST = 2**20  # codes: an entropy, or a token model's output, has a number for each


def build(sizes, *, where: str = f"config.model.{NET}") -> autoencoder.Autoencoder:
    """The module, with `factor`, `latent_channels` and `num_codes` (0 of "kl"). It makes `Moments`
    of image_BHWC and `decode`s latent_BHWC; of a quantised one there are also the methods
    `codes`, image_BHWC -> int32 Bhw, and `of_codes`, code_Bhw -> image_BHWC, float32.

    Args:
      sizes: `kind`, one of KINDS, and the fields of that module.
    Raises:
      ConfigError: an unknown kind or size, or sizes that do not go together.
    """
    sizes = dict(sizes)
    kind = sizes.pop("kind", "kl")
    errors.check_known("kind", kind, KINDS, where=f"{where}.kind")
    net = plugins.network(KINDS[kind], where=where, options=sizes)
    if not net.widths or any(width % net.groups for width in net.widths):
        raise errors.ConfigError(
            f"widths {net.widths} in {net.groups} groups",
            where=f"{where}.widths",
            fix="give widths that the number of groups divides",
        )
    if kind == "fsq" and not (net.levels and net.num_codes <= MOST):
        raise errors.ConfigError(
            f"levels {net.levels} make {net.num_codes:,} codes",
            where=f"{where}.levels",
            fix=f"give some that make {MOST:,} at most, such as (8, 5, 5, 5)",
        )
    return net


def of_config(config) -> autoencoder.Autoencoder:
    """The module for a config's pictures; see `build`.

    Raises:
      ConfigError: a side of the pictures that it does not divide.
    """
    size = objective.size(config)
    net = build({"res": max(size), **config.model.get(NET, {})})
    if rest := [side for side in size if side % net.factor]:
        raise errors.ConfigError(
            f"a side of {rest[0]} pixels is no multiple of {net.factor}",
            where="config.size" if config.size else "config.res",
            fix="set it to one, or give the autoencoder fewer widths",
        )
    return net


def moments(net, nets, batch, name: str = NET) -> dict:
    """What it makes of images: mean BhwC, and logvar BhwC where latents are drawn."""
    mean_BhwC, logvar_BhwC = net.apply(nets[name], batch["image"])
    found = dict(mean=mean_BhwC, logvar=logvar_BhwC)
    return {key: x for key, x in found.items() if x is not None}


def drawn(moments: Moments, keys_B):
    """Latents, drawn by the examples' keys where they are a normal.   -> BhwC"""
    if moments.logvar_BHWC is None:
        return moments.mean_BHWC
    noise_BhwC = randomness.normal_each(keys_B, moments.mean_BHWC.shape[1:])
    return moments.mean_BHWC + jnp.exp(0.5 * moments.logvar_BHWC) * noise_BhwC


def latents(net, size, name: str = NET) -> spaces.Space:
    """The latents that an autoencoder makes of images of a height and width, scaled as what learns
    them sees them: z = (latent − shift_factor)·scaling_factor (arXiv:2112.10752, appendix G).

    net: the module.   name: its name among the nets, where it is frozen.
    """

    # `by` applies a network, perhaps to a part at a time. Without it, all is encoded at once.
    def encode(nets, batch, keys_B, by=lambda apply, image_BHWC: apply(image_BHWC)):
        def encoded(image_BHWC):
            found = net.apply(nets[name], image_BHWC)
            return jnp.concatenate([x for x in found if x is not None], -1)

        if "mean" in batch:  # from a cache, as float16
            kept = lambda key: batch[key].astype(jnp.float32) if key in batch else None
            mean_BhwC, logvar_BhwC = kept("mean"), kept("logvar")
        else:
            found_BhwC = by(encoded, batch["image"])
            mean_BhwC, logvar_BhwC = jnp.split(found_BhwC, [net.latent_channels], -1)
            logvar_BhwC = logvar_BhwC if logvar_BhwC.size else None
        latent_BhwC = drawn(Moments(mean_BhwC, logvar_BhwC), keys_B)
        return (latent_BhwC - net.shift_factor) * net.scaling_factor

    def decode(nets, z_BhwC, by=lambda apply, latent_BhwC: apply(latent_BhwC)):
        latent_BhwC = z_BhwC / net.scaling_factor + net.shift_factor
        return by(lambda z: net.apply(nets[name], z, method="decode"), latent_BhwC)

    def init(key, batch):
        return net.init(key, jnp.zeros((1, *size, 3)))

    shape = (*(side // net.factor for side in size), net.latent_channels)
    return spaces.Space(shape, encode, decode, {name: init})
