"""Attention behind one function.   B batch · T queries · S keys · N heads · H head width"""

import jax
import jax.numpy as jnp


def attention(q_BTNH, k_BSNH, v_BSNH, *, mask_BS=None):
    """softmax(q·k/√H)·v, softmax in float32; keys where mask_BS is False are not seen.   -> BTNH"""
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    return jax.nn.dot_product_attention(q_BTNH, k_BSNH, v_BSNH, mask=mask).astype(q_BTNH.dtype)


def split_heads(x_BTD, heads: int):
    """BTD -> BTNH"""
    return x_BTD.reshape(*x_BTD.shape[:-1], heads, x_BTD.shape[-1] // heads)


def merge_heads(x_BTNH):
    """BTNH -> BTD"""
    return jnp.reshape(x_BTNH, (*x_BTNH.shape[:-2], -1))
