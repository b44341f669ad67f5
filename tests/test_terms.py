"""Terms of a loss on drawn images, in families that are no GANs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes_clip, shapes_flow
from t2i_jax import errors, objective, step
from t2i_jax.models.types import Cond
from t2i_jax.objective import Aux, Loss, Objective
from t2i_jax.objectives.parts import guidance, terms
from tests import runs, toys

B, SIZE = 6, 3


def near(weight, stride=1):
    """A term that owns net "target": the squared distance of an image from it."""

    def value(nets, image, cond, batch, keys):
        return jnp.square(image - nets["target"]["params"]["w"]).sum(-1)

    init = {"target": lambda key, batch, cond: {"params": {"w": jax.random.normal(key, (SIZE,))}}}
    return terms.Term(weight, init, value, stride)


def family(added):
    """Net "model" is the image; its loss is the terms alone."""

    def init(key, batch):
        keys = {"target": jax.random.fold_in(key, 1)}
        return {"model": toys._vector(key)} | terms.init(added, keys, batch, None)

    def loss(nets, batch, key, now):
        image = batch["image"] + nets["model"]["params"]["w"]
        keys = terms.Keys(key, key)
        value, metrics = terms.add(1.0, added, nets, image, None, batch, keys, B)
        return value, Aux(metrics)

    return Objective(init, (Loss(("model",), loss),), {}, training_only=terms.nets_of(added))


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_term_adds_a_frozen_net_and_a_metric(stride):
    toy, batch = family({"near": near(0.5, stride)}), toys.batch(B)
    batch["weight"] = jnp.array([1, 1, 0, 1, 1, 1])
    nets = toy.init(jax.random.key(0), batch)
    assert set(nets) == {"model", "target"}
    assert (toy.trained, toy.training_only) == (("model",), ("target",))
    optimisers = {
        "model": step.optim.make({"name": "sgd", "learning_rate": 0.1}, steps=1, where="")
    }
    state = step.start(optimisers, {}, {"model": nets["model"]})
    frozen = {"target": nets["target"]}
    new, metrics = jax.jit(step.make_update(toy, optimisers, ema={}))(state, frozen, batch)
    w, target = (np.asarray(nets[name]["params"]["w"], np.float64) for name in nets)
    image, weight = np.asarray(batch["image"])[::stride], np.asarray(batch["weight"], float)
    share = weight[::stride] / (weight.sum() * len(image) / B)
    mean = (np.square(image + w - target).sum(-1) * share).sum()
    assert metrics["model/near"] == pytest.approx(mean, rel=1e-5)
    assert metrics["model/loss"] == pytest.approx(1 + 0.5 * mean, rel=1e-5)
    slope = (2 * (image + w - target) * share[:, None]).sum(0)
    np.testing.assert_allclose(new.nets["model"]["params"]["w"], w - 0.1 * 0.5 * slope, rtol=1e-4)


def test_terms_are_added_in_their_order_and_share_nets():
    added = {"near": near(2.0), "again": near(3.0)}
    assert terms.nets_of(added) == ("target",)
    toy, batch = family(added), toys.batch(B)
    nets = toy.init(jax.random.key(0), batch)
    value, aux = toy.losses[0].fn(nets, batch, jax.random.key(0), 0)
    assert list(aux.metrics) == ["near", "again"]
    assert value == pytest.approx(float(1 + 5 * aux.metrics["near"]), rel=1e-5)


def test_any_family_can_be_guided():
    config = shapes_flow.get_config("debug")
    batch = runs.abstract_batch(config, 2)
    config.model = {"clip": shapes_clip.get_config("debug").model}
    term = guidance.make(config).term(1.5, "cosine")
    key = jax.random.key(0)
    cond = Cond(jnp.zeros((2, 4, 8)), jnp.ones((2, 4), bool), jnp.zeros((2, 8)))
    keys = dict.fromkeys(term.init, key)
    nets = jax.eval_shape(lambda batch: terms.init({"clip": term}, keys, batch, cond), batch)
    assert set(nets) == {"clip_image", "clip_caption"}
    value_B = jax.eval_shape(term.value, nets, batch["image"], cond, batch, terms.Keys(key, key))
    assert value_B.shape == (2,)


def test_parts_of_families_are_no_families():
    config = shapes_flow.get_config("debug")
    config.objective = "parts"
    with pytest.raises(errors.ConfigError, match=r"no objectives named 'parts'.*Fix: (?!.*parts)"):
        objective.make(config)
