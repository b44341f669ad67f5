"""Guidance by a frozen dual encoder: how far drawn images lie from their captions.

B batch · H W pixels · C channels · P embedding
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import losses
from t2i_jax.models import clip as clip_models
from t2i_jax.objectives import clip
from t2i_jax.objectives.parts.terms import Term

DISTANCES = {"spherical": losses.spherical, "cosine": lambda a_BP, b_BP: 1 - (a_BP * b_BP).sum(-1)}


class Guide(NamedTuple):
    """The two towers, nets "clip_image" and "clip_caption".

    caption: what reads the text encoder's states, or None: then its pooled states are embeddings.
    """

    image: clip_models.Image
    caption: nn.Module | None

    def term(self, weight: float, distance: str) -> Term:
        """How far images lie from their captions.

        Args:
          distance: of the two embeddings: "spherical", the squared angle, as guides of CLIP use it
            (StyleGAN-T, arXiv:2301.09515, section 3.3), or "cosine", 1 − cos.
        """

        def value(nets, image_BHWC, cond, batch, keys):
            image_BP = losses.unit(self.image.apply(nets["clip_image"], image_BHWC).pooled_BD)
            text_BP = cond.pooled_BD
            if self.caption:
                text_BP = self.caption.apply(nets["clip_caption"], cond)
            return DISTANCES[distance](image_BP, losses.unit(text_BP))

        init = {"clip_image": self._init_image}
        if self.caption:
            init["clip_caption"] = lambda key, batch, cond: self.caption.init(key, cond)
        return Term(weight, init, value)

    def maps(self, nets, image_BHWC):
        """The image tower's feature maps."""
        return self.image.apply(nets["clip_image"], image_BHWC).maps

    def _init_image(self, key, batch, cond):
        if not self.caption:
            clip.check_width(self.image, cond)
        res = self.image.tower.res
        return self.image.init(key, jnp.zeros((len(batch["index"]), res, res, 3)))


def make(config) -> Guide:
    """The guide that `config.model.clip` describes, as `objectives.clip` describes its nets.

    Without a description of the image tower it is that of `config.load.clip_image`.
    """
    source, model = config.load.get("clip_image"), config.model.get("clip", {})
    return Guide(*clip.towers(model, res=config.res, source=source, where="config.model.clip"))
