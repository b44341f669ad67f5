"""Conditions made of token states, and dropped.   B batch · L text length · D width"""

import jax.numpy as jnp
import numpy as np

from t2i_jax.models.types import Cond


def masked_mean(seq_BLD, mask_BL):
    """Mean of the valid tokens' states, in float32; zero where a row has none.   -> BD"""
    m_BL1 = mask_BL[..., None].astype(jnp.float32)
    return (seq_BLD * m_BL1).sum(1) / jnp.maximum(m_BL1.sum(1), 1.0)


def of_states(seq_BLD, mask_BL) -> Cond:
    """Token states, zero where the mask is False, and their masked mean."""
    seq_BLD = seq_BLD * mask_BL[..., None]
    return Cond(seq_BLD, mask_BL, masked_mean(seq_BLD, mask_BL))


def drop(cond: Cond, drop_BE, parts=None) -> Cond:
    """The null condition, no valid token and a zero pooled vector, where drop_BE is True.

    Args:
      drop_BE: of each of E encoders; B: of all together.
      parts: tokens and pooled width of each encoder, where they are dropped one by one.
    """
    if drop_BE.ndim == 1:
        drop_BE, parts = drop_BE[:, None], None
    parts = parts or ((cond.mask_BL.shape[1], cond.pooled_BD.shape[1]),)
    dropped_BL, dropped_BD = (
        jnp.repeat(drop_BE, np.array(sizes), axis=1, total_repeat_length=sum(sizes))
        for sizes in zip(*parts, strict=True)
    )
    pooled_BD = jnp.where(dropped_BD, 0, cond.pooled_BD)
    # The states stay: nothing reads one where the mask is False.
    return cond._replace(mask_BL=cond.mask_BL & ~dropped_BL, pooled_BD=pooled_BD)
