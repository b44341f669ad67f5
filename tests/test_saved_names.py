"""Names in saved files that the code calls otherwise: they are still read, and still written."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from configs import coco_gan, digits_mlp_gan, shapes_builtin, shapes_clip, shapes_gan
from t2i_jax import errors, loop, objective, weights
from t2i_jax.commands import train
from t2i_jax.models import gan, mlp
from t2i_jax.models.types import Cond


def test_a_discriminators_head_has_the_names_of_saved_files():
    cond = Cond(jnp.zeros((2, 4, 8)), jnp.ones((2, 4), bool), jnp.zeros((2, 8)))
    image = jnp.zeros((2, 16, 16, 3))
    for net, x, name in (
        (gan.Discriminator(res=16, width=16), image, "verdict"),
        (gan.Projected(width=16), (image,), "Verdict_0"),
        (mlp.Discriminator(res=16, width=16), image, "Verdict_0"),
    ):
        params = jax.eval_shape(net.init, jax.random.key(0), x, cond)["params"]
        assert {"fits", "real", "word_weight"} <= set(params[name])


def stored(model, name, **load):
    """`config.model` as it is read of a config.json."""
    return weights.config_of({"objective": name, "model": model, "load": load}).model.to_dict()


FLOW = dict(backbone="transformer", width=16, patch=2)
IMAGE = dict(tower="convolutional", width=16)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("flow", FLOW, dict(model=FLOW)),
        ("flow", dict(width=3), dict(model=dict(width=3))),
        ("flow", {}, {}),
        ("flow", dict(model=FLOW), dict(model=FLOW)),
        ("gan", dict(width=64, heads=2), digits_mlp_gan.get_config("modern").model),
        ("gan", dict(network="mlp", width=256, depth=3), digits_mlp_gan.get_config().model),
        ("gan", dict(width=512, least=64, depth=2, heads=8), coco_gan.get_config().model),
        ("gan", shapes_gan.get_config().model, shapes_gan.get_config().model),
        (  # each net takes the sizes that it has, after its own
            "gan",
            dict(width=8, noise=4, reads=2, embedding=6, gen=dict(width=16)),
            dict(gen=dict(width=16, noise=4, reads=2), disc=dict(width=8, embedding=6)),
        ),
        (  # a flow network has all its sizes with it
            "gan",
            dict(width=8, depth=2, gen=FLOW),
            dict(gen=FLOW, disc=dict(width=8, depth=2)),
        ),
        (  # heads on features are narrow, whatever the generator is
            "gan",
            dict(network="mlp", width=8, depth=2, eye=IMAGE),
            dict(gen=dict(network="mlp", width=8, depth=2), disc=dict(width=8), eye=IMAGE),
        ),
        ("clip", dict(image=IMAGE, caption=False), dict(image=IMAGE, caption=False)),
    ],
)
def test_sizes_of_older_configs_are_read_by_net(name, old, new):
    new = getattr(new, "to_dict", lambda: new)()
    assert stored(getattr(old, "to_dict", lambda: old)(), name) == new
    assert stored(new, name) == new


def test_heads_on_a_loaded_network_are_known_by_its_source():
    model = stored(dict(width=8, depth=2), "gan", eye="hf:some/network")
    assert model == dict(gen=dict(width=8, depth=2), disc=dict(width=8))


def test_the_built_in_models_are_those_of_their_configs():
    for name, config in {"shapes": shapes_builtin, "shapes-clip": shapes_clip}.items():
        saved = weights.read_config(weights.BUILTIN / name).model
        assert saved.to_dict() == config.get_config().model.to_dict()


@pytest.mark.parametrize("config", [shapes_builtin, digits_mlp_gan, shapes_clip])
def test_what_stands_by_no_net_is_refused(config):
    for name, value, message in (
        ("width", 3, r"'width' is no net but a size of one.*config.model.\w+.width"),
        ("mdoel", {"width": 3}, "unknown net 'mdoel'"),
    ):
        changed = config.get_config("debug")
        changed.model[name] = value
        with pytest.raises(errors.ConfigError, match=message):
            objective.make(changed)


def test_a_config_file_of_an_older_version_trains(monkeypatch, caplog):
    config, trained = shapes_builtin.get_config("debug"), []
    by_net = config.model.to_dict()
    config.model = by_net["model"]
    for flag, value in {
        "CONFIG": config,
        "WORKDIR": "",
        "RESTART": False,
        "DRY_RUN": False,
    }.items():
        monkeypatch.setattr(train, flag, types.SimpleNamespace(value=value))
    monkeypatch.setattr(train, "PLAN", {})
    monkeypatch.setattr(train, "PROCESSES", {})
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: trained.append(config))
    logging.get_absl_logger().propagate = True
    train.main()
    assert "config.model without its nets is the old form" in caplog.text
    caplog.clear()
    train.main()  # config.model is by net now
    assert not caplog.text
    assert json.loads(weights.to_json(trained[0]))["model"] == by_net
