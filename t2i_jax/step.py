"""One training step for every family: each loss in order, its nets differentiated and updated."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import PartitionSpec

from t2i_jax import errors, losses, optim, sharding
from t2i_jax.objective import Aux, Objective

FAULTY = "nonfinite_array"  # metric of a net: the number of its first array that is not finite


class State(NamedTuple):
    """Everything that a step changes. With config and data it determines the rest of the run.

    step: int32, the updates done.
    nets: trained net -> Linen variables.
    opt: net -> optimiser state.
    ema: net -> averaged parameters.
    skipped: int32, the steps in a row that were dropped as non-finite.
    """

    step: Any
    nets: Mapping[str, Any]
    opt: Mapping[str, Any]
    ema: Mapping[str, Any]
    skipped: Any


def init(objective: Objective, optimisers, ema, key, batch) -> State:
    """The state before the first step. Pure, so `jax.eval_shape` gives the target of a restore."""
    made = objective.init(key, batch)
    return start(optimisers, ema, {name: dict(made[name]) for name in objective.trained})


def start(optimisers, ema, nets) -> State:
    """The state before the first step, from nets that exist already."""
    # The averages are copies: a step donates its state, and no buffer can be donated twice.
    return State(
        step=jnp.int32(0),
        nets=nets,
        opt={name: optimisers[name].init(nets[name]["params"]) for name in nets},
        ema={name: jax.tree.map(jnp.copy, nets[name]["params"]) for name in ema},
        skipped=jnp.int32(0),
    )


def make_update(
    objective: Objective, optimisers, *, ema, seed: int = 0, accumulate: int = 1, layout=None
):
    """`update(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    Losses run in order. Each sees the nets as the ones before have updated them. Its random key is
    fold_in(fold_in(seed, step), number of the loss).

    A step is dropped where a loss, gradient, updated parameter or collection is not finite. It then
    changes nothing but the step number and `skipped`. "<net>/nonfinite_array" is the number of the
    array at fault: the first of the net's gradient, else of its updated parameters. Arrays count in
    the order of the net's leaves. −1 means none.

    A loss sees the global batch. With micro-batches or the strategy "pmap" it sees each device's
    own examples of a micro-batch. Their gradients are summed once, by the examples' weights.

    Args:
      ema: net -> decay of its parameters' moving average.
      accumulate: micro-batches of a step.
      layout: the `sharding.Layout` of the program; by default one device.
    Raises:
      ConfigError: a loss that compares examples would see only parts of the batch.
    """
    layout = layout or sharding.Layout({"data": 1}, devices=jax.local_devices()[:1])
    _check_whole(objective, accumulate, layout)

    @layout.context()
    def update(state: State, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        nets, opt, metrics = dict(state.nets), dict(state.opt), {}
        finite = jnp.bool_(True)
        for i, loss in enumerate(objective.losses):
            key_loss, all_nets = jax.random.fold_in(key, i), {**frozen, **nets}
            value, aux, grads = _gradients(
                loss, all_nets, batch, key_loss, state.step, accumulate, layout
            )
            for name, changed in meta.unbox(dict(aux.mutated)).items():
                nets[name] = {**nets[name], **changed}
                for leaf in jax.tree.leaves(changed):
                    finite &= jnp.isfinite(leaf).all()
            for name in loss.nets:
                # One pass serves twice: the sums give the norm, and tell which array is not finite.
                squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads[name])]
                norm = jnp.sqrt(sum(squares))
                finite &= jnp.isfinite(norm) & jnp.isfinite(value)
                params = nets[name]["params"]
                # Under zero1 and fsdp the gradients are split like the optimiser's state. So each
                # device updates its own part.
                updates, opt[name] = optimisers[name].update(
                    layout.scatter(name, grads[name]), opt[name], params, state.step
                )
                params = optax.apply_updates(params, updates)
                nets[name] = {**nets[name], "params": params}
                # An optimiser can make infinite updates of finite gradients.
                faulty = _first_faulty(squares)
                faulty = jnp.where(faulty >= 0, faulty, _first_faulty(params))
                finite &= faulty < 0
                metrics[f"{name}/{FAULTY}"] = faulty
                metrics[f"{name}/grad_norm"] = norm
                metrics[f"{name}/learning_rate"] = optimisers[name].learning_rate(state.step)
            metrics |= {f"{loss.nets[0]}/{k}": v for k, v in {"loss": value, **aux.metrics}.items()}
        averages = {}
        for name, decay in ema.items():
            params, point = nets[name]["params"], optimisers[name].point
            averages[name] = optax.incremental_update(
                point(opt[name], params) if point else params,
                state.ema[name],
                1 - optim.ema_decay(decay, state.step),
            )
        # A dropped step keeps every old value. Only the two counters move on.
        changed = State(state.step, nets, opt, averages, jnp.int32(0))
        kept = state._replace(skipped=state.skipped + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), changed, kept)
        return new._replace(step=state.step + 1), metrics | {"skipped": new.skipped}

    return update


def _check_whole(objective, accumulate, layout) -> None:
    """Raises ConfigError where the batch of a loss that compares examples would be cut (ADR 18)."""
    devices = layout.parts if layout.strategy == "pmap" else 1
    compared = [loss.nets for loss in objective.losses if loss.compares]
    if compared and max(accumulate, devices) > 1:
        names = " and ".join(sorted({name for nets in compared for name in nets}))
        raise errors.ConfigError(
            f"losses of {names} compare the examples of a batch, and would see it in "
            f"{accumulate * devices} parts",
            where="config.accumulate" if accumulate > 1 else "config.strategy",
            fix='set accumulate to 1 and strategy to "data", "zero1" or "fsdp"',
        )


def _gradients(loss, nets, batch, key, step, accumulate, layout):
    """Value, aux and gradients of one loss on a batch. The layout decides how it is computed."""

    def value_and_grad(nets, batch, gather=lambda nets: nets):
        def scalar(params, nets):
            trained = {name: {**nets[name], "params": params[name]} for name in params}
            # Gathered inside of what is differentiated: so the gradients come back split.
            return loss.fn(gather({**nets, **trained}), batch, key, step)

        params = {name: nets[name]["params"] for name in loss.nets}
        return jax.value_and_grad(scalar, has_aux=True)(params, nets)

    def summed(nets, batch, total):
        """The sum over micro-batches, each by its share of the examples that count."""
        # Unrolled, not scanned: XLA:CPU runs convolutions inside a loop body through naive code.
        parts, mutated = [], {}
        for m in range(accumulate):
            # Neighbours stay together, so that every n-th example is the same one as in the whole.
            size = len(batch["weight"]) // accumulate
            micro = jax.tree.map(lambda x, m=m, n=size: x[m * n : (m + 1) * n], batch)
            (value, aux), grads = value_and_grad(nets, micro)
            share = losses.counted(micro["weight"]) / jnp.maximum(total, 1)
            parts.append(jax.tree.map(lambda x, s=share: s * x, (value, dict(aux.metrics), grads)))
            # The next micro-batch goes on from the collections of this one, such as statistics.
            for name, changed in aux.mutated.items():
                nets = {**nets, name: {**nets[name], **changed}}
                mutated[name] = {**mutated.get(name, {}), **changed}
        return jax.tree.map(lambda *xs: sum(xs), *parts), mutated

    def on_each_device(nets, batch):
        axes = layout.batch_axes
        sums, mutated = summed(nets, batch, jax.lax.psum(losses.counted(batch["weight"]), axes))
        return jax.lax.psum(sums, axes), jax.tree.map(lambda x: _mean(x, axes), mutated)

    # By hand where gradients must be summed over devices once and not for every micro-batch. Left
    # to itself, XLA would exchange them after each one (ADR 7).
    if layout.parts > 1 and (layout.strategy == "pmap" or accumulate > 1):
        fn = jax.shard_map(
            on_each_device,
            mesh=layout.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(layout.batch_axes)),
            out_specs=PartitionSpec(),
            axis_names=set(layout.batch_axes),
            check_vma=False,  # gradients stay each device's own until the one sum
        )
        (value, metrics, grads), mutated = fn(layout.gather(nets, at_use=False), batch)
    elif accumulate > 1:
        (value, metrics, grads), mutated = summed(nets, batch, losses.counted(batch["weight"]))
    else:
        (value, aux), grads = value_and_grad(nets, batch, layout.gather)
        return value, aux, grads
    return value, Aux(metrics, mutated), grads


def _first_faulty(arrays):
    """The number of the first array with a value that is not finite, or −1."""
    sound = [jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]
    # XLA would unroll all() into a chain of ands, and copy that into every array's update.
    first = jnp.argmin(jnp.stack([*sound, jnp.bool_(False)]))
    return jnp.where(first < len(sound), first, -1).astype(jnp.int32)


def _mean(x, axes):
    """One value for all devices: the mean of floats, the largest of counters and flags."""
    whole = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool
    return jax.lax.pmax(x, axes) if whole else jax.lax.pmean(x, axes)
