"""Attention behind one function.   B batch · T queries · S keys · N heads · H head width"""

import jax
import jax.numpy as jnp


def attention(
    q_BTNH, k_BSNH, v_BSNH, *, mask_BS=None, mask_BTS=None, bias_NTS=None, causal=False, scale=None
):
    """softmax(scale·q·k + bias)·v, with the softmax in float32.   -> BTNH

    Args:
      mask_BS, mask_BTS: False hides a key, from all queries or from a single one.
      bias_NTS: added to the scaled products.
      causal: also hides the keys behind the query.
      scale: by default 1/√H.
    """
    dtype = q_BTNH.dtype
    if dtype == jnp.float16:  # XLA:CPU has no products of float16 that sum in float32
        q_BTNH, k_BSNH, v_BSNH = (x.astype(jnp.float32) for x in (q_BTNH, k_BSNH, v_BSNH))
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    mask = mask if mask_BTS is None else mask_BTS[:, None]
    bias = None if bias_NTS is None else bias_NTS[None].astype(q_BTNH.dtype)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, bias, mask, scale=scale, is_causal=causal
    )
    return out_BTNH.astype(dtype)


def split_heads(x_BTD, heads: int):
    """BTD -> BTNH"""
    return x_BTD.reshape(*x_BTD.shape[:-1], heads, x_BTD.shape[-1] // heads)


def merge_heads(x_BTNH):
    """BTNH -> BTD"""
    return jnp.reshape(x_BTNH, (*x_BTNH.shape[:-2], -1))
