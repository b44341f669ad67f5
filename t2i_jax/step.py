"""One training step for every family: each loss in order, its nets differentiated and updated."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t2i_jax import optim
from t2i_jax.objective import Objective


class State(NamedTuple):
    """All that a step changes; with config and data it determines the rest of the run.

    step: int32, updates done.   nets: trained net -> Linen variables.
    opt: net -> optimiser state.   ema: net -> averaged params.
    skipped: int32, steps in a row dropped as non-finite.
    """

    step: Any
    nets: Mapping[str, Any]
    opt: Mapping[str, Any]
    ema: Mapping[str, Any]
    skipped: Any


def init(objective: Objective, optimisers, ema, key, batch) -> State:
    """The state before the first step; pure, so `jax.eval_shape` gives the target of a restore."""
    made = objective.init(key, batch)
    return start(optimisers, ema, {name: dict(made[name]) for name in objective.trained})


def start(optimisers, ema, nets) -> State:
    """The state before the first step of nets that exist already."""
    return State(
        step=jnp.int32(0),
        nets=nets,
        opt={name: optimisers[name].init(nets[name]["params"]) for name in nets},
        ema={name: jax.tree.map(jnp.copy, nets[name]["params"]) for name in ema},
        skipped=jnp.int32(0),
    )


def make_update(objective: Objective, optimisers, *, ema, seed: int = 0, accumulate: int = 1):
    """`update(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    Losses run in order, each seeing the nets as the previous ones left them. Randomness is
    fold_in(fold_in(seed, step), loss number). A step in which any loss or gradient is not finite
    changes nothing but the step number and `skipped`; metrics say so.
    """

    def update(state: State, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        nets, opt, metrics = dict(state.nets), dict(state.opt), {}
        finite = jnp.bool_(True)
        for i, loss in enumerate(objective.losses):
            value, aux, grads = _gradients(
                loss, {**frozen, **nets}, batch, jax.random.fold_in(key, i), state.step, accumulate
            )
            for name, changed in aux.mutated.items():
                nets[name] = {**nets[name], **changed}
            for name in loss.nets:
                norm = optax.tree.norm(grads[name])
                finite &= jnp.isfinite(norm) & jnp.isfinite(value)
                params = nets[name]["params"]
                updates, opt[name] = optimisers[name].update(
                    grads[name], opt[name], params, state.step
                )
                nets[name] = {**nets[name], "params": optax.apply_updates(params, updates)}
                metrics[f"{name}/grad_norm"] = norm
                metrics[f"{name}/learning_rate"] = optimisers[name].learning_rate(state.step)
            metrics |= {f"{loss.nets[0]}/{k}": v for k, v in {"loss": value, **aux.metrics}.items()}
        averages = {
            name: optax.incremental_update(
                nets[name]["params"], state.ema[name], 1 - optim.ema_decay(decay, state.step)
            )
            for name, decay in ema.items()
        }
        changed = State(state.step, nets, opt, averages, jnp.int32(0))
        kept = state._replace(skipped=state.skipped + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), changed, kept)
        return new._replace(step=state.step + 1), metrics | {"skipped": new.skipped}

    return update


def _gradients(loss, nets, batch, key, step, accumulate):
    """Value, aux and gradients of one loss; micro-batches count by their examples' weights."""

    def scalar(params, nets, batch):
        seen = {**nets, **{name: {**nets[name], "params": params[name]} for name in params}}
        return loss.fn(seen, batch, key, step)

    params = {name: nets[name]["params"] for name in loss.nets}
    grad = jax.value_and_grad(scalar, has_aux=True)
    if accumulate == 1:
        (value, aux), grads = grad(params, nets, batch)
        return value, aux, grads
    # Unrolled, not scanned: XLA:CPU runs convolutions inside a loop body through naive code.
    # Strided slices keep every device's share of the batch where it is.
    total, parts, mutated = batch["weight"].sum(), [], {}
    for m in range(accumulate):
        micro = jax.tree.map(lambda x, m=m: x[m::accumulate], batch)
        (value, aux), grads = grad(params, nets, micro)
        share = micro["weight"].sum() / jnp.maximum(total, 1e-9)
        parts.append(jax.tree.map(lambda x, s=share: s * x, (value, dict(aux.metrics), grads)))
        for name, changed in aux.mutated.items():
            nets = {**nets, name: {**nets[name], **changed}}
            mutated[name] = {**mutated.get(name, {}), **changed}
    value, metrics, grads = jax.tree.map(lambda *xs: sum(xs), *parts)
    return value, aux._replace(metrics=metrics, mutated=mutated), grads
