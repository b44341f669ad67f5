"""What a discriminator and a generator play for, as pure functions.

Games of logits, penalties of the discriminator's slope, and comparisons of the batch's pairs of
image and caption.   B batch · H W pixels · C channels · N B examples against B
"""

import jax
import jax.numpy as jnp

from t2i_jax import losses, randomness, sharding
from t2i_jax.models import gan
from t2i_jax.models.types import Cond


def _relativistic(sign):
    return lambda real_B, fake_B: jax.nn.softplus(-sign * (real_B - fake_B))


def _cross_entropy(real_B, fake_B):
    return jax.nn.softplus(-real_B) + jax.nn.softplus(fake_B)


GAMES = {  # name -> (discriminator's loss, generator's loss) of logits (real_B, fake_B)
    # R3GAN, arXiv:2501.05441, eq. 2
    "relativistic": (_relativistic(1), _relativistic(-1)),
    # arXiv:1705.02894, eqs. 12, 13
    "hinge": (
        lambda real_B, fake_B: jax.nn.relu(1 - real_B) + jax.nn.relu(1 + fake_B),
        lambda real_B, fake_B: -fake_B,
    ),
    # Goodfellow et al. 2014, arXiv:1406.2661, section 3
    "nonsaturating": (_cross_entropy, lambda real_B, fake_B: jax.nn.softplus(-fake_B)),
    # the same, eq. 1
    "minimax": (_cross_entropy, lambda real_B, fake_B: -jax.nn.softplus(fake_B)),
}
PENALTIES = ("exact", "estimate", "none")


def slopes(penalty: str, logit, keys_B, sigma: float):
    """The squared slope of a logit at images, as a function of them.

    Args:
      penalty: "exact", ‖∇D‖², or "estimate", ‖D(x) − D(x + σε)‖²/σ² (arXiv:2501.08316).
      logit: image_BHWC -> logit_B.
      keys_B: of the estimate's noise ε.
      sigma: σ of the estimate.
    Returns:
      image_BHWC -> its value for each example, B.
    """
    if penalty == "exact":
        # The gradient of the sum holds that of each logit, as none depends on another image.
        gradient = jax.grad(lambda image_BHWC: logit(image_BHWC).sum())
        value = lambda image_BHWC: jnp.square(gradient(image_BHWC)).sum((1, 2, 3))
        return sharding.attention_by("xla")(value)  # kernels have no second derivatives

    def estimate(image_BHWC):
        noise_BHWC = randomness.normal_each(keys_B, image_BHWC.shape[1:])
        with jax.default_matmul_precision("float32"):  # a small difference of large numbers
            still_B, moved_B = map(logit, (image_BHWC, image_BHWC + sigma * noise_BHWC))
        return jnp.square((still_B - moved_B) / sigma)

    return estimate


def contrast(judgement: gan.Judgement, cond, batch, *, sentence, word, temperature):
    """Contrastive losses of images and captions over the batch (XMC-GAN, arXiv:2101.04702).

    Args:
      sentence: weight of the loss of whole captions; 0 leaves it out.
      word: weight of the loss of words and regions; 0 leaves it out.
      temperature: that scores are divided by.
    Returns:
      The weighted sum of the two, a scalar.
    """
    different_BB, value = losses.different_captions(batch["text"]), 0.0
    nce = lambda scores_NN: losses.info_nce(scores_NN / temperature, different_BB, batch["weight"])
    if sentence:
        value += sentence * nce(judgement.image_BD @ judgement.text_BD.T)
    if word:
        regions_BTD, words_BLD = judgement.regions_BTD, judgement.words_BLD
        value += word * nce(gan.pairs_word_scores(regions_BTD, words_BLD, cond.mask_BL))
    return value


# --- images beside captions of others (arXiv:1605.05396) ------------------------------------------


def partner(batch):
    """For each example the next in the batch, cyclically, with another caption; itself if none.

    An example of weight 0 is nobody's.
    """
    n = len(batch["index"])
    far_BB = (jnp.arange(n)[None] - jnp.arange(n)[:, None]) % n
    different_BB = losses.different_captions(batch["text"]) & (batch["weight"] > 0)
    # Distances are below n, so any other caption is nearer than the example itself, at n.
    return jnp.argmin(jnp.where(different_BB, far_BB, n + (far_BB > 0)), 1)


def is_other(batch):
    """1 where `partner` finds another caption, else 0."""
    own = jnp.arange(len(batch["index"]))
    return (partner(batch) != own).astype(jnp.float32)


def shuffled(cond: Cond, batch) -> Cond:
    """Every example's partner's condition."""
    return jax.tree.map(lambda x: x[partner(batch)], cond)
