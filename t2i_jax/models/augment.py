"""Differentiable augmentation of a discriminator's input (DiffAugment, arXiv:2006.10738).

H W pixels · C channels · B batch
"""

import jax
import jax.numpy as jnp

SHIFT = 1 / 8  # of the side, at most
HOLE = 1 / 2  # of the side


def augmented(names, image_BHWC, keys_B, share):
    """Images, of which each named kind changes a share. Each example has its own key.   -> BHWC

    Every change is differentiable by the images, so a generator learns through it. It does not
    learn to draw the changes themselves, as real images are changed as often.

    Args:
      names: kinds of KINDS, applied in this order.
      keys_B: one key for each example.
      share: of the examples that each kind changes, 0 … 1.
    """

    def one(image_HWC, key):
        for name in names:
            # Both branches are computed: under vmap a conditional would compute both anyway.
            key, coin, draw = jax.random.split(key, 3)
            changed_HWC = KINDS[name](image_HWC, draw)
            image_HWC = jnp.where(jax.random.uniform(coin) < share, changed_HWC, image_HWC)
        return image_HWC

    return jax.vmap(one)(image_BHWC, keys_B)


def colour(image_HWC, key):
    """Brightness ± 0.5, saturation × 0 … 2, contrast × 0.5 … 1.5."""
    brightness, saturation, contrast = jax.random.uniform(key, (3,))
    x = image_HWC + brightness - 0.5
    grey_HW1 = x.mean(-1, keepdims=True)
    x = grey_HW1 + 2 * saturation * (x - grey_HW1)
    return x.mean() + (0.5 + contrast) * (x - x.mean())


def translation(image_HWC, key):
    """Moves an image by up to an eighth of its side along both axes. The border repeats."""
    h, w, _ = image_HWC.shape
    down, right = jax.random.uniform(key, (2,), minval=-SHIFT, maxval=SHIFT)
    # Products with matrices of ones and zeros, as XLA:CPU's gathers and scatters are slow.
    return jnp.einsum("yh,xw,hwc->yxc", _moves(h, down * h), _moves(w, right * w), image_HWC)


def cutout(image_HWC, key):
    """Greys a square of half the side, centred anywhere in the image."""
    h, w, _ = image_HWC.shape
    y, x = jax.random.uniform(key, (2,))
    inside = lambda n, at: jnp.abs(jnp.arange(n) + 0.5 - at * n) < HOLE * n / 2
    # Values lie in [-1, 1], so 0 is grey.
    return jnp.where((inside(h, y)[:, None] & inside(w, x))[..., None], 0, image_HWC)


def _moves(n: int, by):
    """The matrix that moves n pixels by `by`, rounded to a whole number of pixels."""
    source_N = jnp.clip(jnp.arange(n) - jnp.round(by), 0, n - 1)
    return (source_N[:, None] == jnp.arange(n)).astype(jnp.float32)


KINDS = {"colour": colour, "translation": translation, "cutout": cutout}
