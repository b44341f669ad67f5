"""Toy objectives in the shape of real families: what the step must be able to train."""

import jax
import jax.numpy as jnp

from t2i_jax.objective import Aux, Loss, Objective


def batch(n=8, seed=0):
    key = jax.random.key(seed)
    return {
        "image": jax.random.normal(key, (n, 3)),
        "index": jnp.arange(n),
        "weight": jnp.ones(n),
    }


def weighted(value_B, batch):
    return (value_B * batch["weight"]).sum() / jnp.maximum((batch["weight"] != 0).sum(), 1)


def regression(grow=1.0):
    """One net, one loss: w·x against the sum of x."""

    def loss(nets, batch, key, step):
        error_B = (batch["image"] @ nets["model"]["params"]["w"] - batch["image"].sum(-1)) ** 2
        return grow * weighted(error_B, batch), Aux({"error": weighted(error_B, batch)})

    return Objective(lambda key, batch: {"model": _vector(key)}, (Loss(("model",), loss),), {})


def gan(disc_steps=1):
    """disc, then gen; gen shifts noise, disc scores with a line."""

    def fake(nets, batch, key):
        noise = jax.random.normal(key, batch["image"].shape)
        return noise + nets["gen"]["params"]["w"]

    def disc(nets, batch, key, step):
        w = nets["disc"]["params"]["w"]
        gap = (fake(nets, batch, key) @ w) - (batch["image"] @ w)
        return weighted(jax.nn.softplus(gap), batch) + 0.1 * (w**2).sum(), Aux({"gap": gap.mean()})

    def gen(nets, batch, key, step):
        return -weighted(fake(nets, batch, key) @ nets["disc"]["params"]["w"], batch), Aux()

    def init(key, batch):
        a, b = jax.random.split(key)
        return {"gen": _vector(a), "disc": _vector(b)}

    losses = (*[Loss(("disc",), disc)] * disc_steps, Loss(("gen",), gen))
    return Objective(init, losses, {})


def codebook():
    """Two nets in one loss, a frozen third, and a running mean that no gradient touches."""

    def loss(nets, batch, key, step):
        frozen = nets["frozen"]["params"]["w"]
        code = batch["image"] * nets["encoder"]["params"]["w"]
        out = code * nets["decoder"]["params"]["w"] + nets["encoder"]["state"]["mean"]
        mean = 0.9 * nets["encoder"]["state"]["mean"] + 0.1 * code.mean(0)
        error_B = ((out - batch["image"] * frozen) ** 2).sum(-1)
        return weighted(error_B, batch), Aux({}, {"encoder": {"state": {"mean": mean}}})

    def init(key, batch):
        a, b, c = jax.random.split(key, 3)
        encoder = _vector(a) | {"state": {"mean": jnp.zeros(3)}}
        return {"encoder": encoder, "decoder": _vector(b), "frozen": _vector(c)}

    return Objective(init, (Loss(("encoder", "decoder"), loss),), {})


def _vector(key):
    return {"params": {"w": jax.random.normal(key, (3,))}}
