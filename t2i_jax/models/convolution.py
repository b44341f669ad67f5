"""Convolutions whose kernel gradients are fast on CPUs, too (ADR 12)."""

import functools
import math

import jax
import jax.numpy as jnp

FEW = 4096  # pixels of a batch: fewer are not cut into parts
ROWS = 512  # pixels that a part has at least
PARTS = 16  # parts at most


def conv(x_BHWC, kernel_HWIO, *args, **options):
    """`jax.lax.conv_general_dilated` of NHWC by HWIO, with derivatives of any order and mode."""
    # XLA:CPU takes three to five times as long for the gradient of a 3 × 3 kernel as for the
    # convolution, unless it is summed over parts of the batch whose patches fit the cache. So the
    # kernel's tangent is convolved part by part. Its transpose is the gradient, part by part, too.
    # With several devices the program stays the plain one.
    whole = functools.partial(_whole, args=args, options=options)
    rows = math.prod(x_BHWC.shape[:3])
    parts = math.gcd(len(x_BHWC), PARTS, _power_of_two(rows // ROWS))
    if parts < 2 or rows < FEW or jax.device_count() > 1:
        return whole(x_BHWC, kernel_HWIO)

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
            by_platform = dict(cpu=in_parts, default=whole)
            terms.append(jax.lax.platform_dependent(x, dkernel, **by_platform))
        y = fn(x, kernel)
        return y, sum(terms) if terms else jnp.zeros_like(y)

    fn.defjvp(tangent, symbolic_zeros=True)
    return fn(x_BHWC, kernel_HWIO)


def _whole(x_BHWC, kernel_HWIO, args, options):
    return jax.lax.conv_general_dilated(x_BHWC, kernel_HWIO, *args, **options)


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n; 1 for n = 0."""
    return 1 << max(n.bit_length() - 1, 0)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
