"""The autoencoder that `config.model.autoencoder` describes, for families that train or read it."""

from t2i_jax import errors, plugins
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
