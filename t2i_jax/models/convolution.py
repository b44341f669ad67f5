"""Convolutions whose kernel gradients are fast on CPUs, too (ADR 12)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

FEW = 4096  # pixels of a batch: fewer are not cut into parts
ROWS = 512  # pixels that a part has at least
PARTS = 16  # parts at most
WIDE = 64  # channels on both sides from which on products are faster than parts
LAYOUT = ("NHWC", "HWIO", "NHWC")
# A row of a doubled map is one of the map twice. So three taps round row 2i read the rows i - 1, i
# and i of the map, those round row 2i + 1 the rows i, i and i + 1: two taps, of summed weights.
FOLD = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # parity, tap, tap of three


def conv(x_BHWC, kernel_HWIO, *args, **options):
    """`jax.lax.conv_general_dilated` of NHWC by HWIO, with derivatives of any order and mode."""
    # XLA:CPU takes three to five times as long for the gradient of a 3 × 3 kernel as for the
    # convolution, unless it is summed over parts of the batch whose patches fit the cache. So the
    # kernel's tangent is convolved part by part. Its transpose is the gradient, part by part, too.
    # With several devices the program stays the plain one.
    whole = functools.partial(_whole, args=args, options=options)
    rows = math.prod(x_BHWC.shape[:3])
    # Two of the numbers are powers of two. So the gcd is the largest power that divides all.
    parts = math.gcd(len(x_BHWC), PARTS, _power_of_two(rows // ROWS))
    wide = min(kernel_HWIO.shape[2:]) >= WIDE and _is_plain(*args, **options)
    if jax.device_count() > 1 or not (wide or (parts > 1 and rows >= FEW)):
        return whole(x_BHWC, kernel_HWIO)

    def by_products(x_BHWC, kernel_HWIO):
        # One product for each tap. Its transpose is the patches' product with the gradient, which
        # is as fast as any product, and for wide kernels faster than a convolution in parts.
        k = kernel_HWIO.shape[:2]
        pads = args[1] if len(args) > 1 else options["padding"]
        if isinstance(pads, str):
            pads = jax.lax.padtype_to_pads(x_BHWC.shape[1:3], k, (1, 1), pads)
        x_BHWC = jnp.pad(x_BHWC, ((0, 0), *map(tuple, pads), (0, 0)))
        b, h, w = (n - m + 1 for n, m in zip(x_BHWC.shape, (1, *k), strict=False))
        taps = [
            x_BHWC[:, i : i + h, j : j + w].reshape(b * h * w, -1) @ kernel_HWIO[i, j]
            for i in range(k[0])
            for j in range(k[1])
        ]
        return sum(taps).reshape(b, h, w, -1)

    def in_parts(x_BHWC, kernel_HWIO):
        x_RPHWC = x_BHWC.reshape(-1, parts, *x_BHWC.shape[1:])
        y_RPHWC = jnp.stack([whole(x_RPHWC[:, i], kernel_HWIO) for i in range(parts)], 1)
        return y_RPHWC.reshape(-1, *y_RPHWC.shape[2:])

    # A custom_jvp and no custom_vjp, which would rule out forward-mode derivatives.
    fn = jax.custom_jvp(whole)

    def tangent(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        terms = []
        if not _is_zero(dx):
            terms.append(fn(dx, kernel))
        if not _is_zero(dkernel):
            # The platform is known when the program is compiled, so no conditional remains.
            by_platform = dict(cpu=by_products if wide else in_parts, default=whole)
            terms.append(jax.lax.platform_dependent(x, dkernel, **by_platform))
        y = fn(x, kernel)
        return y, sum(terms) if terms else jnp.zeros_like(y)

    # Symbolic zeros spare the convolution of an operand that has no tangent.
    fn.defjvp(tangent, symbolic_zeros=True)
    return fn(x_BHWC, kernel_HWIO)


def of_doubled(x_BHWC, kernel_HWIO, *_, **__):
    """`conv` by a 3 × 3 kernel of a map whose sides are doubled by repeating its pixels.

    `nn.Conv` takes it as its `conv_general_dilated`, with strides and padding as they are by
    default. Four kernels of 2 × 2, for even and odd rows and columns, read the map as it is: 16
    products in place of 36, and on CPUs 1.7 times as fast.
    """
    b, h, w, _ = x_BHWC.shape
    # At the default precision some accelerators would round the float32 kernel to fewer bits.
    folded = jnp.einsum("apk,bql,klio->abpqio", FOLD, FOLD, kernel_HWIO, precision="highest")
    folded = folded.astype(kernel_HWIO.dtype)

    def parity(row, column):  # even ones read what lies before, odd ones what lies behind
        pads = [(1 - odd, odd) for odd in (row, column)]
        return conv(x_BHWC, folded[row, column], (1, 1), pads, dimension_numbers=LAYOUT)

    rows = [jnp.stack([parity(row, column) for column in (0, 1)], 3) for row in (0, 1)]
    return jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, -1)


def _whole(x_BHWC, kernel_HWIO, args, options):
    return jax.lax.conv_general_dilated(x_BHWC, kernel_HWIO, *args, **options)


def _is_plain(window_strides, padding, lhs_dilation=None, rhs_dilation=None, **options) -> bool:
    """Whether a convolution has neither strides nor holes nor groups."""
    steps = (window_strides, lhs_dilation or (1,), rhs_dilation or (1,))
    groups = (options.get("feature_group_count", 1), options.get("batch_group_count", 1))
    return all(set(step) == {1} for step in (*steps, groups))


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n; 1 for n = 0."""
    return 1 << max(n.bit_length() - 1, 0)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
