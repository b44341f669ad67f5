"""A conditional GAN: the generator draws in one pass, the discriminator reads the caption.

Relativistic pairing with zero-centred gradient penalties on real and drawn pictures (R3GAN,
arXiv:2501.05441), pictures beside captions of others as a third kind (arXiv:1605.05396), and
contrastive losses of pictures and captions over the global batch (XMC-GAN, arXiv:2101.04702).

B batch · H W pixels · C channels · T regions · L words · Z noise · D width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import errors, losses, plugins, randomness
from t2i_jax.models import gan
from t2i_jax.objective import Aux, Loss, Objective
from t2i_jax.text import condition, side

GAMES = {}  # name -> (discriminator's loss, generator's loss) of logits (real_B, fake_B)
MEAN_OF = 64  # styles whose mean truncation goes towards
PENALTIES = ("exact", "estimate", "none")


class Options(NamedTuple):
    """config.loss.

    game: one of GAMES.
    penalty: of the discriminator's slope at real (R1) and at drawn (R2) pictures: "exact", its
      gradient, or "estimate", the first-order ‖D(x) − D(x + σε)‖²/σ² (arXiv:2501.08316), or "none".
    gamma: the penalties' weight at the first step and at the last, half the squared slope's; falls
      on a cosine between.
    penalty_stride: every so manieth example of a batch is penalised: as lazy as a penalty of all
      at every so manieth step, but of one program. XLA:CPU runs convolutions within a conditional
      through naive code, thirty times as slow.
    sigma: of the estimate.
    mismatch: weight of real pictures beside captions of others.
    sentence, word: weights of the contrastive losses, in both nets' losses.
    temperature: of these.
    text_dropout: share of captions replaced by the null condition, see `text.side`.
    """

    game: str = "relativistic"
    penalty: str = "exact"
    gamma: tuple[float, float] = (0.5, 0.05)
    penalty_stride: int = 4
    sigma: float = 0.01
    mismatch: float = 0.5
    sentence: float = 0.1
    word: float = 0.1
    temperature: float = 0.1
    text_dropout: float | tuple[float, ...] = 0.0


def make(config) -> Objective:
    """Nets "disc", "gen" and the frozen "text"; predictions sample, encode, score."""
    options = plugins.call(Options, where="config.loss", options=config.loss)
    _check(options)
    sizes = dict(config.model)
    own = {name: dict(sizes.pop(name, {})) for name in ("gen", "disc")}
    make_net = lambda kind, name: plugins.call(
        kind, where=f"config.model.{name}", options={"res": config.res, **sizes, **own[name]}
    )
    generator, discriminator = make_net(gan.Generator, "gen"), make_net(gan.Discriminator, "disc")
    if config.res < 2 * gan.BASE or config.res & (config.res - 1):
        raise errors.ConfigError(
            f"res is {config.res}", where="config.res", fix="use 8, 16, 32, 64, 128, …"
        )
    text = side.Side(config, text_dropout=options.text_dropout)
    disc_game, gen_game = GAMES[options.game]

    def init(key, batch):
        key_gen, key_disc, key_text = jax.random.split(key, 3)
        text_variables, cond = text.init(key_text, batch)
        b = batch["text"].shape[0]
        image_BHWC = jnp.zeros((b, config.res, config.res, 3))
        return {
            "gen": generator.init(key_gen, jnp.zeros((b, generator.noise)), cond),
            "disc": discriminator.init(key_disc, image_BHWC, cond),
            "text": text_variables,
        }

    def draw(nets, batch, cond, keys_B):
        z_BZ = randomness.normal_each(keys_B, (generator.noise,))
        return generator.apply(nets["gen"], z_BZ, cond)

    def see(nets, image_BHWC, cond) -> gan.Seen:
        return discriminator.apply(nets["disc"], image_BHWC, cond)

    def started(nets, batch, key):
        """The condition, drawn pictures and a key an example."""
        keys = randomness.split_each(randomness.per_example(key, batch["index"]), 3)
        cond = text.drop(text.encode(nets, batch), keys[0])
        return cond, draw(nets, batch, cond, keys[1]), keys[2]

    def contrast(seen: gan.Seen, cond, batch):
        """The contrastive losses' sum."""
        apart = differs(batch)
        value = 0.0
        if options.sentence:
            cosine_NN = seen.image_BD @ seen.text_BD.T
            value += options.sentence * info_nce(cosine_NN, apart, batch, options.temperature)
        if options.word:
            scores_NN = gan.word_scores(
                seen.regions_BTD[:, None], seen.words_BLD[None], cond.mask_BL[None]
            )
            value += options.word * info_nce(scores_NN, apart, batch, options.temperature)
        return value

    def disc_loss(nets, batch, key, step):
        cond, fake_BHWC, keys_B = started(nets, batch, key)
        seen, seen_fake = see(nets, batch["image"], cond), see(nets, fake_BHWC, cond)
        weight_B = batch["weight"]
        mean = lambda value_B: losses.weighted_mean(value_B, weight_B)
        value = mean(disc_game(seen.logit_B, seen_fake.logit_B)) + contrast(seen, cond, batch)
        metrics = {"gap": mean(seen.logit_B - seen_fake.logit_B), "real": mean(seen.logit_B)}
        if options.mismatch:
            other = shuffled(cond, batch)
            wrong_B = see(nets, batch["image"], other).logit_B
            value += options.mismatch * mean(disc_game(seen.logit_B, wrong_B) * is_other(batch))
            metrics["mismatch_gap"] = mean(seen.logit_B - wrong_B)
        if options.penalty != "none":
            some = lambda tree: jax.tree.map(lambda x: x[:: options.penalty_stride], tree)
            logit = lambda image_BHWC: see(nets, image_BHWC, some(cond)).logit_B
            slope = _slopes(options, logit, some(keys_B))
            mean_of_some = lambda image_BHWC: losses.weighted_mean(
                slope(some(image_BHWC)), some(weight_B)
            )
            r1, r2 = mean_of_some(batch["image"]), mean_of_some(fake_BHWC)
            share = jnp.clip(step / max(config.steps, 1), 0, 1)
            start, end = options.gamma
            gamma = end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))
            value += 0.5 * gamma * (r1 + r2)
            metrics |= {"r1": r1, "r2": r2}
        return value, Aux(metrics)

    def gen_loss(nets, batch, key, step):
        cond, fake_BHWC, _ = started(nets, batch, key)
        seen_fake = see(nets, fake_BHWC, cond)
        real_B = see(nets, batch["image"], cond).logit_B if options.game == "relativistic" else 0.0
        value_B = gen_game(real_B, seen_fake.logit_B)
        value = losses.weighted_mean(value_B, batch["weight"]) + contrast(seen_fake, cond, batch)
        return value, Aux()

    def sample(nets, batch, key, *, truncation=1.0):
        """Pictures for captions.   -> image_BHWC in [-1, 1]

        Args:
          truncation: how far the style lies from its mean over noise, given the caption: below 1,
            pictures are nearer to what the caption usually gives, and less varied.
        """
        cond, keys_B = text.encode(nets, batch), randomness.per_example(key, batch["index"])
        z_BZ = randomness.normal_each(keys_B, (generator.noise,))
        style = lambda z_BZ: generator.apply(nets["gen"], z_BZ, cond, method="style")
        some_MZ = jax.random.normal(jax.random.key(0), (MEAN_OF, generator.noise))
        mean_BD = jax.vmap(lambda z_Z: style(jnp.broadcast_to(z_Z, z_BZ.shape)))(some_MZ).mean(0)
        style_BD = mean_BD + truncation * (style(z_BZ) - mean_BD)
        image_BHWC = generator.apply(nets["gen"], style_BD, cond, method="draw")
        return jnp.clip(image_BHWC, -1, 1)

    def score(nets, batch, key):
        """The discriminator's logits of a batch's pictures beside their captions.   -> B"""
        return see(nets, batch["image"], text.encode(nets, batch)).logit_B

    predict = {"sample": sample, "encode": text.encode, "score": score}
    return Objective(init, (Loss(("disc",), disc_loss), Loss(("gen",), gen_loss)), predict)


def _slopes(options: Options, logit, keys_B):
    """image_BHWC -> ‖∇D‖² of each example, or its first-order estimate."""
    if options.penalty == "exact":
        gradient = jax.grad(lambda image_BHWC: logit(image_BHWC).sum())
        return lambda image_BHWC: jnp.square(gradient(image_BHWC)).sum((1, 2, 3))

    def estimate(image_BHWC):
        noise_BHWC = randomness.normal_each(keys_B, image_BHWC.shape[1:])
        moved_B = logit(image_BHWC + options.sigma * noise_BHWC)
        return jnp.square((logit(image_BHWC) - moved_B) / options.sigma)

    return estimate


def differs(batch):
    """Which captions are not the same, as numbers.   -> bool (B, B)"""
    same_BB = (batch["text"][:, None] == batch["text"][None]).all(-1)
    return ~(same_BB & (batch["mask"][:, None] == batch["mask"][None]).all(-1))


def partner(batch):
    """For each example the next in the batch, cyclically, with another caption; itself if none."""
    n = len(batch["index"])
    far_BB = (jnp.arange(n)[None] - jnp.arange(n)[:, None]) % n
    return jnp.argmin(jnp.where(differs(batch), far_BB, n + (far_BB > 0)), 1)


def is_other(batch):
    """1 where `partner` found another caption."""
    own = jnp.arange(len(batch["index"]))
    return (partner(batch) != own).astype(jnp.float32)


def shuffled(cond: condition.Cond, batch) -> condition.Cond:
    """Every example's partner's condition."""
    return jax.tree.map(lambda x: x[partner(batch)], cond)


def info_nce(scores_NN, apart_NN, batch, temperature: float):
    """Symmetric cross-entropy of each picture's own caption among those that differ from it, and
    the reverse (arXiv:1807.03748, eq. 4); examples of weight 0 are none.
    """
    n = len(scores_NN)
    counts_N = batch["weight"] > 0
    seen_NN = (apart_NN & counts_N[None] & counts_N[:, None]) | jnp.eye(n, dtype=bool)
    logits_NN = jnp.where(seen_NN, scores_NN / temperature, -1e9)
    own_N = jnp.diagonal(logits_NN)
    value_N = sum(jax.nn.logsumexp(logits_NN, axis) - own_N for axis in (0, 1)) / 2
    return losses.weighted_mean(value_N, batch["weight"])


def _relativistic(sign):
    return lambda real_B, fake_B: jax.nn.softplus(-sign * (real_B - fake_B))


GAMES |= {
    # R3GAN, arXiv:2501.05441, eq. 2
    "relativistic": (_relativistic(1), _relativistic(-1)),
    # arXiv:1705.02894, eqs. 12, 13
    "hinge": (
        lambda real_B, fake_B: jax.nn.relu(1 - real_B) + jax.nn.relu(1 + fake_B),
        lambda real_B, fake_B: -fake_B,
    ),
    # Goodfellow et al. 2014, arXiv:1406.2661, section 3
    "nonsaturating": (
        lambda real_B, fake_B: jax.nn.softplus(-real_B) + jax.nn.softplus(fake_B),
        lambda real_B, fake_B: jax.nn.softplus(-fake_B),
    ),
    # the same, eq. 1
    "minimax": (
        lambda real_B, fake_B: jax.nn.softplus(-real_B) + jax.nn.softplus(fake_B),
        lambda real_B, fake_B: -jax.nn.softplus(fake_B),
    ),
}


def _check(options: Options) -> None:
    for name, known in (("game", GAMES), ("penalty", PENALTIES)):
        if getattr(options, name) not in known:
            raise errors.ConfigError(
                f"unknown {name} {getattr(options, name)!r}",
                where="config.loss",
                fix=errors.nearest(getattr(options, name), known),
            )
    if not (isinstance(options.penalty_stride, int) and options.penalty_stride >= 1):
        raise errors.ConfigError(
            f"penalty_stride is {options.penalty_stride!r}",
            where="config.loss",
            fix="give a whole number, 1 for every example",
        )
