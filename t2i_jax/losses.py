"""Losses as pure functions, one value per example.

B batch · H W pixels · C channels · P width · N tokens · K kinds of them
"""

import jax
import jax.numpy as jnp

ANGLE_MARGIN = 1e-4  # of a cosine from ±1
LEAST_SCALE = 1e-3  # of a logistic: an eighth of the step between two values of 8 bits


def squared_error(a_BHWC, b_BHWC):
    """Mean squared difference of each example, in float32.   -> B"""
    difference = a_BHWC.astype(jnp.float32) - b_BHWC.astype(jnp.float32)
    return jnp.square(difference).mean(axis=range(1, difference.ndim))


def cross_entropy(logits_BNK, token_BN, smoothing=0.0):
    """−log p of each token, in nats and float32.   -> BN

    smoothing: share of the target that all tokens have alike (arXiv:1512.00567, section 7).
    """
    log_BNK = jax.nn.log_softmax(logits_BNK.astype(jnp.float32))
    own_BN = jnp.take_along_axis(log_BNK, token_BN[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * own_BN - smoothing * log_BNK.mean(-1)


def map_error(maps, others):
    """Mean squared difference of feature maps, each place scaled to unit mean square.   -> B

    maps, others: of the same network, each BHWC.
    """
    # Unscaled, layers and places with the largest numbers would decide alone.
    scaled = lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    pairs = zip(maps, others, strict=True)
    errors_MB = [squared_error(scaled(a), scaled(b)) for a, b in pairs]
    return sum(errors_MB) / len(errors_MB)


def log_logistic(x, mean, log_scale):
    """The log-probability of each 8-bit value under a logistic, in nats, in the broadcast shape.

    It is that of the interval of 2/255 round the value; those of the darkest and the brightest are
    open (PixelCNN++, arXiv:1701.05517, section 2.1).

    Args:
      x: values k/127.5 − 1 for whole k from 0 to 255.
      mean, log_scale: of the logistic, in the same units. Scales below LEAST_SCALE count as that.
    """
    scale = jnp.maximum(jnp.exp(log_scale), LEAST_SCALE)
    upper, lower = ((x + half - mean) / scale for half in (1 / 255, -1 / 255))
    below = jnp.where(x > 1 - 1 / 255, 0.0, jax.nn.log_sigmoid(upper))
    above = jnp.where(x < -1 + 1 / 255, 0.0, jax.nn.log_sigmoid(-lower))
    # σ(u) − σ(l) = σ(u)·σ(−l)·(1 − exp(l − u)) needs no difference of nearly equal numbers.
    inner = jnp.abs(x) < 1 - 1 / 255
    return below + above + jnp.where(inner, jnp.log(-jnp.expm1(-2 / 255 / scale)), 0.0)


def psnr(a_BHWC, b_BHWC):
    """The peak signal-to-noise ratio of images in [-1, 1], in decibels.   -> B"""
    return 10 * jnp.log10(4 / jnp.maximum(squared_error(a_BHWC, b_BHWC), 1e-10))


def weighted_mean(value_B, weight_B):
    """Σ weight·value over the number of examples that count; 0 where none does.   -> scalar

    Not over the sum of weights: in a batch of one, a weight would then change nothing.
    """
    return (value_B * weight_B).sum() / jnp.maximum(counted(weight_B), 1)


def counted(weight_B):
    """How many examples count: those whose weight is not 0.   -> scalar, float32"""
    return (weight_B != 0).sum().astype(jnp.float32)


def unit(x_BP):
    """The vectors scaled to length 1. The zero vector stays, and its gradient is finite."""
    x_BP = x_BP.astype(jnp.float32)  # 1e-8 is 0 in float16
    return x_BP * jax.lax.rsqrt(jnp.square(x_BP).sum(-1, keepdims=True) + 1e-8)


def spherical(a_BP, b_BP):
    """The squared angle between unit vectors, (arccos a·b)², in radians².   -> B

    The cosine is clipped near ±1, where the slope of arccos is infinite. Its gradient there is 0.
    """
    cosine_B = jnp.clip((a_BP * b_BP).sum(-1), -1 + ANGLE_MARGIN, 1 - ANGLE_MARGIN)
    return jnp.square(jnp.arccos(cosine_B))


# ---- Losses of pairs of images and captions, over the global batch ----


def different_captions(tokens):
    """Whether the captions of each pair of examples differ in their tokens.   -> bool BB

    tokens: a tree of numbers BL and masks BL, one pair for each tokenizer.

    Hashes of 64 bits are compared, as the tokens of all pairs would be B²·L numbers. Two different
    captions count as equal with a chance of 2⁻⁶⁴; among 2,048 captions this happens with a chance
    of 10⁻¹³. In that step the two are no negatives of each other.
    """
    leaves = jax.tree.leaves(tokens)  # numbers and mask of each tokenizer
    ids_BL, mask_BL = (jnp.concatenate(x, axis=1) for x in (leaves[::2], leaves[1::2]))
    # The mask is part of the word, as padding may have the number of a real token.
    word_BL = 2 * ids_BL.astype(jnp.uint32) + mask_BL
    place_L = jnp.arange(word_BL.shape[1], dtype=jnp.uint32)
    same_BB = True
    # The seeds are the halves of 2⁶⁴ / φ. Any two different numbers would do.
    for seed in (0x9E3779B9, 0x7F4A7C15):  # two hashes of 32 bits: JAX has no uint64 by default
        # Each pair of token and place gets its own number (Zobrist 1970), so that order counts.
        drawn_BL = _mixed(word_BL ^ _mixed(place_L + jnp.uint32(seed)))
        hash_B = drawn_BL.sum(1, dtype=jnp.uint32)
        same_BB &= hash_B[:, None] == hash_B
    return ~same_BB


def _mixed(x):
    """A bijection of uint32 in which every bit depends on all of x (MurmurHash3's finaliser)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def info_nce(logits_BB, different_BB, weight_B):
    """InfoNCE of images and captions, the mean of both directions.   -> scalar

    It is the cross-entropy of an image's own caption among all captions that differ from it, and
    the reverse (arXiv:1807.03748, eq. 4; arXiv:2103.00020). Examples of weight 0 are left out.
    """
    # A caption that occurs twice in a batch must not be a negative of its own image.
    own = jnp.eye(len(logits_BB), dtype=bool)
    logits_BB = jnp.where(_counted(different_BB, weight_B) | own, logits_BB, -1e9)
    value_B = sum(jax.nn.logsumexp(logits_BB, axis) for axis in (0, 1)) / 2
    return weighted_mean(value_B - jnp.diagonal(logits_BB), weight_B)


def pairwise(logits_BB, different_BB, weight_B):
    """The sigmoid loss of each pair, by whether image and caption belong together.   -> scalar

    This is SigLIP's (arXiv:2303.15343, eq. 1). Negatives with an equal caption and examples of
    weight 0 are left out.
    """
    own = jnp.eye(len(logits_BB), dtype=bool)
    value_BB = jax.nn.softplus(jnp.where(own, -logits_BB, logits_BB))
    value_B = jnp.where(_counted(different_BB, weight_B) | own, value_BB, 0).sum(1)
    return weighted_mean(value_B, weight_B)


def _counted(different_BB, weight_B):
    """Which pairs serve as negatives.   -> bool BB"""
    return different_BB & (weight_B > 0)[None] & (weight_B > 0)[:, None]
