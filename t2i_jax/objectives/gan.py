"""A conditional GAN: the generator draws in one pass, the discriminator reads the caption.

The game is relativistic, with zero-centred gradient penalties on real and drawn pictures (R3GAN,
arXiv:2501.05441). Pictures beside captions of others are a third kind (arXiv:1605.05396). Pictures
and captions are contrasted over the global batch (XMC-GAN, arXiv:2101.04702).

B batch · H W pixels · C channels · T regions · L words · Z noise · D width
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields, losses, optim, plugins, randomness
from t2i_jax.models import augment as augmentation
from t2i_jax.models.types import Cond
from t2i_jax.objective import Aux, Loss, Objective, OfBatch, Pictures, together
from t2i_jax.objectives.parts import critic, distillation, games, guidance, networks, terms
from t2i_jax.objectives.parts.critic import Critic
from t2i_jax.objectives.parts.terms import Term
from t2i_jax.text import conditioner

NETS = ("gen", "disc", "eye", "clip", "teacher")  # that config.model describes
# The order of the nets' random keys. In another order, random frozen nets of a run that goes on
# would be others than it began with. Nets that terms add beside these come after them.
KEYS = ("text", "gen", "disc", "eye", "clip_image", "clip_caption", "teacher", "spectral")


Positive = Annotated[float, fields.above(0)]
Shares = Annotated[tuple[float, float], fields.between(0, 1)]


class Options(NamedTuple):
    """config.loss.

    game: which adversarial game, one of `games.GAMES`.
    penalty: of the discriminator's slope at real (R1) and at drawn images (R2), see `games.slopes`;
      "none" leaves it out.
    gamma: weight of half the squared slope at the first step and at the last, on a cosine between.
    penalty_stride: every n-th example of a batch is penalised, and counts n-fold. That is as lazy
      as a penalty of all at every n-th step, but of one program: XLA:CPU runs convolutions within
      a conditional through naive code, thirty times as slow.
    sigma: of the estimate.
    mismatch: weight of real images beside captions of others.
    sentence, word: weights of the contrastive losses, in both nets' losses. These and `mismatch`
      compare the examples of a batch, which is not cut then: `Loss.compares`.
    temperature: that scores of the contrastive losses are divided by.
    adversarial: weight of the game and of the contrastive losses in the generator's loss, the λ of
      L_CLIP + λ·L_GAN.
    clip: weight in the generator's loss of images' distance from their captions by a frozen dual
      encoder, see `parts.guidance`.
    distance: which distance, one of `guidance.DISTANCES`.
    distil: weight in the generator's loss of images' distance from those that a trained flow model
      goes on to, see `parts.distillation`. Pixels are compared, and feature maps where there is a
      frozen network: the one that the discriminator reads, or else the one that guides.
    distil_stride: every n-th example of a batch is compared.
    distil_times: the times between which the flow model starts, 1 is noise.
    teacher: options of the flow model's `img2img`.
    augment: what is done to images before the discriminator reads them, of `models.augment.KINDS`.
    augment_share: share of the images that each of these changes, as `gamma` over the steps.
    spectral_norm: kernels of the discriminator keep their largest singular value at 1 at most.
    """

    game: Annotated[str, fields.one_of(games.GAMES)] = "relativistic"
    penalty: Annotated[str, fields.one_of(games.PENALTIES)] = "exact"
    gamma: Annotated[tuple[float, float], fields.at_least(0)] = (0.5, 0.05)
    penalty_stride: fields.Size = 4
    sigma: Positive = 0.01
    mismatch: fields.Weight = 0.5
    sentence: fields.Weight = 0.1
    word: fields.Weight = 0.1
    temperature: Positive = 0.1
    adversarial: fields.Weight = 1.0
    clip: fields.Weight = 0.0
    distance: Annotated[str, fields.one_of(guidance.DISTANCES)] = "spherical"
    distil: fields.Weight = 0.0
    distil_stride: fields.Size = 4
    distil_times: Annotated[Shares, fields.ascending()] = (0.5, 0.9)
    teacher: Mapping = {}
    augment: Annotated[tuple[str, ...], fields.one_of(augmentation.KINDS)] = ()
    augment_share: Shares = (0.0, 0.3)
    spectral_norm: bool = False


def model_by_net(model, load):
    """`config.model`, where older versions wrote sizes of both nets without their names."""
    return networks.by_net(model, load)


def outputs(config):
    """What `prediction` says of nets that are flow networks: the generator and the teacher."""
    said = {name: config.model.get(name, {}).get("prediction") for name in ("gen", "teacher")}
    return {name: prediction for name, prediction in said.items() if prediction}


def make(config) -> Objective:
    """Nets "disc", "gen" and the frozen "text", perhaps "eye"; predictions sample, between, encode,
    score, gap.

    `config.model.gen` and `.disc` hold their sizes and `network`, "convolutional" or "mlp". With
    `backbone` in `gen` (and `prediction`) the generator is that flow network in one step.

    With the frozen net "eye" the discriminator reads feature maps in place of images: those of an
    image tower of `objectives.clip`, which `config.model.eye` describes, or of the image network
    of `pretrained` that `config.load.eye` names.
    `config.model.clip`, as the model of `objectives.clip`, is the dual encoder that guides: frozen
    nets "clip_image", "clip_caption".
    `config.model.teacher` describes, as `gen`, the flow network of frozen net "teacher" to distil.
    """
    gan = build(config)
    options = gan.options
    contrasts = bool(options.sentence or options.word)
    disc = Loss(("disc",), gan.disc_loss, compares=contrasts or bool(options.mismatch))
    gen = Loss(("gen",), gan.gen_loss, compares=contrasts)
    predict = {"sample": gan.sample, "between": gan.between, "encode": gan.text.encode}
    predict |= {"score": gan.score, "gap": gan.gap}
    return Objective(gan.init, (disc, gen), predict, training_only=terms.nets_of(gan.terms))


def build(config) -> "GAN":
    """The parts that a config describes, checked."""
    options = fields.build(Options, config.loss, where="config.loss")
    plugins.check_nets(config.model, NETS)
    generator = networks.generator(config)
    own_critic = critic.make(
        config,
        augment=options.augment,
        augment_share=options.augment_share,
        spectral_norm=options.spectral_norm,
    )
    text = conditioner.Conditioner(config)
    added = _terms(config, options, generator, own_critic)
    return GAN(options, text, generator, own_critic, added, config.batch_size, config.steps)


def _terms(config, options, generator, critic: Critic) -> dict[str, Term]:
    """The terms of the generator's loss that have a weight, by the names of their metrics."""
    added, maps = {}, critic.maps if critic.features else None
    if options.clip:
        guide = guidance.make(config)
        added["clip"] = guide.term(options.clip, options.distance)
        maps = maps or guide.maps
    if options.distil:
        added["distil"] = distillation.term(
            config,
            weight=options.distil,
            stride=options.distil_stride,
            times=options.distil_times,
            options=options.teacher,
            noise_shape=generator.z_shape,
            maps=maps,
        )
    return added


class Drawn(NamedTuple):
    """What a step begins with: drawn images, their condition, and keys for all that follows.

    augment_B, slope_B: keys of each example, of the augmentation and of the penalty's noise.
    """

    cond: Cond
    image_BHWC: jax.Array
    keys: terms.Keys
    augment_B: jax.Array
    slope_B: jax.Array


class GAN(NamedTuple):
    """The parts of the family; its methods are the losses and predictions that `make` names.

    terms: name -> a term of the generator's loss beside the game.
    """

    options: Options
    text: conditioner.Conditioner
    generator: nn.Module
    critic: Critic
    terms: Mapping[str, Term]
    batch_size: int
    steps: int

    def init(self, key, batch):
        """Every net's variables: see `Objective`."""
        names = (*KEYS, *(name for name in terms.nets_of(self.terms) if name not in KEYS))
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        text_variables, cond = self.text.init(keys["text"], batch)
        z_B = jnp.zeros((len(batch["index"]), *self.generator.z_shape))
        nets = {"text": text_variables, "gen": self.generator.init(keys["gen"], z_B, cond)}
        nets |= terms.init(self.terms, keys, batch, cond)
        return nets | self.critic.init(keys, jnp.zeros(batch["image"].shape), cond)

    # --- losses -----------------------------------------------------------------------------------

    def disc_loss(self, nets, batch, key, step):
        """The game, the contrast, images beside captions of others, and the penalties."""
        options, critic, weight_B = self.options, self.critic, batch["weight"]
        game, _ = games.GAMES[options.game]
        # No stop_gradient is needed: the loss is differentiated for the discriminator alone.
        drawn = self._drawn(nets, batch, key)
        # Once a step is enough: the generator's loss then sees the same vectors.
        nets, mutated = critic.advanced(nets)
        conds = (drawn.cond,)
        if options.mismatch:
            conds += (games.shuffled(drawn.cond, batch),)
        real, *mismatched = critic.judge(nets, batch["image"], conds, drawn.augment_B, step)
        fake_B = critic.logit(nets, drawn.image_BHWC, drawn.cond, drawn.augment_B, step)
        mean = lambda value_B: losses.weighted_mean(value_B, weight_B)
        value = mean(game(real.logit_B, fake_B)) + self._contrast(real, drawn.cond, batch)
        metrics = {"gap": mean(real.logit_B - fake_B), "real": mean(real.logit_B)}
        for other in mismatched:
            other_B = games.is_other(batch)
            value += options.mismatch * mean(game(real.logit_B, other.logit_B) * other_B)
            gap_B = real.logit_B - other.logit_B
            metrics["mismatch_gap"] = losses.weighted_mean(gap_B, weight_B * other_B)
        if options.penalty != "none":
            penalties = self._penalties(nets, batch, drawn, step)
            gamma = optim.annealed(options.gamma, step, self.steps)
            value += 0.5 * gamma * (penalties["r1"] + penalties["r2"])
            metrics |= penalties
        return value, Aux(metrics, mutated)

    def gen_loss(self, nets, batch, key, step):
        """The game and the contrast, weighted by `adversarial`, and the other terms."""
        options, critic = self.options, self.critic
        _, game = games.GAMES[options.game]
        drawn, real_B = self._drawn(nets, batch, key), 0.0
        (fake,) = critic.judge(nets, drawn.image_BHWC, (drawn.cond,), drawn.augment_B, step)
        # Other games' generators are not compared with real images, which saves a pass.
        if options.game == "relativistic":
            real_B = critic.logit(nets, batch["image"], drawn.cond, drawn.augment_B, step)
        value = losses.weighted_mean(game(real_B, fake.logit_B), batch["weight"])
        value = options.adversarial * (value + self._contrast(fake, drawn.cond, batch))
        drawn = drawn.image_BHWC, drawn.cond, batch, drawn.keys
        value, metrics = terms.add(value, self.terms, nets, *drawn, self.batch_size)
        return value, Aux(metrics)

    def _drawn(self, nets, batch, key) -> Drawn:
        key_noise, key_choice, key_examples = jax.random.split(key, 3)
        cond = self.text.encode(nets, batch)
        image_BHWC = self._draw(nets, cond, randomness.per_example(key_noise, batch["index"]))
        keys_B = randomness.per_example(key_examples, batch["index"])
        augment_B, slope_B = randomness.split_each(keys_B, 2)
        return Drawn(cond, image_BHWC, terms.Keys(key_noise, key_choice), augment_B, slope_B)

    def _draw(self, nets, cond, keys_B):
        z_B = randomness.normal_each(keys_B, self.generator.z_shape)
        return self.generator.apply(nets["gen"], z_B, cond)

    def _contrast(self, judgement, cond, batch):
        options = self.options
        weighted = dict(sentence=options.sentence, word=options.word)
        return games.contrast(judgement, cond, batch, temperature=options.temperature, **weighted)

    def _penalties(self, nets, batch, drawn: Drawn, step):
        """The mean squared slope at real (R1) and at drawn (R2) images."""
        options = self.options
        some, mean = terms.every(options.penalty_stride, batch, self.batch_size)
        alone = some(drawn.cond), some(drawn.augment_B), step
        logit = lambda image_BHWC: self.critic.logit(nets, image_BHWC, *alone)
        slope = games.slopes(options.penalty, logit, some(drawn.slope_B), options.sigma)
        images = {"r1": batch["image"], "r2": drawn.image_BHWC}
        return {name: mean(slope(some(x))) for name, x in images.items()}

    # --- predictions ------------------------------------------------------------------------------

    def sample(self, nets, batch, key, *, truncation: fields.Weight = 1.0) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          truncation: how far the style lies from its mean over noise, given the caption: below 1,
            images are nearer to what the caption usually gives, and less varied.
        """
        return self._render(nets, *self._style(nets, batch, key, truncation))

    @together
    def between(
        self,
        nets,
        batch,
        key,
        *,
        share: fields.Share = 0.0,
        truncation: fields.Weight = 1.0,
    ) -> Pictures:
        """Images on the way from each example's to the next one's, the last's to the first's.

        Noise or style and caption states go together.   -> image_BHWC in [-1, 1]

        Args:
          share: of the way, 0 … 1.
          truncation: as of `sample`.
        """
        style_B, cond = self._style(nets, batch, key, truncation)
        follow = lambda tree: jax.tree.map(lambda x: jnp.roll(x, -1, 0), tree)
        mix = lambda a, b: (1 - share) * a + share * b
        style_B = self.generator.between(style_B, follow(style_B), share)
        other = follow(cond)
        # At either end the caption that has no share is not read.
        either_BL = (cond.mask_BL & (share < 1)) | (other.mask_BL & (share > 0))
        cond = Cond(
            mix(cond.seq_BLD, other.seq_BLD), either_BL, mix(cond.pooled_BD, other.pooled_BD)
        )
        return self._render(nets, style_B, cond)

    def score(self, nets, batch, key):
        """The discriminator's logits of a batch's images beside their captions.   -> B"""
        return self.critic.logit(nets, batch["image"], self.text.encode(nets, batch))

    def gap(self, nets, batch, key) -> OfBatch:
        """How far the discriminator puts a batch's images above drawn ones, as in `disc_loss`.

        Of images that it never saw: a gap that stays behind the training's "disc/gap" says that
        it knows its own by heart (arXiv:2006.06676, section 3).   -> (1,) logits
        """
        cond = self.text.encode(nets, batch)
        fake_BHWC = self._draw(nets, cond, randomness.per_example(key, batch["index"]))
        real_B, fake_B = (
            self.critic.logit(nets, image_BHWC, cond) for image_BHWC in (batch["image"], fake_BHWC)
        )
        return losses.weighted_mean(real_B - fake_B, batch["weight"])[None]

    def _style(self, nets, batch, key, truncation):
        """Styles and caption states."""
        cond, keys_B = self.text.encode(nets, batch), randomness.per_example(key, batch["index"])
        z_B = randomness.normal_each(keys_B, self.generator.z_shape)
        style_B = self.generator.apply(nets["gen"], z_B, cond, method="style")

        def truncated():
            mean_B = self.generator.apply(nets["gen"], cond, method="mean_style")
            return mean_B + truncation * (style_B - mean_B)

        # The mean takes the styles of many draws. At 1 it would change nothing.
        return jax.lax.cond(truncation == 1, lambda: style_B, truncated), cond

    def _render(self, nets, style_B, cond):
        return jnp.clip(self.generator.apply(nets["gen"], style_B, cond, method="draw"), -1, 1)
