"""Embeddings of times and other numbers in pretrained denoisers.   B batch · E width"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

PERIOD = 10_000.0  # of the slowest sinusoid


def waves(t_B, width: int, *, cosine_first: bool = True, shift: float = 0.0):
    """Sinusoids of numbers, float32 (arXiv:2006.11239, after 1706.03762, section 3.5).   -> BE"""
    half = width // 2
    # With a shift of 1 the slowest rate is 1 / PERIOD exactly, with 0 a little faster.
    rates = np.exp(-np.log(PERIOD) * np.arange(half) / (half - shift)).astype(np.float32)
    # bfloat16 cannot tell whole times above 256 apart.
    angle_BE = t_B[..., None].astype(jnp.float32) * rates
    pair = (jnp.sin(angle_BE), jnp.cos(angle_BE))
    return jnp.concatenate(pair[::-1] if cosine_first else pair, -1)


class Embedding(nn.Module):
    """Two layers, float32: of sinusoids of a number, or of a pooled text."""

    width: int

    def setup(self):
        self.linear_1, self.linear_2 = (nn.Dense(self.width, dtype="float32") for _ in range(2))

    def __call__(self, x_BE):
        return self.linear_2(nn.silu(self.linear_1(x_BE.astype(jnp.float32))))
