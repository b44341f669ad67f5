"""Attention behind one function.   B batch · T queries · S keys · N heads · H head width"""

import functools

import jax
import jax.numpy as jnp

LARGE = 2**18  # scores of a head from which on a CPU computes head by head


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
    whole = lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=scale, is_causal=causal
    )
    # With several devices a loop over examples would gather a batch that is split.
    large = q_BTNH.shape[1] * k_BSNH.shape[1] >= LARGE
    if large and bias is None and not causal and jax.device_count() == 1:
        by_head = functools.partial(_by_head, mask=mask, scale=scale)
        # The platform is known when the program is compiled, so no conditional remains.
        out_BTNH = jax.lax.platform_dependent(q_BTNH, k_BSNH, v_BSNH, cpu=by_head, default=whole)
    else:
        out_BTNH = whole(q_BTNH, k_BSNH, v_BSNH)
    return out_BTNH.astype(dtype)


def _by_head(q_BTNH, k_BSNH, v_BSNH, *, mask, scale):
    """The same, one head of one example after another.

    Scores of one head stay in a core's cache, those of all would pass through memory a dozen times.
    The backward pass computes them again, so they are never kept (arXiv:2112.05682).
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    hidden = -0.7 * jnp.finfo(jnp.float32).max  # a row that hides all keys stays finite

    def example(of_one):
        q_NTH, k_NSH, v_NSH = (x.transpose(1, 0, 2) for x in of_one[:3])

        @jax.checkpoint
        def head(qkv):
            q_TH, k_SH, v_SH = qkv
            score_TS = scale * jnp.einsum("th,sh->ts", q_TH, k_SH, preferred_element_type="float32")
            if mask is not None:
                score_TS = jnp.where(of_one[3][0], score_TS, hidden)
            return jax.nn.softmax(score_TS, -1).astype(v_SH.dtype) @ v_SH

        return jax.lax.map(head, (q_NTH, k_NSH, v_NSH)).transpose(1, 0, 2)

    return jax.lax.map(example, (q_BTNH, k_BSNH, v_BSNH, *(() if mask is None else (mask,))))


def split_heads(x_BTD, heads: int):
    """BTD -> BTNH"""
    return x_BTD.reshape(*x_BTD.shape[:-1], heads, x_BTD.shape[-1] // heads)


def merge_heads(x_BTNH):
    """BTNH -> BTD"""
    return jnp.reshape(x_BTNH, (*x_BTNH.shape[:-2], -1))
