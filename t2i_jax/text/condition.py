"""What a text encoder hands to a generator.   B batch · L text length · D width"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cond(NamedTuple):
    """Encoded captions: token states seq_BLD, mask_BL (True = a real token), pooled_BD."""

    seq_BLD: jax.Array
    mask_BL: jax.Array
    pooled_BD: jax.Array


def masked_mean(seq_BLD, mask_BL):
    """Mean of the valid tokens' states, in float32; zero where a row has none.   -> BD"""
    m_BL1 = mask_BL[..., None].astype(jnp.float32)
    return (seq_BLD * m_BL1).sum(1) / jnp.maximum(m_BL1.sum(1), 1.0)


def of_states(seq_BLD, mask_BL) -> Cond:
    """Token states, zero where the mask is False, and their masked mean."""
    seq_BLD = seq_BLD * mask_BL[..., None]
    return Cond(seq_BLD, mask_BL, masked_mean(seq_BLD, mask_BL))
