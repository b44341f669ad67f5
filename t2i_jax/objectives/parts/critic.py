"""A discriminator in training: augmented images, bounded kernels, features of a frozen network.

B batch · H W pixels · C channels
"""

from typing import NamedTuple

import flax.linen as nn

from t2i_jax import optim
from t2i_jax.models import augment as augmentation
from t2i_jax.models import gan, spectral
from t2i_jax.objectives.parts import networks


class Critic(NamedTuple):
    """Net "disc", and the frozen net of features that it reads images through, or None.

    augment: names of `models.augment.KINDS`.
    augment_share: of the images that each changes, at the first step and at the last.
    spectral_norm: whether kernels keep their largest singular value at 1 at most.
    steps: of the whole training.
    """

    net: nn.Module
    features: networks.FeatureNetwork | None
    augment: tuple[str, ...]
    augment_share: tuple[float, float]
    spectral_norm: bool
    steps: int

    def init(self, keys, image_BHWC, cond):
        """The nets, by names; `keys`: name of a net -> its random key, "spectral" the vectors'."""
        nets = {}
        if self.features:
            features_key = keys[networks.FEATURES]
            nets[networks.FEATURES] = self.features.init(features_key, image_BHWC)
        disc = self.net.init(keys["disc"], self._seen(nets, image_BHWC), cond)
        if self.spectral_norm:
            vectors = spectral.start(disc["params"], keys["spectral"])
            disc = {**disc, spectral.COLLECTION: vectors}
        return nets | {"disc": disc}

    def judge(self, nets, image_BHWC, conds, keys_B=None, step=None) -> tuple[gan.Judgement, ...]:
        """A judgement of images beside each condition.

        Args:
          keys_B: of the augmentation.
          step: of the training; None outside it, where nothing is augmented.
        """
        if self.augment and step is not None:
            share = optim.annealed(self.augment_share, step, self.steps)
            image_BHWC = augmentation.augmented(self.augment, image_BHWC, keys_B, share)
        variables = nets["disc"]
        if self.spectral_norm:
            vectors = variables[spectral.COLLECTION]
            variables = {"params": spectral.bounded(variables["params"], vectors)}
        return self.net.apply(variables, self._seen(nets, image_BHWC), *conds)

    def logit(self, nets, image_BHWC, cond, keys_B=None, step=None):
        """How real images are, and how well their captions fit, as of `judge`.   -> B"""
        return self.judge(nets, image_BHWC, (cond,), keys_B, step)[0].logit_B

    def advanced(self, nets):
        """The nets with the spectral norm's vectors a step further, and what changed: `Aux`'s."""
        if not self.spectral_norm:
            return nets, {}
        params, vectors = nets["disc"]["params"], nets["disc"][spectral.COLLECTION]
        mutated = {"disc": {spectral.COLLECTION: spectral.advanced(params, vectors)}}
        return {**nets, "disc": {"params": params, **mutated["disc"]}}, mutated

    def maps(self, nets, image_BHWC):
        """The frozen network's feature maps."""
        return self.features.maps(nets[networks.FEATURES], image_BHWC)

    def _seen(self, nets, image_BHWC):
        return self.maps(nets, image_BHWC) if self.features else image_BHWC


def make(config, *, augment, augment_share, spectral_norm) -> Critic:
    """The critic whose networks `config.model` describes; see the fields of `Critic`."""
    features = networks.features(config)
    net = networks.discriminator(config, features)
    return Critic(net, features, augment, augment_share, spectral_norm, config.steps)
