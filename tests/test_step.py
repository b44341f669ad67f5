"""The step, on toy objectives in the shape of every family to come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import errors, optim, sharding, step
from t2i_jax.objective import Aux, Loss, Objective
from tests import toys


def setup(objective, *, ema=None, accumulate=1, rate=0.1, **spec):
    spec = {"name": "sgd", "learning_rate": rate, **spec}
    optimisers = {n: optim.make(spec, steps=10, where="test") for n in objective.trained}
    ema = ema or {}
    state = step.init(objective, optimisers, ema, jax.random.key(1), toys.batch())
    update = step.make_update(objective, optimisers, ema=ema, accumulate=accumulate)
    nets = objective.init(jax.random.key(1), toys.batch())
    frozen = {n: v for n, v in nets.items() if n not in objective.trained}
    return state, frozen, jax.jit(update)


def equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_losses_run_in_order_each_seeing_the_nets_before_it():
    objective = toys.gan()
    state, frozen, update = setup(objective)
    batch = toys.batch()
    after, metrics = update(state, frozen, batch)

    key = jax.random.fold_in(jax.random.key(0), 0)
    nets = {name: dict(net) for name, net in state.nets.items()}
    for i, loss in enumerate(objective.losses):
        (name,) = loss.nets

        def scalar(params, name=name, loss=loss, i=i):
            seen = {**nets, name: {"params": params}}
            return loss.fn(seen, batch, jax.random.fold_in(key, i), 0)[0]

        grad = jax.grad(scalar)(nets[name]["params"])
        nets[name] = {"params": jax.tree.map(lambda p, g: p - 0.1 * g, nets[name]["params"], grad)}
    equal(after.nets, nets, rtol=1e-5, atol=1e-6)
    assert {"disc/loss", "disc/gap", "gen/loss", "gen/grad_norm"} <= set(metrics)


def test_a_loss_moves_the_nets_it_names_and_no_other():
    objective = toys.gan()
    only_gen = objective._replace(losses=objective.losses[1:])
    nets = objective.init(jax.random.key(1), toys.batch())
    state, _, update = setup(only_gen)
    after, _ = update(state, {"disc": nets["disc"]}, toys.batch())
    assert set(after.nets) == {"gen"}
    assert not np.allclose(after.nets["gen"]["params"]["w"], state.nets["gen"]["params"]["w"])


def test_n_discriminator_steps_are_n_updates_with_fresh_noise_at_one_learning_rate():
    state, frozen, update = setup(toys.gan(disc_steps=3), warmup=5)
    after, metrics = update(state, frozen, toys.batch())
    one, frozen, update_one = setup(toys.gan(), warmup=5)
    assert not np.allclose(
        after.nets["disc"]["params"]["w"],
        update_one(one, frozen, toys.batch())[0].nets["disc"]["params"]["w"],
    )
    assert metrics["disc/learning_rate"] == pytest.approx(
        0.1 / 5
    )  # one step of the loop, not three


def test_a_loss_may_train_two_nets_and_change_collections():
    state, frozen, update = setup(toys.codebook())
    after, _ = update(state, frozen, toys.batch())
    code = toys.batch()["image"] * state.nets["encoder"]["params"]["w"]
    equal(after.nets["encoder"]["state"]["mean"], 0.1 * code.mean(0), rtol=1e-5, atol=1e-7)
    for name in ("encoder", "decoder"):
        assert not np.allclose(after.nets[name]["params"]["w"], state.nets[name]["params"]["w"])
    assert "frozen" not in after.nets


@pytest.mark.parametrize("make", [toys.regression, toys.gan], ids=["one loss", "gan"])
def test_accumulation_equals_the_whole_batch(make):
    batch = toys.batch() | {"weight": jnp.array([1.0, 1, 0, 1, 1, 0, 0, 1])}
    objective = make()
    if (
        make is toys.gan
    ):  # noise by example, as the contract asks, so that halves draw what the whole draws
        objective = _noise_by_example(objective)
    state, frozen, whole = setup(objective)
    _, _, halves = setup(objective, accumulate=2)
    a, metrics_a = whole(state, frozen, batch)
    b, metrics_b = halves(state, frozen, batch)
    equal(a, b, rtol=1e-5, atol=1e-6)
    for name in ("model/loss", "disc/loss"):
        if name in metrics_a:
            assert float(metrics_a[name]) == pytest.approx(float(metrics_b[name]), rel=1e-5)


def _noise_by_example(objective):
    def by_example(fn):
        def loss(nets, batch, key, step):
            def one(image, index, weight):
                single = {"image": image[None], "index": index[None], "weight": jnp.ones(1)}
                value, _ = fn(nets, single, jax.random.fold_in(key, index), step)
                return value

            value_B = jax.vmap(one)(batch["image"], batch["index"], batch["weight"])
            return toys.weighted(value_B, batch), Aux()

        return loss

    return objective._replace(
        losses=tuple(Loss(loss.nets, by_example(loss.fn)) for loss in objective.losses)
    )


def test_accumulation_hands_changed_collections_from_part_to_part():
    state, frozen, update = setup(toys.codebook(), accumulate=2)
    after, _ = update(state, frozen, toys.batch())
    code = toys.batch()["image"] * state.nets["encoder"]["params"]["w"]
    mean = 0.1 * code[:4].mean(0)
    equal(
        after.nets["encoder"]["state"]["mean"],
        0.9 * mean + 0.1 * code[4:].mean(0),
        rtol=1e-5,
        atol=1e-7,
    )


def test_micro_batches_are_neighbours():
    """From a multiple of their number on, so that every n-th is the same one as in the whole."""
    seen = []

    def loss(nets, batch, key, step):
        seen.append(batch["index"])
        return nets["model"]["params"]["w"].sum(), Aux()

    objective = Objective(toys.regression().init, (Loss(("model",), loss),), {})
    optimisers = {"model": optim.make({"name": "sgd", "learning_rate": 1.0}, steps=1, where="")}
    state = step.init(objective, optimisers, {}, jax.random.key(1), toys.batch())
    update = step.make_update(objective, optimisers, ema={}, accumulate=4)
    update(state, {}, toys.batch())
    assert [index.tolist() for index in seen] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("accumulate", "strategy", "parts", "where"),
    [
        (2, "data", 1, "config.accumulate"),
        (4, "fsdp", 8, "config.accumulate"),
        (1, "pmap", 8, "config.strategy"),
    ],
)
def test_a_loss_that_compares_examples_sees_all_of_them_or_is_refused(
    accumulate, strategy, parts, where
):
    alone, other = toys.regression().losses[0], toys.gan()
    compared = other._replace(losses=(alone, other.losses[0]._replace(compares=True)))
    layout = lambda strategy, parts: sharding.Layout({"data": -1}, strategy, devices=parts)
    options = dict(ema={}, accumulate=accumulate, layout=layout(strategy, parts))
    with pytest.raises(
        errors.ConfigError, match=r'of disc compare.*"data", "zero1" or "fsdp"'
    ) as e:
        step.make_update(compared, {}, **options)
    assert e.value.where == where
    step.make_update(other, {}, **options)
    for fits in ("data", "zero1", "fsdp"):
        step.make_update(compared, {}, ema={}, layout=layout(fits, 8))
    step.make_update(compared, {}, ema={}, layout=layout("pmap", 1))


def test_examples_of_weight_zero_change_nothing():
    state, frozen, update = setup(toys.regression())
    batch = toys.batch() | {"weight": jnp.array([1.0] * 7 + [0.0])}
    broken = batch | {"image": batch["image"].at[7].set(100.0)}
    equal(update(state, frozen, batch)[0].nets, update(state, frozen, broken)[0].nets, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    state, frozen, update = setup(toys.regression(), ema={"model": 0.9}, name="adam")
    bad = toys.batch() | {"image": toys.batch()["image"].at[0, 0].set(jnp.nan)}
    after, metrics = update(state, frozen, bad)
    assert (after.step, after.skipped, metrics["skipped"]) == (1, 1, 1)
    equal((after.nets, after.opt, after.ema), (state.nets, state.opt, state.ema), rtol=0)
    after, metrics = update(after, frozen, toys.batch())
    assert (after.step, after.skipped) == (2, 0)
    assert not np.array_equal(
        after.nets["model"]["params"]["w"], state.nets["model"]["params"]["w"]
    )


def test_infinite_updates_of_finite_gradients_change_nothing():
    state, frozen, update = setup(toys.regression(grow=100.0), rate=3e38, ema={"model": 0.9})
    after, metrics = update(state, frozen, toys.batch())
    assert np.isfinite(metrics["model/grad_norm"])
    assert metrics["model/nonfinite_array"] == 0
    assert (after.step, after.skipped) == (1, 1)
    equal(after._replace(step=0, skipped=0), state._replace(step=0, skipped=0), rtol=0)


def test_a_collection_that_is_not_finite_changes_nothing():
    plain = toys.codebook()

    def poisoned(*args):
        value, aux = plain.losses[0].fn(*args)
        return value, aux._replace(mutated={"encoder": {"state": {"mean": jnp.full(3, jnp.inf)}}})

    objective = plain._replace(losses=(Loss(("encoder", "decoder"), poisoned),))
    state, frozen, update = setup(objective)
    after, metrics = update(state, frozen, toys.batch())
    assert metrics["skipped"] == 1
    equal(after.nets, state.nets, rtol=0)


def test_the_average_of_a_constant_is_the_constant_and_warms_up():
    state, frozen, update = setup(toys.regression(grow=0.0), ema={"model": 0.999})
    after, _ = update(state, frozen, toys.batch())
    equal(after.ema["model"], state.nets["model"]["params"], rtol=1e-6)
    assert optim.ema_decay(0.999, 0) == pytest.approx(0.1)
    assert optim.ema_decay(0.999, 10**6) == pytest.approx(0.999)


def test_update_traces_once():
    objective = toys.regression()
    traced = []

    def counting(nets, batch, key, step):
        traced.append(1)
        return objective.losses[0].fn(nets, batch, key, step)

    state, frozen, update = setup(objective._replace(losses=(Loss(("model",), counting),)))
    for _ in range(3):
        state, _ = update(state, frozen, toys.batch())
    assert len(traced) == 1


def test_a_step_of_many_arrays_is_as_many_times_the_program_of_a_few():
    """Whether all are finite is found once, and not again for each of them."""

    def instructions(arrays):
        def loss(nets, batch, key, step):
            params = nets["model"]["params"]
            error_B = batch["image"].sum(-1) - sum(x.sum() for x in params.values())
            return toys.weighted(error_B**2, batch), Aux()

        init = lambda key, batch: {
            "model": {"params": {str(i): jnp.ones(3) for i in range(arrays)}}
        }
        state, frozen, update = setup(Objective(init, (Loss(("model",), loss),), {}))
        return update.lower(state, frozen, toys.batch()).compile().as_text().count(" = ")

    assert instructions(64) <= 5 * instructions(16)


def test_training_learns():
    state, frozen, update = setup(toys.regression())
    first = None
    for _ in range(60):
        state, metrics = update(state, frozen, toys.batch())
        first = metrics["model/loss"] if first is None else first
    assert metrics["model/loss"] < 1e-3 * first


def test_every_step_has_its_own_noise():
    seen = []

    def noisy(nets, batch, key, step):
        return (nets["model"]["params"]["w"] * jax.random.normal(key, (3,))).sum(), Aux()

    objective = Objective(toys.regression().init, (Loss(("model",), noisy),) * 2, {})
    state, frozen, update = setup(objective, rate=1e-9)
    for _ in range(2):
        state, metrics = update(state, frozen, toys.batch())
        seen.append(float(metrics["model/loss"]))
    assert len(set(seen)) == 2


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_schedules(decay, middle, end):
    spec = {"name": "sgd", "learning_rate": 2.0, "decay": decay, "warmup": 10}
    rate = optim.make(spec, steps=110, where="test").learning_rate
    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(2.0 * middle)
    assert rate(110) == pytest.approx(2.0 * end, abs=1e-6)


def test_muon_sees_a_convolution_as_one_matrix_and_leaves_vectors_to_adam():
    """Its update of a kernel, inputs × outputs, has singular values that are almost equal."""
    spec = {"name": "muon", "learning_rate": 1.0, "consistent_rms": 1.0}
    muon = optim.make(spec, steps=10, where="test")
    params = {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    grads["kernel"] *= jnp.arange(1.0, 7.0)  # outputs of unlike size
    updates, _ = jax.jit(muon.update)(grads, muon.init(params), params, 0)
    values = np.linalg.svd(updates["kernel"].reshape(36, 6), compute_uv=False)
    assert values.max() / values.min() < 2
    spread = np.linalg.svd(grads["kernel"].reshape(36, 6), compute_uv=False)
    assert spread.max() / spread.min() > 4  # of the gradient itself
    np.testing.assert_array_equal(np.sign(updates["bias"]), -np.sign(grads["bias"]))
    assert np.ptp(np.abs(updates["bias"])) < 1e-3  # Adam's first step is the same for all


def test_a_stable_share_keeps_the_full_rate_until_the_decay():
    spec = {"name": "sgd", "learning_rate": 2.0, "decay": "linear", "warmup": 10, "stable": 0.6}
    rate = optim.make(spec, steps=110, where="test").learning_rate
    assert [float(rate(n)) for n in (10, 40, 70)] == [2.0, 2.0, 2.0]
    assert rate(90) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(0.0, abs=1e-6)


def test_a_pair_of_numbers_is_annealed_over_the_run():
    spec = {"name": "adam", "learning_rate": 1e-3, "b1": 0.0, "b2": (0.5, 0.9)}
    adam = optim.make(spec, steps=10, where="test")
    params = jnp.zeros(3)
    state = adam.init(params)
    for n, wanted in ((0, 0.5), (5, 0.7), (10, 0.9), (12, 0.9)):
        _, found = adam.update(jnp.ones(3), state, params, n)
        assert found.hyperparams["b2"] == pytest.approx(wanted)
        assert float(found.inner_state[0].nu[0]) == pytest.approx(1 - wanted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "adamw", "learning_rte": 1e-3}, "learning_rate is None"),
        ({"name": "adamv", "learning_rate": 1e-3}, "no optimiser 'adamv'"),
        ({"name": "adam", "learning_rate": 1e-3, "nesterov": (0, 1)}, "could be annealed"),
        ({"name": "adamw", "learning_rate": 1e-3, "beta2": 0.9}, "unknown option 'beta2'"),
        ({"name": "adamw", "learning_rate": float("nan")}, "learning_rate is nan"),
        ({"name": "adamw", "learning_rate": 1e-3, "stable": 1.0}, "stable is 1.0"),
        ({"name": "adamw", "learning_rate": 1e-3, "decay": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_bad_optimisers_are_named(spec, message):
    with pytest.raises(errors.ConfigError, match=message):
        optim.make(spec, steps=10, where="config.optim.model")
