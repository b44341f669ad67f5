"""The codes of pictures, which token models learn to write: a frozen autoencoder makes them.

B batch · H W pixels · h w codes of a picture
"""

import math

import jax.numpy as jnp

from t2i_jax import errors, fields, space
from t2i_jax.models import codes
from t2i_jax.objective import Cached
from t2i_jax.objectives.parts import autoencoders

NET = autoencoders.NET
CACHED = {"codes": Cached("image", (NET,)), "encode": Cached("caption", ("text",))}


def tokenizer(config):
    """The module of net "autoencoder", with `num_codes`, and the `Space` of its codes, int32 hw.

    Raises:
      ConfigError: it has no codes, or pictures are no whole number of them.
    """
    net = autoencoders.of_config(config)
    if not net.num_codes:
        raise errors.ConfigError(
            "its latents are no codes",
            where=f"config.model.{NET}.kind",
            fix='set it to "fsq" or "vq"',
        )

    def encode(nets, batch, keys_B=None):
        if "codes" in batch:  # from a cache
            return batch["codes"]
        return net.apply(nets[NET], batch["image"], method="codes")

    def decode(nets, code_Bhw):
        return jnp.clip(net.apply(nets[NET], code_Bhw, method="of_codes"), -1, 1)

    def init(key, batch):
        return net.init(key, jnp.zeros((1, config.res, config.res, 3)))

    side = config.res // net.factor
    return net, space.Space((side, side), encode, decode, {NET: init})


def network(config, num_codes: int, sides, *, causal: bool) -> codes.Network:
    """The module of net "model" that `config.model.model` describes.

    Raises:
      ConfigError: an unknown size, or sizes that do not go together.
    """
    where = "config.model.model"
    given = num_codes, sides, causal
    net = fields.build(codes.Network, config.model.get("model", {}), *given, where=where)
    # Waves of row and column are a quarter of the width each.
    if net.width % (unit := math.lcm(4, net.heads)):
        near = max(net.width // unit, 1) * unit
        raise errors.ConfigError(
            f"width is {net.width}, no multiple of {unit}",
            where=f"{where}.width",
            fix=f"use {near} or {near + unit}",
        )
    return net
