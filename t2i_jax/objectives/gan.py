"""A conditional GAN: the generator draws in one pass, the discriminator reads the caption.

Relativistic pairing with zero-centred gradient penalties on real and drawn pictures (R3GAN,
arXiv:2501.05441), pictures beside captions of others as a third kind (arXiv:1605.05396), and
contrastive losses of pictures and captions over the global batch (XMC-GAN, arXiv:2101.04702).

B batch · H W pixels · C channels · T regions · L words · Z noise · D width
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, losses, optim, plugins, randomness, weights
from t2i_jax.models import augment, backbone, gan, mlp, pyramid, spectral
from t2i_jax.models import clip as clip_models
from t2i_jax.models.types import Cond
from t2i_jax.objective import Aux, Loss, Objective
from t2i_jax.objectives import clip, flow
from t2i_jax.pretrained import image_network
from t2i_jax.sampling import ode, prediction
from t2i_jax.text import conditioner


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
NETWORKS = {"convolutional": gan, "mlp": mlp}
PENALTIES = ("exact", "estimate", "none")
DISTANCES = {"spherical": losses.spherical, "cosine": lambda a_BP, b_BP: 1 - (a_BP * b_BP).sum(-1)}


class Options(NamedTuple):
    """config.loss.

    game: one of GAMES.
    penalty: of the discriminator's slope at real (R1) and at drawn (R2) pictures: "exact", its
      gradient, or "estimate", the first-order ‖D(x) − D(x + σε)‖²/σ² (arXiv:2501.08316), or "none".
    gamma: the penalties' weight at the first step and at the last, half the squared slope's; on a
      cosine between, as `augment_share`.
    penalty_stride: every n-th example of a batch is penalised, and counts n-fold: as lazy as a
      penalty of all at every n-th step, but of one program. XLA:CPU runs convolutions within a
      conditional through naive code, thirty times as slow.
    sigma: of the estimate.
    mismatch: weight of real pictures beside captions of others.
    sentence, word: weights of the contrastive losses, in both nets' losses beside the game. These
      and `mismatch` compare the examples of a batch, which is not cut then: `Loss.compares`.
    temperature: of these.
    adversarial: weight of all of these in the generator's loss, the λ of L_CLIP + λ·L_GAN.
    clip: weight there of how far the picture's embedding by a frozen dual encoder lies from its
      caption's.
    distance: "spherical", the squared angle, as guides of CLIP use it (StyleGAN-T,
      arXiv:2301.09515, section 3.3), or "cosine", 1 − cos, a plain text term beside the image's.
    distil: weight there of how far pictures lie from what a trained flow model makes of them: it
      goes on from a point on the straight line between noise and picture. The squared error of
      pixels is added to that of the maps of a frozen network, the one the discriminator sees
      through or else the one that guides, if there is one.
    distil_stride: every n-th example of a batch is compared.
    distil_times: where the point lies, a time between these for each batch, 1 is noise.
    teacher: options of the flow model's `img2img`.
    augment: what is done to pictures before the discriminator sees them, of `augment.KINDS`.
    augment_share: how many of them each of these changes, at the first step and at the last.
    spectral_norm: kernels of the discriminator keep their largest singular value at 1 at most.
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
    adversarial: float = 1.0
    clip: float = 0.0
    distance: str = "spherical"
    distil: float = 0.0
    distil_stride: int = 4
    distil_times: tuple[float, float] = (0.5, 0.9)
    teacher: Mapping[str, Any] = {}
    augment: tuple[str, ...] = ()
    augment_share: tuple[float, float] = (0.0, 0.3)
    spectral_norm: bool = False


def make(config) -> Objective:
    """Nets "disc", "gen" and the frozen "text", perhaps "eye"; predictions sample, between, encode,
    score, gap.

    `config.model` holds sizes of the generator and the discriminator, and in `gen` and `disc` those
    of one of them; `network` there is "convolutional" or "mlp". With `backbone` in `gen` (and
    `prediction`) the generator is that flow network in one step. With a frozen net "eye" the
    discriminator sees pictures through it: an image tower of `objectives.clip`, which `eye` in
    `config.model` describes, or the image network of `pretrained` that config.load.eye names.
    `clip` there, as the model of `objectives.clip`, is the dual encoder that guides: frozen nets
    "clip_image", "clip_caption".
    `teacher` there describes, as `gen`, the flow network of frozen net "teacher" to distil.
    """
    options = plugins.call(Options, where="config.loss", options=config.loss)
    _check(options)
    generator, discriminator, eye = _networks(config)
    guide, guide_caption = _guide(config, options)
    teacher = _teacher(config, options, generator)
    text = conditioner.Conditioner(config)
    disc_game, gen_game = GAMES[options.game]

    def init(key, batch):
        names = ("text", "gen", "disc", "eye", "clip_image", "clip_caption", "teacher", "spectral")
        key = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        text_variables, cond = text.init(key["text"], batch)
        b = batch["text"].shape[0]
        image_BHWC = jnp.zeros((b, config.res, config.res, 3))
        nets = {
            "gen": generator.init(key["gen"], jnp.zeros((b, *generator.z_shape)), cond),
            "text": text_variables,
        }
        if guide:
            nets["clip_image"] = guide.init(key["clip_image"], image_BHWC)
        if guide_caption:
            nets["clip_caption"] = guide_caption.init(key["clip_caption"], cond)
        elif guide:
            clip.check_width(guide, cond)
        if eye:
            nets["eye"] = eye.init(key["eye"], image_BHWC)
        if teacher:
            nets["teacher"] = teacher.init(key["teacher"], batch)["model"]
        nets["disc"] = discriminator.init(key["disc"], features_of(nets, image_BHWC), cond)
        if options.spectral_norm:
            vectors = spectral.start(nets["disc"]["params"], key["spectral"])
            nets["disc"] = {**nets["disc"], spectral.COLLECTION: vectors}
        return nets

    def draw(nets, cond, keys_B):
        z_B = randomness.normal_each(keys_B, generator.z_shape)
        return generator.apply(nets["gen"], z_B, cond)

    def features_of(nets, image_BHWC):
        """What the discriminator gets to see of pictures."""
        return eye.features_of(nets["eye"], image_BHWC) if eye else image_BHWC

    def discriminate(nets, image_BHWC, conds, keys_B=None, step=None) -> tuple[gan.Judgement, ...]:
        """The discriminator's view of pictures beside each condition; in training, at a step,
        augmented by examples' keys.
        """
        if options.augment and step is not None:
            share = optim.annealed(options.augment_share, step, config.steps)
            image_BHWC = augment.augmented(options.augment, image_BHWC, keys_B, share)
        variables = nets["disc"]
        if options.spectral_norm:
            vectors = variables[spectral.COLLECTION]
            variables = {"params": spectral.bounded(variables["params"], vectors)}
        return discriminator.apply(variables, features_of(nets, image_BHWC), *conds)

    def generate(nets, batch, key):
        """The condition, drawn pictures, their noise's key and one more; keys of examples: the
        augmentation's and the penalty's.
        """
        key_noise, key_more, key_rest = jax.random.split(key, 3)
        cond = text.encode(nets, batch)
        fake_BHWC = draw(nets, cond, randomness.per_example(key_noise, batch["index"]))
        augment_B, slope_B = randomness.split_each(
            randomness.per_example(key_rest, batch["index"]), 2
        )
        return cond, fake_BHWC, (key_noise, key_more), augment_B, slope_B

    def contrast(seen: gan.Judgement, cond, batch):
        """The contrastive losses' sum."""
        different_BB, value = losses.different_captions(batch["text"], batch["mask"]), 0.0
        nce = lambda scores_NN: losses.info_nce(
            scores_NN / options.temperature, different_BB, batch["weight"]
        )
        if options.sentence:
            value += options.sentence * nce(seen.image_BD @ seen.text_BD.T)
        if options.word:
            scores_NN = gan.pairs_word_scores(seen.regions_BTD, seen.words_BLD, cond.mask_BL)
            value += options.word * nce(scores_NN)
        return value

    def disc_loss(nets, batch, key, step):
        cond, fake_BHWC, _, augment_B, slope_B = generate(nets, batch, key)
        mutated = {}
        if options.spectral_norm:
            params, vectors = nets["disc"]["params"], nets["disc"][spectral.COLLECTION]
            mutated = {"disc": {spectral.COLLECTION: spectral.advanced(params, vectors)}}
            nets = {**nets, "disc": {"params": params, **mutated["disc"]}}
        conds = (cond, shuffled(cond, batch)) if options.mismatch else (cond,)
        seen, *wrong = discriminate(nets, batch["image"], conds, augment_B, step)
        (seen_fake,) = discriminate(nets, fake_BHWC, (cond,), augment_B, step)
        weight_B = batch["weight"]
        mean = lambda value_B: losses.weighted_mean(value_B, weight_B)
        value = mean(disc_game(seen.logit_B, seen_fake.logit_B)) + contrast(seen, cond, batch)
        metrics = {"gap": mean(seen.logit_B - seen_fake.logit_B), "real": mean(seen.logit_B)}
        for other in wrong:
            loss_B = disc_game(seen.logit_B, other.logit_B) * is_other(batch)
            value += options.mismatch * mean(loss_B)
            gap_B, with_other_B = seen.logit_B - other.logit_B, weight_B * is_other(batch)
            metrics["mismatch_gap"] = losses.weighted_mean(gap_B, with_other_B)
        if options.penalty != "none":
            some, mean_of_some = every(options.penalty_stride, batch, config.batch_size)
            alone = (some(cond),), some(augment_B), step
            logit = lambda image_BHWC: discriminate(nets, image_BHWC, *alone)[0].logit_B
            slope = _slopes(options, logit, some(slope_B))
            r1, r2 = (mean_of_some(slope(some(x))) for x in (batch["image"], fake_BHWC))
            value += 0.5 * optim.annealed(options.gamma, step, config.steps) * (r1 + r2)
            metrics |= {"r1": r1, "r2": r2}
        return value, Aux(metrics, mutated)

    def gen_loss(nets, batch, key, step):
        cond, fake_BHWC, keys, augment_B, _ = generate(nets, batch, key)
        (seen_fake,), real_B = discriminate(nets, fake_BHWC, (cond,), augment_B, step), 0.0
        if options.game == "relativistic":
            real_B = discriminate(nets, batch["image"], (cond,), augment_B, step)[0].logit_B
        mean = lambda value_B: losses.weighted_mean(value_B, batch["weight"])
        value = mean(gen_game(real_B, seen_fake.logit_B)) + contrast(seen_fake, cond, batch)
        value, metrics = options.adversarial * value, {}
        if guide:
            metrics["clip"] = mean(clip_distance(nets, fake_BHWC, cond))
            value += options.clip * metrics["clip"]
        if teacher:
            some, mean_of_some = every(options.distil_stride, batch, config.batch_size)
            wanted_BHWC = teacher_images(nets, some(batch | {"image": fake_BHWC}), *keys)
            error_B = perceptual_error(nets, some(fake_BHWC), wanted_BHWC)
            metrics["distil"] = mean_of_some(error_B)
            value += options.distil * metrics["distil"]
        return value, Aux(metrics)

    def teacher_images(nets, batch, key_noise, key_time):
        """How the flow model goes on from the batch's pictures and the noise they came from."""
        low, high = options.distil_times
        strength = jax.random.uniform(key_time, minval=low, maxval=high)
        known = {"model": nets["teacher"], "text": nets["text"]}
        img2img = teacher.predict["img2img"]
        image_BHWC = img2img(known, batch, key_noise, strength=strength, **options.teacher)
        return jax.lax.stop_gradient(image_BHWC)

    def perceptual_error(nets, a_BHWC, b_BHWC):
        """Squared error of pixels, and that of maps through the eye or else the guide."""
        error_B = losses.squared_error(a_BHWC, b_BHWC)
        if eye:
            maps = lambda x: features_of(nets, x)
        elif guide:
            maps = lambda x: guide.apply(nets["clip_image"], x).maps
        else:
            return error_B
        pairs = zip(maps(a_BHWC), maps(b_BHWC), strict=True)
        scaled = lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        errors_MB = [losses.squared_error(scaled(a), scaled(b)) for a, b in pairs]
        return error_B + sum(errors_MB) / len(errors_MB)

    def clip_distance(nets, image_BHWC, cond):
        image_BP = losses.unit(guide.apply(nets["clip_image"], image_BHWC).pooled_BD)
        text_BP = cond.pooled_BD
        if guide_caption:
            text_BP = guide_caption.apply(nets["clip_caption"], cond)
        return DISTANCES[options.distance](image_BP, losses.unit(text_BP))

    def sample(nets, batch, key, *, truncation=1.0):
        """Pictures for captions.   -> image_BHWC in [-1, 1]

        Args:
          truncation: how far the style lies from its mean over noise, given the caption: below 1,
            pictures are nearer to what the caption usually gives, and less varied.
        """
        return render(nets, *style_of(nets, batch, key, truncation))

    def between(nets, batch, key, *, share=0.0, truncation=1.0):
        """Pictures on the way from each example's to the next one's, the last's to the first's.

        Noise or style and caption states go together.   -> image_BHWC in [-1, 1]

        Args:
          share: of the way, 0 … 1.
          truncation: as of `sample`.
        """
        style_B, cond = style_of(nets, batch, key, truncation)
        follow = lambda tree: jax.tree.map(lambda x: jnp.roll(x, -1, 0), tree)
        mix = lambda a, b: (1 - share) * a + share * b
        style_B = generator.between(style_B, follow(style_B), share)
        other = follow(cond)
        either_BL = (cond.mask_BL & (share < 1)) | (other.mask_BL & (share > 0))
        cond = Cond(
            mix(cond.seq_BLD, other.seq_BLD), either_BL, mix(cond.pooled_BD, other.pooled_BD)
        )
        return render(nets, style_B, cond)

    def style_of(nets, batch, key, truncation):
        """Styles and caption states."""
        cond, keys_B = text.encode(nets, batch), randomness.per_example(key, batch["index"])
        z_B = randomness.normal_each(keys_B, generator.z_shape)
        style_B = generator.apply(nets["gen"], z_B, cond, method="style")

        def truncated():
            mean_B = generator.apply(nets["gen"], cond, method="mean_style")
            return mean_B + truncation * (style_B - mean_B)

        return jax.lax.cond(truncation == 1, lambda: style_B, truncated), cond

    def render(nets, style_B, cond):
        return jnp.clip(generator.apply(nets["gen"], style_B, cond, method="draw"), -1, 1)

    def score(nets, batch, key):
        """The discriminator's logits of a batch's pictures beside their captions.   -> B"""
        return discriminate(nets, batch["image"], (text.encode(nets, batch),))[0].logit_B

    def gap(nets, batch, key):
        """How far the discriminator puts a batch's pictures above drawn ones, as in `disc_loss`.

        Of pictures that it never saw: a gap that stays behind the training's "disc/gap" says that
        it knows its own by heart (arXiv:2006.06676, section 3).   -> (1,) logits
        """
        cond = text.encode(nets, batch)
        fake_BHWC = draw(nets, cond, randomness.per_example(key, batch["index"]))
        real_B, fake_B = (
            discriminate(nets, image_BHWC, (cond,))[0].logit_B
            for image_BHWC in (batch["image"], fake_BHWC)
        )
        return losses.weighted_mean(real_B - fake_B, batch["weight"])[None]

    predict = {"sample": sample, "between": between, "encode": text.encode, "score": score}
    predict["gap"] = gap
    contrasts = bool(options.sentence or options.word)
    disc = Loss(("disc",), disc_loss, compares=contrasts or bool(options.mismatch))
    gen = Loss(("gen",), gen_loss, compares=contrasts)
    unread = ("clip_image", "clip_caption", "teacher")
    return Objective(init, (disc, gen), predict, training_only=unread)


def _networks(config):
    """The generator, the discriminator, and what the latter sees through, or None."""
    shared = dict(config.model)
    parts = ("gen", "disc", "eye", "clip", "teacher")
    own = {name: dict(shared.pop(name, {})) for name in parts}
    network = shared.pop("network", "convolutional")
    if network not in NETWORKS:
        raise errors.unknown("network", network, NETWORKS, where="config.model")
    eye = _eye(config, own["eye"])
    kinds = {"disc": gan.Projected if eye else NETWORKS[network].Discriminator}
    if "backbone" not in own["gen"]:
        kinds["gen"] = NETWORKS[network].Generator
    fields = {name: kind.__dataclass_fields__ for name, kind in kinds.items()}
    for where, sizes in (("", shared), (".gen", own["gen"]), (".disc", own["disc"])):
        if "res" in sizes:
            raise errors.ConfigError(
                "the networks' side is the pictures'",
                where=f"config.model{where}.res",
                fix="set config.res",
            )
    known = {*parts, "network"}.union(*fields.values())
    for size in shared:
        if size not in known:
            raise errors.unknown("option", size, known, where="config.model")

    def build(name):
        given = {size: shared[size] for size in shared if size in fields[name]} | own[name]
        if "res" in fields[name]:
            given["res"] = config.res
        if "least" in fields[name]:
            pyramid.check(config.res)
        return plugins.network(kinds[name], where=f"config.model.{name}", options=given)

    discriminator = build("disc")
    if "gen" in kinds:
        return build("gen"), discriminator, eye
    kind = own["gen"].pop("prediction", "v")
    prediction.check(kind, "config.model.gen")
    net = backbone.build(own["gen"], res=config.res, where="config.model.gen")
    return gan.OneStep(net, config.res, kind), discriminator, eye


def _eye(config, sizes):
    """What the discriminator sees through, or None."""
    if sizes:
        tower = clip.tower(sizes, res=config.res, where="config.model.eye")
        return _Eye(clip_models.Image(tower), tower.res)
    source = config.load.get("eye")
    if not source:
        return None
    if weights.is_ours(source):
        raise errors.ConfigError(
            f"{source} does not say what net it is",
            where="config.load.eye",
            fix="describe it in config.model.eye, as configs/shapes_gan.py:projected does",
        )
    net = image_network.make(source)
    return _Eye(net, net.res)


class _Eye(NamedTuple):
    """An image network to see through, of pictures of `res` pixels a side."""

    net: nn.Module
    res: int

    def init(self, key, image_BHWC):
        return self.net.init(key, self._resized(image_BHWC))

    def features_of(self, variables, image_BHWC):
        return self.net.apply(variables, self._resized(image_BHWC)).maps

    def _resized(self, image_BHWC):
        if image_BHWC.shape[1] == self.res:
            return image_BHWC
        return jax.image.resize(image_BHWC, (len(image_BHWC), self.res, self.res, 3), "bilinear")


def _guide(config, options):
    """The dual encoder that guides, its two towers; None without a weight."""
    if not options.clip:
        return None, None
    source = config.load.get("clip_image")
    model = config.model.get("clip", {})
    return clip.towers(model, res=config.res, source=source, where="config.model.clip")


def _teacher(config, options, generator):
    """The flow model to distil as an objective, or None without a weight."""
    if not options.distil:
        return None
    sizes = dict(config.model.get("teacher", {}))
    own = copy.deepcopy(config)
    own.loss, own.model = dict(prediction=sizes.pop("prediction", "v")), sizes
    if generator.z_shape != (config.res, config.res, 3):
        raise errors.ConfigError(
            "the generator draws from other noise than a flow model",
            where="config.loss.distil",
            fix="describe a flow network in config.model.gen, as configs/shapes_gan_from_flow.py",
        )
    family, where = flow.make(own), "config.loss.teacher"
    plugins.check_options(family.predict["img2img"], options.teacher, where=where, given=3)
    if "strength" in options.teacher:
        raise errors.ConfigError(
            "strength is drawn for each batch", where=where, fix="set config.loss.distil_times"
        )
    if "sampler" in options.teacher:
        ode.check(options.teacher["sampler"], where)
    return family


def _slopes(options: Options, logit, keys_B):
    """image_BHWC -> ‖∇D‖² of each example, or its first-order estimate."""
    if options.penalty == "exact":
        gradient = jax.grad(lambda image_BHWC: logit(image_BHWC).sum())
        return lambda image_BHWC: jnp.square(gradient(image_BHWC)).sum((1, 2, 3))

    def estimate(image_BHWC):
        noise_BHWC = randomness.normal_each(keys_B, image_BHWC.shape[1:])
        with jax.default_matmul_precision("float32"):  # a small difference of large numbers
            still_B, moved_B = map(logit, (image_BHWC, image_BHWC + options.sigma * noise_BHWC))
        return jnp.square((still_B - moved_B) / options.sigma)

    return estimate


def every(stride: int, batch, batch_size: int):
    """Every n-th slot of the global batch, however it is cut: (some, mean).

    Args:
      batch: of all slots or of a part of them, see `Objective`.
      batch_size: the number of all slots.
    Returns:
      some: tree of B -> tree of S, the examples of `batch` among them, or more.
      mean: value_S -> scalar, what they say of the mean over all examples that count. Like the
        loss, parts add up by their examples' weights.
    """
    index_B, weight_B = batch["index"], batch["weight"]
    n, share = len(index_B), -(-batch_size // stride) / batch_size
    if n % stride == 0:  # no gather, which would move pictures between devices
        some, counted = lambda tree: jax.tree.map(lambda x: x[::stride], tree), 1.0
    else:
        place_S = -index_B[0] % stride + stride * jnp.arange(-(-n // stride))
        some = lambda tree: jax.tree.map(lambda x: x[jnp.minimum(place_S, n - 1)], tree)
        counted = (place_S < n).astype(jnp.float32)

    def mean(value_S):
        found = (value_S * some(weight_B) * counted).sum()
        return found / jnp.maximum(share * weight_B.sum(), 1e-9)

    return some, mean


def partner(batch):
    """For each example the next in the batch, cyclically, with another caption; itself if none.

    An example of weight 0 is nobody's.
    """
    n = len(batch["index"])
    far_BB = (jnp.arange(n)[None] - jnp.arange(n)[:, None]) % n
    different_BB = losses.different_captions(batch["text"], batch["mask"]) & (batch["weight"] > 0)
    return jnp.argmin(jnp.where(different_BB, far_BB, n + (far_BB > 0)), 1)


def is_other(batch):
    """1 where `partner` found another caption."""
    own = jnp.arange(len(batch["index"]))
    return (partner(batch) != own).astype(jnp.float32)


def shuffled(cond: Cond, batch) -> Cond:
    """Every example's partner's condition."""
    return jax.tree.map(lambda x: x[partner(batch)], cond)


def _check(options: Options) -> None:
    for name, known in (("game", GAMES), ("penalty", PENALTIES), ("distance", DISTANCES)):
        if getattr(options, name) not in known:
            raise errors.unknown(name, getattr(options, name), known, where="config.loss")
    for name in options.augment:
        if name not in augment.KINDS:
            raise errors.unknown("augmentation", name, augment.KINDS, where="config.loss.augment")
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v)
    weight = lambda v: number(v) and v >= 0
    pair = lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(map(weight, v))
    shares = lambda v: pair(v) and max(v) <= 1
    times = lambda v: shares(v) and v[0] <= v[1]
    summed = ("mismatch", "sentence", "word", "adversarial", "clip", "distil")
    checks = {
        "gamma": (pair, "two weights, 0 or more, such as (0.5, 0.05)"),
        **dict.fromkeys(summed, (weight, "a number, 0 or more")),
        "augment_share": (shares, "two shares of 1"),
        "distil_times": (times, "two times of 1, the larger last"),
        **dict.fromkeys(
            ("sigma", "temperature"), (lambda v: number(v) and v > 0, "a positive number")
        ),
        **dict.fromkeys(
            ("penalty_stride", "distil_stride"),
            (lambda v: isinstance(v, int) and v >= 1, "a whole number, 1 for every example"),
        ),
    }
    for name, (fits, wanted) in checks.items():
        if not fits(getattr(options, name)):
            raise errors.ConfigError(
                f"{name} is {getattr(options, name)!r}", where="config.loss", fix=f"give {wanted}"
            )
