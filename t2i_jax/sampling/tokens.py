"""Tokens drawn one after another: which may be drawn, by what noise, and the loop.

B batch · R rows of the network, 1 or 2 of each example · N tokens · K kinds of them
"""

from typing import Annotated

import jax
import jax.numpy as jnp

from t2i_jax import fields
from t2i_jax.sampling import guidance as guide

PART = 256  # tokens until a cache grows
COLDEST = 1e-6  # a temperature that no difference of logits survives

Guidance = Annotated[float, fields.at_least(0), fields.compiled_apart(guide.NONE)]
Temperature = Annotated[float, fields.at_least(0)]
TopK = Annotated[int, fields.at_least(0)]
TopP = Annotated[float, fields.between(0, 1), fields.compiled_apart(1.0)]


def likely(logits_BK, top_k: int, top_p):
    """The logits of tokens that may be drawn, −∞ for all others.

    Args:
      top_k: only the k likeliest; 0: all.
      top_p: only the likeliest that together reach this probability (arXiv:1904.09751).
    """
    if not top_k and not isinstance(top_p, jax.Array) and top_p == 1:
        return logits_BK
    sorted_BK = jnp.sort(logits_BK, axis=-1)[:, ::-1]
    floor_B1 = jnp.full((logits_BK.shape[0], 1), -jnp.inf)
    if top_k:
        last = min(top_k, sorted_BK.shape[1])
        floor_B1 = sorted_BK[:, last - 1 : last]
    probability_BK = jax.nn.softmax(jnp.where(sorted_BK >= floor_B1, sorted_BK, -jnp.inf))
    before_BK = jnp.cumsum(probability_BK, -1) - probability_BK
    # A token is kept while those before it fall short of top_p, the likeliest even at 0.
    kept_B1 = jnp.maximum((before_BK < top_p).sum(-1, keepdims=True), 1)
    nucleus_B1 = jnp.take_along_axis(sorted_BK, kept_B1 - 1, axis=-1)
    return jnp.where(logits_BK >= jnp.maximum(floor_B1, nucleus_B1), logits_BK, -jnp.inf)


def draw(logits_BK, keys_B, temperature=1.0, top_k: int = 0, top_p=1.0):
    """A token of each row, by its own key.   -> int32 B

    The largest sum of logit and Gumbel noise is a draw from the softmax (Gumbel 1954). At
    temperature 0 the noise is left out, which gives the likeliest token.
    """
    cooled_BK = likely(logits_BK / jnp.maximum(temperature, COLDEST), top_k, top_p)
    noise_BK = gumbel_each(keys_B, logits_BK.shape[1:])
    return jnp.argmax(cooled_BK + jnp.where(temperature > 0, noise_BK, 0), -1).astype(jnp.int32)


def gumbel_each(keys_B, shape):
    """Standard Gumbel noise, one draw per example.   -> B + shape"""
    return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys_B)


def go_on(extend, choose, row_BN, cache, n: int):
    """Writes the tokens of rows from number n on, one after another.   -> row_BN

    It is one program for any number of tokens, but for its cache: that begins small and grows by
    PART places, so that early tokens do not look through places that are still empty.

    Args:
      extend: (token_B, i, cache) -> (logits_BK of token i, cache), where token i − 1 is given.
      choose: (logits_BK, i) -> token_B.
      row_BN: its tokens before n are given, one at least.
      cache: keys and values BNSH of the tokens that the network has read, N heads and S places.
    """
    total = row_BN.shape[1]

    def step(i, state):
        row_BN, cache = state
        logits_BK, cache = extend(row_BN[:, i - 1], i, cache)
        return row_BN.at[:, i].set(choose(logits_BK, i)), cache

    while n < total:
        end = min(n + PART, total)
        cache = longer(cache, end - n)
        row_BN, cache = jax.lax.fori_loop(n, end, step, (row_BN, cache))
        n = end
    return row_BN


def longer(cache, more: int):
    """A cache with room for more tokens behind those that it has."""
    wider = ((0, 0), (0, 0), (0, more), (0, 0))
    return jax.tree.map(lambda x_BNSH: jnp.pad(x_BNSH, wider), cache)
