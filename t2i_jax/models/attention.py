"""Attention behind one function.   B batch · T queries · S keys · N heads · H head width

A softmax over many tokens is computed by a kernel of the platform, which keeps the T × S scores out
of memory. `config.attention` may name another one, see `sharding.Layout`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t2i_jax import errors, sharding

LARGE = 2**18  # scores of a head from which on a kernel computes them
BLOCK, LANES = 512, 128  # tokens that a TPU's kernel takes at once: the most, and their unit
# Platform -> its kernel. cuDNN's waits to be asked for: no GPU has run it here yet.
BEST = {"cpu": "by_head", "tpu": "splash"}


def attention(
    q_BTNH, k_BSNH, v_BSNH, *, mask_BS=None, mask_BTS=None, bias_NTS=None, causal=False, scale=None
):
    """softmax(scale·q·k + bias)·v, with the softmax in float32.   -> BTNH

    Args:
      mask_BS, mask_BTS: False hides a key, from all queries or from a single one. A query that sees
        none gets the mean of all values.
      bias_NTS: added to the scaled products.
      causal: also hides the keys behind the query.
      scale: by default 1/√H.
    Raises:
      ConfigError: `config.attention` names a kernel that cannot do this.
    """
    dtype, shape = q_BTNH.dtype, (*q_BTNH.shape, k_BSNH.shape[1])
    kernel = _choose(shape, dtype, mask_BS, mask_BTS, causal or bias_NTS is not None)
    if dtype == jnp.float16 and kernel != "cudnn":
        # XLA:CPU has no products of float16 that sum in float32, and TPUs have no float16.
        q_BTNH, k_BSNH, v_BSNH = (x.astype(jnp.float32) for x in (q_BTNH, k_BSNH, v_BSNH))
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    mask = mask if mask_BTS is None else mask_BTS[:, None]
    if kernel == "xla":
        bias = None if bias_NTS is None else bias_NTS[None].astype(q_BTNH.dtype)
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH, k_BSNH, v_BSNH, bias, mask, scale=scale, is_causal=causal
        )
    else:
        scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
        fn = {"by_head": _by_head, "splash": _splash, "cudnn": _cudnn}[kernel]
        fn = _on_each_device(functools.partial(fn, scale=scale), shape)
        out_BTNH = fn(q_BTNH, k_BSNH, v_BSNH, mask)
    return out_BTNH.astype(dtype)


def _choose(shape, dtype, mask_BS, mask_BTS, biased: bool) -> str:
    """The kernel that the config names, or by default the platform's, and XLA's for what that
    cannot do; see `sharding.KERNELS`.
    """
    t, _, h, s = shape[1:]
    mesh, wanted = jax.sharding.get_abstract_mesh(), sharding.kernel()
    # Over devices that nobody named no batch can be split here, and a whole one would be gathered.
    known = not mesh.empty or jax.device_count() == 1
    if t * s < LARGE or (wanted == "auto" and not known):
        return "xla"
    device = getattr(mesh, "abstract_device", None)
    platform = device.platform if device else jax.default_backend()
    kernel = BEST.get(platform, "xla") if wanted == "auto" else wanted
    why = ""
    if kernel != "xla" and biased:
        why = "a bias or a causal mask"
    elif kernel == "splash" and mask_BTS is not None:
        why = "a mask of each query"
    elif kernel == "cudnn" and (dtype.itemsize != 2 or h % 8 or h > 128):
        why = f"heads of {h} numbers of {dtype}: they must be at most 128, in eights, of 16 bits"
    elif kernel == "cudnn" and (t % 2 or s % 2) and not (mask_BS is None and mask_BTS is None):
        why = f"a mask of {t} queries and {s} keys: both must be even"
    if why and wanted != "auto":
        raise errors.ConfigError(
            f"{kernel!r} cannot do attention with {why}",
            where="config.attention",
            fix='set it to "auto", which takes another kernel there',
        )
    return "xla" if why else kernel


def _on_each_device(fn, shape):
    """The kernel for each device's examples and heads.

    XLA does not split a kernel over devices. A batch or heads that the mesh does not divide are
    whole on every device.
    """
    (b, _, n, _, _), free = shape, sharding.free_axes()
    if math.prod(free.values()) == 1:
        return fn
    heads = [name for name in free if name == sharding.TENSOR and n % free[name] == 0]
    batch = tuple(name for name in free if name != sharding.TENSOR)
    batch = batch if b % sharding.free_parts() == 0 else None
    spec = PartitionSpec(batch, None, *heads)
    split = functools.partial(jax.shard_map, out_specs=spec, axis_names={*free}, check_vma=False)
    return split(fn, in_specs=(spec, spec, spec, PartitionSpec(batch)))


def _by_head(q_BTNH, k_BSNH, v_BSNH, mask=None, *, scale):
    """One head of one example after another, for CPUs.

    Scores of one head stay in a core's cache, those of all would pass through memory a dozen times.
    The backward pass computes them again, so they are never kept (arXiv:2112.05682).
    """
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


def _splash(q_BTNH, k_BSNH, v_BSNH, mask_B11S=None, *, scale, interpret=False):
    """Block by block with a running softmax, for TPUs (arXiv:2112.05682, 2205.14135).

    Tokens are filled up to whole blocks. A segment number hides keys: queries are of segment 1.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    (t, n), s = q_BTNH.shape[1:3], k_BSNH.shape[1]
    (q_block, q_length), (kv_block, kv_length) = _blocks(t), _blocks(s)
    if mask_B11S is None and kv_length > s:
        mask_B11S = jnp.ones((len(q_BTNH), 1, 1, s), bool)
    q_BTNH = (scale * q_BTNH.astype(jnp.float32)).astype(q_BTNH.dtype)
    segments = None
    if mask_B11S is not None:
        # A row without keys would count the filling. It sees all keys, and all alike.
        some_B111 = mask_B11S.any(-1, keepdims=True)
        q_BTNH = jnp.where(some_B111, q_BTNH, 0)
        kv_BS = (mask_B11S | ~some_B111)[:, 0, 0].astype(jnp.int32)
        kv_BS = jnp.pad(kv_BS, ((0, 0), (0, kv_length - s)))
        segments = splash.SegmentIds(jnp.ones((len(kv_BS), q_length), jnp.int32), kv_BS)

    def filled(x_BTNH, length):
        x_BNTH = x_BTNH.transpose(0, 2, 1, 3)
        return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, length - x_BNTH.shape[2]), (0, 0)))

    names = [f"block_{of}{step}" for of in ("q", "kv") for step in ("", "_dkv", "_dq")]
    sizes = splash.BlockSizes(**dict(zip(names, [q_block] * 3 + [kv_block] * 3, strict=True)))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((q_length, kv_length))] * n),
        block_sizes=sizes,
        interpret=interpret,
    )
    keys_values = filled(k_BSNH, kv_length), filled(v_BSNH, kv_length)
    out_BNTH = jax.vmap(kernel)(filled(q_BTNH, q_length), *keys_values, segments)
    return out_BNTH[:, :, :t].transpose(0, 2, 1, 3)


def _blocks(n: int) -> tuple[int, int]:
    """The tokens of a block, and of all blocks that hold n: no more of both than need be."""
    count = math.ceil(n / BLOCK)
    block = LANES * math.ceil(n / count / LANES)
    return block, block * count


def _cudnn(q_BTNH, k_BSNH, v_BSNH, mask=None, *, scale):
    """The same by cuDNN, for NVIDIA's GPUs."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, (len(mask), 1, q_BTNH.shape[1], mask.shape[-1]))
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, mask=mask, scale=scale, implementation="cudnn"
    )


def split_heads(x_BTD, heads: int):
    """BTD -> BTNH"""
    return x_BTD.reshape(*x_BTD.shape[:-1], heads, x_BTD.shape[-1] // heads)


def merge_heads(x_BTNH):
    """BTNH -> BTD"""
    return jnp.reshape(x_BTNH, (*x_BTNH.shape[:-2], -1))
