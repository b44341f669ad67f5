"""An autoencoder: pictures to few numbers or codes, and back. A family that draws nothing.

Latents are a normal for each number (arXiv:1312.6114, 2112.10752), the nearest entry of a codebook
(arXiv:1711.00937), or numbers rounded to levels (arXiv:2309.15505). A frozen image network may
compare pictures, and a critic may judge their patches (VQGAN, arXiv:2012.09841).

B batch · H W pixels · h w C latents · N = B·h·w places · K codes
"""

from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import fields, losses, objective, plugins, randomness
from t2i_jax.data import inputs
from t2i_jax.models import patches, quantise
from t2i_jax.models.types import Moments
from t2i_jax.objective import Aux, Loss, Objective, OfBatch, Pictures
from t2i_jax.objectives.parts import autoencoders, games, networks
from t2i_jax.objectives.parts.autoencoders import NET

CRITIC = "critic"
NETS = (NET, CRITIC, networks.FEATURES)  # that config.model describes
GAME = "nonsaturating"  # its generator needs no real picture, and it is stable with the penalty
TEMPERATURE = 0.01  # of squared distances, where codes are drawn softly (arXiv:2310.05737)


class Options(NamedTuple):
    """config.loss. A weight counts where there is what it weighs: `kl` where latents are a normal,
    `commitment`, `entropy` and `revival` where there is a codebook.

    The error of pixels is the mean of |x| plus that of x². Absolute errors keep edges sharp, and
    squared ones forbid that small things are lost.

    kl: weight of the latents' divergence from the standard normal, in nats a number of the picture.
    commitment: β of the pull of latents to their entries; that of entries to latents has weight 1.
    entropy: weight of the codes' entropy at a place less that over the batch, in nats.
    revival: weight of the pull of entries that a batch does not use to their nearest latents.
    perceptual: weight of the error of the frozen net's feature maps.
    adversarial: weight of the critic's game in the autoencoder's loss.
    delay: steps before the critic counts and learns: before, there is little to judge.
    r1: weight of half the squared slope of the critic at real pictures (arXiv:1801.04406).
    """

    kl: fields.Weight = 1e-6
    commitment: fields.Weight = 0.25
    entropy: fields.Weight = 0.0
    revival: fields.Weight = 1.0
    perceptual: fields.Weight = 1.0
    adversarial: fields.Weight = 0.1
    delay: Annotated[int, fields.at_least(0)] = 0
    r1: fields.Weight = 1.0


def make(config) -> Objective:
    """Nets "autoencoder", perhaps "critic" and the frozen "eye"; predictions reconstruct, moments,
    and where there are codes codes, code_shares. The metric "latent_rms" says how large latents of
    "kl" are; `scaling_factor` 1/it makes them as large as noise.

    `config.model`: `autoencoder`, see `parts.autoencoders`; `critic`, the sizes of
    `models.patches.Critic`, without which there is none; `eye`, a frozen image network, see
    `parts.networks.features`.
    """
    family = build(config)
    options, discrete = family.options, bool(family.net.num_codes)
    compares = family.entries and bool(options.entropy or options.revival)
    trains = [Loss((NET,), family.loss, compares=compares)]
    trains += [Loss((CRITIC,), family.critic_loss)] if family.critic else []
    predict = {"reconstruct": family.reconstruct, "moments": family.moments}
    if discrete:
        predict |= {"codes": family.codes, "code_shares": family.code_shares}
    read = inputs.picture(objective.size(config), augment=tuple(config.augment))
    frozen = (networks.FEATURES,) if family.eye else ()
    return Objective(family.init, tuple(trains), predict, training_only=frozen, inputs=(read,))


def build(config) -> "Family":
    """The parts that a config describes, checked."""
    options = fields.build(Options, config.loss, where="config.loss")
    plugins.check_nets(config.model, NETS)
    critic = None
    if CRITIC in config.model:
        where, sizes = f"config.model.{CRITIC}", config.model[CRITIC]
        critic = plugins.network(patches.Critic, where=where, options=sizes)
        critic.check(objective.size(config))
    return Family(options, autoencoders.of_config(config), critic, networks.features(config))


def diffusers(config):
    """The net that is written as a folder of diffusers, and its module; see `writer`."""
    return NET, autoencoders.of_config(config)


class Family(NamedTuple):
    """The parts of the family; its methods are the losses and predictions that `make` names."""

    options: Options
    net: nn.Module
    critic: nn.Module | None
    eye: networks.FeatureNetwork | None

    @property
    def entries(self) -> bool:
        """Whether there is a codebook, whose entries learn."""
        return hasattr(self.net, "entries")

    def init(self, key, batch):
        """Every net's variables: see `Objective`."""
        key_net, key_critic, key_eye = jax.random.split(key, 3)
        image_BHWC = jnp.zeros(batch["image"].shape)
        nets = {NET: self.net.init(key_net, image_BHWC)}
        if self.critic:
            nets[CRITIC] = self.critic.init(key_critic, image_BHWC)
        if self.eye:
            nets[networks.FEATURES] = self.eye.init(key_eye, image_BHWC)
        return nets

    # --- losses -----------------------------------------------------------------------------------

    def loss(self, nets, batch, key, step):
        """What is lost of pictures, and what their latents cost."""
        image_BHWC, weight_B = batch["image"], batch["weight"]
        moments, latent_BhwC, drawn_BHWC = self.through(nets, batch, key)
        terms = self.picture_terms(nets, drawn_BHWC, image_BHWC, step)
        if moments.logvar_BHWC is not None:
            terms["kl"] = (self.options.kl, divergence(moments) / image_BHWC[0].size)
        if self.entries:
            terms |= self.codebook_terms(nets, latent_BhwC)
        means = {name: losses.weighted_mean(x, weight_B) for name, (_, x) in terms.items()}
        value = sum(weight * means[name] for name, (weight, _) in terms.items())
        if self.entries:
            added, found = self.batch_terms(nets, latent_BhwC, weight_B)
            value, means = value + added, means | found
        if moments.logvar_BHWC is not None:
            power_B = jnp.square(latent_BhwC).mean((1, 2, 3))
            means["latent_rms"] = jnp.sqrt(losses.weighted_mean(power_B, weight_B))
        # Images span 2. The least is for a batch in which nothing counts.
        means["psnr"] = -10 * jnp.log10(jnp.maximum(means["squared"], 1e-9) / 4)
        return value, Aux(means)

    def through(self, nets, batch, key):
        """The latents' moments, latents drawn from them, and the images that these make."""
        moments = self.net.apply(nets[NET], batch["image"])
        latent_BhwC = autoencoders.drawn(moments, randomness.per_example(key, batch["index"]))
        return moments, latent_BhwC, self.decode(nets, latent_BhwC)

    def picture_terms(self, nets, drawn_BHWC, image_BHWC, step):
        """Name -> (weight, value_B) of what compares images or judges them."""
        options = self.options
        terms = {"squared": (1.0, losses.squared_error(drawn_BHWC, image_BHWC))}
        terms["absolute"] = (1.0, jnp.abs(drawn_BHWC - image_BHWC).mean((1, 2, 3)))
        if self.eye:
            maps = [self.eye.maps(nets[networks.FEATURES], x) for x in (drawn_BHWC, image_BHWC)]
            terms["perceptual"] = (options.perceptual, losses.map_error(*maps))
        if self.critic:
            fool = games.GAMES[GAME][1]
            value_B = fool(None, self.judged(nets, drawn_BHWC)).mean((1, 2))
            terms["adversarial"] = (options.adversarial * (step >= options.delay), value_B)
        return terms

    def codebook_terms(self, nets, latent_BhwC):
        """The same of the pulls of entries and latents to each other (arXiv:1711.00937, eq. 3)."""
        entry_BhwC = self.net.apply(nets[NET], latent_BhwC, method="quantise")
        still = jax.lax.stop_gradient
        codebook_B = losses.squared_error(still(latent_BhwC), entry_BhwC)
        commitment_B = losses.squared_error(latent_BhwC, still(entry_BhwC))
        return {
            "codebook": (1.0, codebook_B),
            "commitment": (self.options.commitment, commitment_B),
        }

    def batch_terms(self, nets, latent_BhwC, weight_B):
        """What keeps all entries in use: a part of the loss, and metrics."""
        options, found, value = self.options, {}, 0.0
        every_K = jnp.arange(self.net.num_codes)
        entry_KC = self.net.apply(nets[NET], every_K, method="values")
        latent_NC = latent_BhwC.reshape(-1, latent_BhwC.shape[-1])
        weight_N = jnp.repeat(weight_B, len(latent_NC) // len(weight_B))
        if options.entropy:
            logit_NK = -quantise.distances(latent_NC, entry_KC) / TEMPERATURE
            found["entropy"] = quantise.entropy_gap(logit_NK, weight_N)
            value += options.entropy * found["entropy"]
        if options.revival:
            found["unused"] = quantise.unused_error(latent_NC, entry_KC, weight_N)
            value += options.revival * found["unused"]
        return value, found

    def critic_loss(self, nets, batch, key, step):
        """The game against the autoencoder, patch by patch, and the penalty."""
        options, (game, _) = self.options, games.GAMES[GAME]
        _, _, drawn_BHWC = self.through(nets, batch, key)
        real_Bhw, fake_Bhw = (self.judged(nets, x) for x in (batch["image"], drawn_BHWC))
        value_B = game(real_Bhw, fake_Bhw).mean((1, 2))
        mean = lambda value_B: losses.weighted_mean(value_B, batch["weight"])
        metrics = {"gap": mean((real_Bhw - fake_Bhw).mean((1, 2)))}
        if options.r1:
            logit = lambda image_BHWC: self.judged(nets, image_BHWC).mean((1, 2))
            slope_B = games.slopes("exact", logit, None, 0.0)(batch["image"])
            metrics["r1"] = mean(slope_B)
            value_B += 0.5 * options.r1 * slope_B
        return mean(value_B) * (step >= options.delay), Aux(metrics)

    def decode(self, nets, latent_BhwC):
        return self.net.apply(nets[NET], latent_BhwC, method="decode")

    def judged(self, nets, image_BHWC):
        """The critic's logits of patches.   -> Bhw"""
        return self.critic.apply(nets[CRITIC], image_BHWC)

    # --- predictions ------------------------------------------------------------------------------

    def reconstruct(self, nets, batch, key) -> Pictures:
        """Images through the latents' means, or through codes, and back.   -> image_BHWC"""
        latent_BhwC = self.net.apply(nets[NET], batch["image"]).mean_BHWC
        return jnp.clip(self.decode(nets, latent_BhwC), -1, 1)

    def moments(self, nets, batch, key):
        """Images' latents.   -> mean BhwC, and logvar BhwC where latents are drawn"""
        return autoencoders.moments(self.net, nets, batch)

    def codes(self, nets, batch, key):
        """Images' codes.   -> int32 Bhw, 0 … K − 1"""
        return self.net.apply(nets[NET], batch["image"], method="codes")

    def code_shares(self, nets, batch, key) -> OfBatch:
        """The share of each code among all places of a batch.   -> K"""
        code_Bhw = self.codes(nets, batch, key)
        weight_Bhw = jnp.broadcast_to(batch["weight"][:, None, None], code_Bhw.shape)
        return quantise.shares(code_Bhw, weight_Bhw, self.net.num_codes)


def divergence(moments: Moments):
    """KL(N(mean, var) ‖ N(0, 1)) of each example's latents, in nats (1312.6114, appendix B).   -> B

    It is 0 where mean and logvar are.
    """
    mean_BHWC, logvar_BHWC = moments
    each_BHWC = jnp.square(mean_BHWC) + jnp.exp(logvar_BHWC) - 1 - logvar_BHWC
    return 0.5 * each_BHWC.sum((1, 2, 3))
