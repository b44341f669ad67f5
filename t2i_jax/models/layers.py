"""Layers that several networks share.   B batch · T tokens · D width · H W pixels · C channels"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, lora, sharding
from t2i_jax.models import attention


def flat(fn, x):
    """Applies fn with all leading axes as one. XLA:CPU runs products on (N, D) much faster."""
    return fn(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """x·W + b on flattened leading axes. Parameters are float32, `dtype` is that of computation."""

    features: int
    use_bias: bool = True
    zero: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        dense = nn.Dense(self.features, self.use_bias, dtype=self.dtype, kernel_init=init)
        return flat(dense, x)


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, with a learned scale unless `scale` is False."""

    scale: bool = True

    @nn.compact
    def __call__(self, x):
        wide = x.astype(jnp.float32)  # squares in half precision lose digits, or overflow
        # The epsilon keeps the root of a zero vector, and its gradient, finite.
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
        if self.scale:
            wide = wide * self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return wide.astype(x.dtype)


POSITIONS = 2**27  # numbers of a table of positions: half a GiB
REMAT = {
    "none": None,
    "weights": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat(module, policy: str, *, scanned: bool = False):
    """A module whose backward pass computes again what a policy does not save (arXiv:1604.06174).

    Args:
      policy: a name of REMAT.

        - "none" saves everything.
        - "weights" saves all but parameters that were gathered from other devices.
        - "dots" saves the products with weights.
        - "full" saves the module's inputs alone.
      scanned: the module will be the body of a loop. XLA cannot merge the two computations there,
        so it need not be kept from doing so.
    """
    errors.check_known("remat policy", policy, REMAT, where="config.model.<net>.remat")
    if policy == "none":
        return module
    return nn.remat(module, policy=REMAT[policy], prevent_cse=not scanned)


# Every block has its own parameters and adapters, and its own random first values.
STACK = dict(variable_axes={"params": 0, lora.COLLECTION: 0}, split_rngs={"params": True})


def stacked(block, kinds, *, remat_policy: str, scan: bool, **methods) -> dict[str, nn.Module]:
    """Blocks one after another, for an attribute of a module: the ending of a name -> block.

    With `scan` neighbours of one kind are one block, which is compiled once and runs as often as
    there are of them. Its parameters are stacked, and it is called by their numbers: "0to11".

    Args:
      kinds: of each block its options.
      methods: name -> which arguments behind the first, the carry, each block has of its own: 0,
        or `nn.broadcast` for one that serves all. A method returns (carry, what each block gives).
    """
    found, first = {}, 0
    for kind, alike in itertools.groupby(kinds):
        n = len([*alike])
        loops = scan and n > 1
        made = remat(block, remat_policy, scanned=loops)
        if loops:
            each = {name: STACK | dict(in_axes=axes, length=n) for name, axes in methods.items()}
            found[f"{first}to{first + n - 1}"] = nn.scan(made, methods=each)(**kind)
        else:
            found |= {str(i): made(**kind) for i in range(first, first + n)}
        first += n
    return found


def modulate(x, shift_BD, scale_BD):
    """x·(1 + scale) + shift, per example (DiT, arXiv:2212.09748)."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return x * (1 + scale_BD.reshape(shape)) + shift_BD.reshape(shape)


def gate(x, gate_BD):
    return x * gate_BD.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])


class TimeText(nn.Module):
    """One vector from time and pooled text. Time enters as sinusoids of t in [0, 1].   -> BD"""

    width: int
    frequencies: int = 128
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t_B, pooled_BD):
        # Periods from 10 down to 0.01, for times in [0, 1].
        rates = np.exp(np.linspace(0, np.log(1000.0), self.frequencies // 2)).astype(np.float32)
        angle_BF = t_B[:, None] * rates * 2 * np.pi / 10
        waves_BF = jnp.concatenate([jnp.sin(angle_BF), jnp.cos(angle_BF)], -1)
        h_BD = Dense(self.width, dtype=self.dtype, name="time")(waves_BF)
        h_BD = h_BD + Dense(self.width, dtype=self.dtype, name="text")(RMSNorm()(pooled_BD))
        return Dense(self.width, dtype=self.dtype, name="mix")(nn.silu(h_BD))


class TextTokens(nn.Module):
    """Caption states at the network's width, after one learned null token that is always valid.

    (seq_BLE, mask_BL) -> (tokens_BSD, mask_BS), S = L + 1. So a caption whose mask is all False is
    the learned null condition, and a softmax over it has one valid key.
    """

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, seq_BLE, mask_BL):
        b = seq_BLE.shape[0]
        tokens_BLD = Dense(self.width, dtype=self.dtype, name="project")(RMSNorm()(seq_BLE))
        null_D = self.param("null", nn.initializers.normal(0.02), (self.width,))
        # A float32 parameter would widen all other tokens when they are joined.
        null_B1D = jnp.broadcast_to(null_D.astype(tokens_BLD.dtype), (b, 1, self.width))
        mask_BS = jnp.concatenate([jnp.ones((b, 1), bool), mask_BL], 1)
        return jnp.concatenate([null_B1D, tokens_BLD], 1), mask_BS


class Queries(nn.Module):
    """The queries of a token sequence, normalised (qk-norm, arXiv:2302.05442).   -> q_BTNH"""

    width: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD):
        q_BTD = Dense(self.width, use_bias=False, dtype=self.dtype, name="q")(x_BTD)
        return RMSNorm(name="norm")(attention.split_heads(q_BTD, self.heads))


class KeysValues(nn.Module):
    """The keys (normalised, qk-norm) and values of a token sequence.   -> (k_BSNH, v_BSNH)"""

    width: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BSD):
        # Head by head, key before value. So a device with some heads has both of them (ADR 7).
        kv_BSD = Dense(2 * self.width, use_bias=False, dtype=self.dtype, name="kv")(x_BSD)
        k_BSNH, v_BSNH = jnp.split(attention.split_heads(kv_BSD, self.heads), 2, -1)
        return RMSNorm(name="k_norm")(k_BSNH), v_BSNH


def space_to_depth(x_BHWC, n: int = 2):
    """Each block of n × n pixels becomes one pixel with n²·C channels."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // n, w // n, n * n * c)


def depth_to_space(x_BHWC, n: int = 2):
    """The inverse of `space_to_depth`."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h, w, n, n, c // (n * n)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * n, w * n, c // (n * n))


def positions_2d(h: int, w: int, width: int):
    """Fixed sines and cosines of row and column, both mapped to [0, 1].   -> (h·w, width) numpy

    Raises:
      ConfigError: more numbers than a constant of a compiled program should have.
    """
    if h * w * width > POSITIONS:
        raise errors.ConfigError(
            f"{h} × {w} picture tokens of width {width}",
            where="config.model",
            fix="use larger patches, smaller pictures or a narrower network",
        )
    # Positions are shares of the side, not pixels. So a network may read another resolution.
    # A rate of 1 is half a wave along a side, one of 32 sixteen waves.
    rates = np.exp(np.linspace(0, np.log(32.0), width // 4))

    def waves(n):
        angle = ((np.arange(n) + 0.5) / n)[:, None] * rates * np.pi
        return np.concatenate([np.sin(angle), np.cos(angle)], -1)

    rows, columns = np.broadcast_arrays(waves(h)[:, None], waves(w)[None, :])
    return np.concatenate([rows, columns], -1).reshape(h * w, -1).astype(np.float32)
