"""A critic that judges patches of pictures by themselves (PatchGAN, arXiv:1611.07004, section 3.2).

B batch · H W pixels · h w patches · C channels
"""

from typing import Annotated

import flax.linen as nn

from t2i_jax import errors, fields
from t2i_jax.models import layers, pyramid, unet


class Critic(nn.Module):
    """image_BHWC -> a logit for each patch, Bhw. Larger is more real.

    It has no normalisation, as the critics of `models.gan`: with a penalty it needs none.

    widths: channels at the full side, its half, … Each but the last halves the side.
    """

    widths: Annotated[tuple[int, ...], fields.at_least(1)] = (32, 64, 128)

    def check(self, size) -> None:
        """Raises ConfigError unless a height and width can be halved so often."""
        unit = 2 ** (len(self.widths) - 1)
        if not self.widths or any(side % unit for side in size):
            raise errors.ConfigError(
                f"widths {self.widths} do not fit pictures of {size[0]} × {size[1]}",
                where="config.model.critic.widths",
                fix="give fewer: each but the last halves the sides",
            )

    @nn.compact
    def __call__(self, image_BHWC):
        x_BHWC = unet.Conv(self.widths[0], name="enter")(image_BHWC)
        for width in self.widths[1:]:
            x_BHWC = pyramid.Shrink(width)(pyramid.Plain()(x_BHWC))
        x_BHWC = nn.leaky_relu(pyramid.Plain()(x_BHWC), pyramid.SLOPE)
        return layers.Dense(1, name="real")(x_BHWC)[..., 0]
