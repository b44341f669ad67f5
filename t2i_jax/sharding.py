"""The device mesh: batches are split over it, the state is replicated."""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t2i_jax import errors


def make_mesh(axes) -> jax.sharding.Mesh:
    """A mesh with named axes, `{"data": -1}`; -1 takes all devices the other axes leave."""
    axes, devices = dict(axes), jax.device_count()
    fixed = math.prod(n for n in axes.values() if n != -1)
    if list(axes.values()).count(-1) > 1 or fixed < 1 or devices % fixed:
        raise errors.ConfigError(
            f"mesh {axes} does not fit {devices} devices",
            where="config.mesh",
            fix="one axis may be -1, and the others must divide the number of devices",
        )
    sizes = tuple(devices // fixed if n == -1 else n for n in axes.values())
    if math.prod(sizes) != devices:
        raise errors.ConfigError(
            f"mesh {axes} uses {math.prod(sizes)} of {devices} devices",
            where="config.mesh",
            fix="set one axis to -1",
        )
    return jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def check_batch(batch_size: int, accumulate: int, mesh) -> None:
    """Refuses a batch that does not divide over devices and micro-batches; says what would fit."""
    unit = mesh.size * accumulate
    if batch_size < 1 or accumulate < 1 or batch_size % unit:
        fits = [unit * k for k in sorted({max(batch_size // unit, 1), batch_size // unit + 1})]
        raise errors.ConfigError(
            f"batch_size {batch_size} does not divide by {mesh.size} devices × {accumulate} parts",
            where="config.batch_size",
            fix=f"use one of {fits}",
        )


def replicated(mesh) -> NamedSharding:
    """The sharding of the state: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def place(batch, mesh):
    """This process's numpy slice of the batch -> global arrays split over the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)
