"""Frozen kernels in eight bits: whole numbers, and a scale for each output channel.

w ≈ q·s with s = max |w| / 127 over the inputs of a channel and q = round(w / s), as LLM.int8()
scales weights (arXiv:2208.07339, section 2). Only what is stored has eight bits. Where a module
reads a kernel it gets q·s, and its products are of floats. So gradients pass through, and adapters
learn beside such a kernel (QLoRA, arXiv:2305.14314).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta


@struct.dataclass
class Kernel(meta.AxisMetadata):
    """A kernel in a net's variables. Linen opens it where a module reads it.

    q: int8, in the kernel's shape.   scale: float32, an axis of one in place of each input axis.
    """

    q: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    def unbox(self):
        # Of a split kernel each part lies in a box of its own, so that bytes are gathered.
        q, scale = meta.unbox((self.q, self.scale))
        return q.astype(jnp.float32) * scale

    def replace_boxed(self, val):
        return quantised(val)

    # Linen calls these two where a scan or vmap stacks parameters.

    def add_axis(self, index, params):
        return _each(self, lambda box: box.add_axis(index, params))

    def remove_axis(self, index, params):
        return _each(self, lambda box: box.remove_axis(index, params))


def stored(net):
    """A net's variables with each kernel of two axes and more as a `Kernel`."""

    def one(path, x):
        kernel = getattr(path[-1], "key", "") == "kernel" and x.ndim > 1
        return quantised(x) if kernel else x

    return jax.tree_util.tree_map_with_path(one, net)


@jax.jit
def quantised(kernel) -> Kernel:
    """The nearest kernel in eight bits. Zeros stay zeros."""
    # A kernel of a dense layer has two axes, of a convolution four. One more is that of a stack's
    # layers, as a scan has it.
    inputs = tuple(range(kernel.ndim % 2, kernel.ndim - 1))
    kernel = kernel.astype(jnp.float32)
    scale = jnp.abs(kernel).max(inputs, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1)
    return Kernel(jnp.round(kernel / scale).astype(jnp.int8), scale)


def _each(kernel: Kernel, change) -> Kernel:
    """The same kernel with its parts' boxes changed, where they lie in some."""
    is_box = lambda x: isinstance(x, meta.AxisMetadata)
    parts = [change(x) if is_box(x) else x for x in (kernel.q, kernel.scale)]
    return Kernel(*parts)
