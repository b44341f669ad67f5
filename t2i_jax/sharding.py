"""Shardings: a mesh of named axes, and a strategy that says which arrays are split over it.

- pmap: all is whole on every device. Gradients are those of its examples, then one explicit mean.
- data: all is whole on every device. Gradients are those of the global batch, as in the next two.
- zero1: the states of the optimisers and the averages are split.
- fsdp: the parameters are split, too.

Splitting the state is ZeRO (arXiv:1910.02054), stages 1 and 3. The mesh axis "tensor" splits
attention heads and MLPs of every net (Megatron, arXiv:1909.08053) by TENSOR_RULES. A batch is
split over all other axes.

An array that the whole mesh does not divide is split over the largest part of the mesh that does.
For this, zero1 and fsdp give the mesh a named axis for every prime factor of its sizes. So an axis
of 1152 is split over 128 of 256 devices. A matrix splits its other axis over the remaining 2.
"""

import contextlib
import contextvars
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t2i_jax import errors
from t2i_jax.run.fingerprint import path_of

STRATEGIES = ("pmap", "data", "zero1", "fsdp")
TENSOR = "tensor"
GATHERED = "gathered"  # the name of gathered parameters in remat policies
SMALL = 2**14  # numbers on a device: so few are not split along a second axis
# How attention over many tokens is computed -> the only platform that can. See `models.attention`.
KERNELS = {"auto": "", "xla": "", "by_head": "", "splash": "tpu", "cudnn": "gpu"}
_KERNEL = contextvars.ContextVar("kernel", default="auto")
UNEVEN = 0.02  # a larger share of the state beyond the even part of a device gives a warning

# A parameter's path and the axis, from the last, that the tensor axis splits. Kernels that enter
# heads and MLPs are split by columns, those that leave them by rows. So a whole attention or MLP
# needs one sum over the devices, behind its last product.
TENSOR_RULES = (
    (r"(query|picture|kvs_\d+)/(q|kv)/.*kernel$", -1),
    (r"(mlp_gate|mlp_up)/.*kernel$", -1),
    (r"layer_\d+/(gate|up)/kernel$", -1),  # of the text encoders
    (r"layer_\d+/down/kernel$", -2),
    (r"(blocks|attentions)_\d+/(out|cross_out|mlp_leave)/.*kernel$", -2),
    # Of pretrained denoisers. The halves of a GEGLU, and what a single block of FLUX.1 joins, lie
    # on other devices than their like: XLA exchanges them.
    (r"(attn\d?|image|context)/(q|k|v)/kernel$", -1),
    (r"attn\d?/(out|context_out)/kernel$", -2),
    (r"ff(_context)?/up/kernel$|proj_mlp/kernel$|/norm\w*/linear/kernel$", -1),
    (r"ff(_context)?/down/kernel$|single_transformer_blocks_\w+/proj_out/kernel$", -2),
    (r"resnets_\d+/conv1/kernel$", -1),
    (r"resnets_\d+/conv2/kernel$", -2),
)


class Layout:
    """A mesh and a strategy. It gives the shardings of state, nets and batches.

    Args:
      axes: axis -> devices, such as {"data": -1} or {"data": 4, "tensor": 2}. An axis of -1 takes
        the devices that the other axes leave.
      strategy: one of STRATEGIES.
      devices: by default all devices of all processes. A number gives a mesh without devices,
        which serves for shapes alone.
      attention: one of KERNELS, for programs within `context`. "auto" is the platform's own where
        it can, else "xla".
    Raises:
      ConfigError: an unknown strategy, a mesh that does not fit the devices, or a kernel that they
        do not have.
    """

    def __init__(self, axes, strategy: str = "data", *, devices=None, attention: str = "auto"):
        errors.check_known("strategy", strategy, STRATEGIES, where="config.strategy")
        errors.check_known("kernel", attention, KERNELS, where="config.attention")
        self.strategy, mesh = strategy, _mesh(dict(axes), devices)
        self.axes = dict(mesh.shape)
        self.mesh = _factored(mesh) if strategy in ("zero1", "fsdp") else mesh
        self.batch_axes = tuple(name for name in self.mesh.axis_names if name != TENSOR)
        self.parts = math.prod(self.mesh.shape[name] for name in self.batch_axes)
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.batch = NamedSharding(self.mesh, PartitionSpec(self.batch_axes))
        self.attention, known = attention, self.mesh.abstract_mesh.abstract_device
        platform = known.platform if known else jax.default_backend()
        if KERNELS[attention] not in ("", platform):
            raise errors.ConfigError(
                f"{attention!r} is a kernel for a {KERNELS[attention]}, and this is a {platform}",
                where="config.attention",
                fix='set it to "auto"',
            )

    @contextlib.contextmanager
    def context(self):
        """Within it code that is traced knows the mesh, and the kernel for attention."""
        with attention_by(self.attention), jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raises ConfigError for a batch that parts and micro-batches do not divide evenly."""
        unit = self.parts * accumulate
        if batch_size < 1 or accumulate < 1 or batch_size % unit:
            fits = [unit * k for k in sorted({max(batch_size // unit, 1), batch_size // unit + 1})]
            raise errors.ConfigError(
                f"batch_size {batch_size} does not divide by {self.parts} parts of the mesh × "
                f"{accumulate} micro-batches",
                where="config.batch_size",
                fix=f"use one of {fits}",
            )

    def nets(self, nets):
        """The shardings of nets, trained or frozen, from a tree of their shapes or arrays."""
        return self._tree(nets, split=self.strategy == "fsdp")

    def state(self, state):
        """The shardings of a `step.State`, from its shapes."""
        split = self.strategy in ("zero1", "fsdp")
        return state._replace(
            step=self.whole,
            skipped=self.whole,
            nets=self.nets(state.nets),
            opt=self._tree(state.opt, split=split),
            ema=self._tree(state.ema, split=split),
        )

    def held(self, state) -> tuple[int, dict[str, int]]:
        """The bytes of a state, from its shapes, on each device.

        Returns:
          All bytes, and path -> those beyond an even part, of arrays that the strategy splits.
        """
        kept, held, uneven = jax.tree.leaves(self.state(state)), 0, {}
        wanted = {"zero1": ("opt", "ema"), "fsdp": ("nets", "opt", "ema")}.get(self.strategy, ())
        for (path, leaf), s in zip(jax.tree.leaves_with_path(state), kept, strict=True):
            here = _bytes(s.shard_shape(leaf.shape), leaf.dtype)
            held += here
            beyond = here - _bytes(leaf.shape, leaf.dtype) // self.mesh.size
            if path[0].name in wanted and beyond > 0:
                uneven[path_of(path)] = beyond
        return held, uneven

    def report(self, state) -> None:
        """Logs how much of the state each device holds. Warns of arrays that split unevenly."""
        total = sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
        held, uneven = self.held(state)
        logging.info(
            "%s over %s: %.1f MB of state, %.1f MB on each device",
            *(self.strategy, self.axes, total / 1e6, held / 1e6),
        )
        if sum(uneven.values()) > UNEVEN * total:
            worst = sorted(uneven, key=uneven.get, reverse=True)[:3]
            logging.warning(
                "%.1f MB of them are there because arrays do not divide by %d devices: %s",
                sum(uneven.values()) / 1e6,
                self.mesh.size,
                ", ".join(f"{path} {uneven[path] / 1e6:.1f} MB" for path in worst),
            )

    def gather(self, nets, *, at_use: bool = True):
        """Nets for use in a program, gathered over all mesh axes but "tensor".

        A split parameter is gathered where a module reads it, so that few are whole at a time. A
        backward pass that rematerialises gathers it again. Its gradient is split again (ADR 7).

        Args:
          at_use: False gathers all parameters at once, for code that splits batches by hand.
        """
        if self.strategy != "fsdp":
            return nets
        box = lambda x, there, back: GatherAtUse(x, there, back)
        boxes = jax.tree.map(box, nets, self._tree(nets, split=False), self.nets(nets))
        if at_use:
            return boxes
        is_box = lambda x: isinstance(x, GatherAtUse)  # kernels in eight bits stay in theirs
        return jax.tree.map(lambda x: x.unbox(), boxes, is_leaf=is_box)

    def scatter(self, net: str, grads):
        """One net's gradients, sharded like its optimiser's state."""
        if self.strategy not in ("zero1", "fsdp"):
            return grads
        where = self._tree({net: {"params": grads}}, split=True)[net]["params"]
        return jax.lax.with_sharding_constraint(grads, where)

    def spread(self, batch):
        """A batch inside a program, split over the mesh if its length divides."""
        fits = all(x.shape[0] % self.parts == 0 for x in jax.tree.leaves(batch))
        return jax.lax.with_sharding_constraint(batch, self.batch) if fits else batch

    @functools.cached_property
    def share(self) -> tuple[int, int]:
        """(i, n): this process's devices hold the i-th of n equal slices of a batch. Processes that
        a tensor axis joins hold the same one.

        Raises:
          ConfigError: they hold no such slice.
        """
        places = self.batch.addressable_devices_indices_map((self.parts,)).values()
        mine = sorted({(place[0].start or 0) for place in places})
        first, n = mine[0], len(mine)
        if mine != list(range(first, first + n)) or first % n or self.parts % n:
            raise errors.ConfigError(
                f"the devices of a process hold parts {mine} of {self.parts} of a batch",
                where="config.mesh",
                fix="name the data axes before the tensor axis",
            )
        return first // n, self.parts // n

    def place(self, batch):
        """This process's numpy slice of the batch -> global arrays split over the mesh.

        Images travel as bytes. The devices turn uint8 BHWC into float32 in [-1, 1].
        """

        def place(x):
            whole = (len(x) * self.share[1], *x.shape[1:])
            x = jax.make_array_from_process_local_data(self.batch, x, whole)
            return _to_float(x, self.batch) if is_image(x.dtype, x.ndim) else x

        return jax.tree.map(place, batch)

    def _tree(self, tree, *, split: bool):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(
                self.mesh, self._spec(path_of(path), leaf.shape, split)
            ),
            tree,
        )

    def _spec(self, path: str, shape, split: bool) -> PartitionSpec:
        """The spec of one parameter: the tensor axis first, then the other axes if `split`.

        The array's axis that the largest part of the mesh divides gets that part. The mesh axes
        that remain may go to a second axis.
        """
        # room: what is left of each axis on a device; axes: the mesh axes that split it.
        room, axes, free = list(shape), [()] * len(shape), list(self.mesh.axis_names)
        n = self.mesh.shape.get(TENSOR, 1)
        path = path.removesuffix("/q")  # of a kernel in eight bits
        for pattern, axis in TENSOR_RULES if n > 1 else ():
            if re.search(pattern, path) and len(shape) >= -axis and shape[axis] % n == 0:
                axes[axis], room[axis] = (TENSOR,), shape[axis] // n
                free.remove(TENSOR)
                break
        for second in (False, True) if split else ():
            # A second axis costs one more collective at each use, which a small array does not
            # repay.
            if second and math.prod(room) <= SMALL:
                break
            taken = {i: self._part(room[i], free) for i in range(len(shape)) if not axes[i]}
            size = lambda i, taken=taken: self._size(taken[i])
            # Of equal parts the longer axis wins, then the first.
            i = max(taken, key=lambda i: (size(i), room[i], -i), default=None)
            if i is None or size(i) == 1:
                break
            axes[i], room[i] = taken[i], room[i] // size(i)
            free = [name for name in free if name not in taken[i]]
        return PartitionSpec(*(names or None for names in axes))

    def _part(self, length: int, free) -> tuple[str, ...]:
        """The free mesh axes, tried from the last, that together divide an axis of `length`."""
        part = ()
        for name in reversed(free):
            if length % self._size((name, *part)) == 0:
                part = (name, *part)
        return part

    def _size(self, names) -> int:
        return math.prod(self.mesh.shape[name] for name in names)


def free_axes() -> dict[str, int]:
    """Axis -> devices, of the mesh in context. XLA splits arrays along these axes by itself; along
    others a `shard_map` has split them already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def free_parts() -> int:
    """How many parts XLA splits a batch into, by the mesh in context."""
    return math.prod(n for name, n in free_axes().items() if name != TENSOR)


def kernel() -> str:
    """The kernel for attention in this context, one of KERNELS."""
    return _KERNEL.get()


@contextlib.contextmanager
def attention_by(kernel: str):
    """Within it code that is traced computes attention so: one of KERNELS."""
    before = _KERNEL.set(kernel)
    try:
        yield
    finally:
        _KERNEL.reset(before)


def is_image(dtype, rank: int) -> bool:
    """Whether an array of a batch holds images as bytes BHWC. Losses get them as float32."""
    return dtype == jnp.uint8 and rank == 4


def on(shapes, shardings):
    """Shapes with their shardings, as a program is compiled for or a restore reads into."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


@struct.dataclass
class GatherAtUse(meta.AxisMetadata):
    """A split parameter in a net's variables. Linen unboxes it when a module reads it.

    there: its sharding while it is read.   back: its sharding otherwise, and its gradient's.
    """

    value: Any
    there: NamedSharding = struct.field(pytree_node=False)
    back: NamedSharding = struct.field(pytree_node=False)

    def unbox(self):
        # By its name a remat policy can decide not to save the gathered copy.
        return checkpoint_name(_move(self.there, self.back, self.value), GATHERED)

    def replace_boxed(self, val):
        return self.replace(value=val)

    # Linen calls these two where a scan or vmap stacks parameters. A spec has one entry an axis.

    def add_axis(self, index, params):
        return self._with_specs(lambda spec: (*spec[:index], None, *spec[index:]))

    def remove_axis(self, index, params):
        return self._with_specs(lambda spec: (*spec[:index], *spec[index + 1 :]))

    def _with_specs(self, change):
        moved = lambda s: NamedSharding(s.mesh, PartitionSpec(*change(tuple(s.spec))))
        return self.replace(there=moved(self.there), back=moved(self.back))


def anew(nets, n):
    """Nets and a loop's number n, for use in the loop: split parameters are gathered in each turn.

    XLA would gather all of them before the first turn, as they are the same in each.
    """
    is_box = lambda x: isinstance(x, GatherAtUse)
    if not any(map(is_box, jax.tree.leaves(nets, is_leaf=is_box))):
        return nets, n
    return jax.lax.optimization_barrier((nets, n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(there, back, x):
    """x with the sharding `there`. Its cotangent gets the sharding `back`.

    The default transpose would lay the cotangent out as `there`: every device would hold it whole.
    """
    return jax.lax.with_sharding_constraint(x, there)


def _move_forward(there, back, x):
    return _move(there, back, x), None


def _move_backward(there, back, _, g):
    return (jax.lax.with_sharding_constraint(g, back),)


_move.defvjp(_move_forward, _move_backward)


def _mesh(axes: dict, devices) -> jax.sharding.Mesh:
    devices = jax.devices() if devices is None else devices
    count = devices if isinstance(devices, int) else len(devices)
    fixed = math.prod(n for n in axes.values() if n != -1)
    if list(axes.values()).count(-1) > 1 or fixed < 1 or count % fixed:
        raise errors.ConfigError(
            f"mesh {axes} does not fit {count} devices",
            where="config.mesh",
            fix="one axis may be -1, and the others must divide the number of devices",
        )
    sizes = tuple(count // fixed if n == -1 else n for n in axes.values())
    if math.prod(sizes) != count:
        raise errors.ConfigError(
            f"mesh {axes} uses {math.prod(sizes)} of {count} devices",
            where="config.mesh",
            fix="set one axis to -1",
        )
    # Auto leaves shardings between our constraints to XLA. So models need not name any.
    kinds = (AxisType.Auto,) * len(axes)
    if isinstance(devices, int):
        return jax.sharding.AbstractMesh(sizes, tuple(axes), axis_types=kinds)
    return jax.make_mesh(sizes, tuple(axes), axis_types=kinds, devices=devices)


def _factored(mesh):
    """The same devices in the same order, with one axis for every prime factor.

    "data" of 8 becomes "data", "data.1" and "data.2". The tensor axis stays whole.
    """
    sizes = {}
    for name, size in mesh.shape.items():
        for i, factor in enumerate([size] if name == TENSOR else _primes(size)):
            sizes[f"{name}.{i}" if i else name] = factor
    names, shape = tuple(sizes), tuple(sizes.values())
    kinds = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return jax.sharding.AbstractMesh(shape, names, axis_types=kinds)
    return jax.sharding.Mesh(np.reshape(mesh.devices, shape), names, axis_types=kinds)


def _primes(n: int) -> list[int]:
    """The prime factors of n, the largest first. Those of 1 are [1]."""
    factors, factor = [], 2
    while n > 1:
        while n % factor == 0:
            factors, n = [factor, *factors], n // factor
        factor += 1
    return factors or [1]


def _bytes(shape, dtype) -> int:
    # Without x64 JAX holds types of 64 bits in 32.
    return math.prod(shape) * jax.dtypes.canonicalize_dtype(dtype).itemsize


@functools.partial(jax.jit, static_argnums=1)
def _to_float(image, placed):
    """x / 127.5 − 1, with the bits that numpy's float32 gives, on any device (ADR 17).

    It is a program of its own. Fused into a step, it would change how other sums are rounded.
    """
    # XLA would multiply by the reciprocal of 127.5 and round otherwise. Numpy's two roundings end
    # on the grid of 2⁻²⁴. In its units the result is 131,586 x + 2 x / 255 − 2²⁴. The second term
    # rounds to 0 or 1. From x = 128 on the grid has even numbers only, and it rounds to 2.
    x = image.astype(jnp.int32)
    units = 131_586 * x + jnp.minimum(x >> 6, 2) - 2**24
    return jax.lax.with_sharding_constraint(units.astype(jnp.float32) * 2.0**-24, placed)
