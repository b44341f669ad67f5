"""A flow model in the latents of an autoencoder trained here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes_latents, shapes_tokenizer
from t2i_jax import errors, loop, objective, pipeline
from t2i_jax.data import cache
from t2i_jax.objectives.parts import autoencoders
from tests import runs

KEPT = "encode,moments"


def config(**changes):
    made = shapes_latents.get_config("debug")
    made.log_every, made.steps, made.data.size = 1, 3, 64
    made.optim.model.decay = "constant"
    for key, value in changes.items():
        made[key] = value
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Workdirs: an autoencoder, and models in its latents with and without caches."""
    path = tmp_path_factory.mktemp("latents")
    own = shapes_tokenizer.get_config("kl,debug")
    own.steps = 2
    loop.train(own, path / "kl")
    load = dict(autoencoder=str(path / "kl"))
    loop.train(config(load=load, cache=KEPT), path / "kept")
    loop.train(config(load=load), path / "live")
    return path


@pytest.mark.slow
def test_kept_moments_train_as_pictures_do(folder):
    live, kept = (
        [row["model/loss"] for row in runs.rows(folder / name) if "model/loss" in row]
        for name in ("live", "kept")
    )
    assert len(live) == 3
    np.testing.assert_allclose(kept, live, rtol=1e-3)  # float16
    assert not np.allclose(live[0], live[1], rtol=1e-2)


@pytest.mark.slow
def test_a_picture_is_as_large_as_what_is_decoded(folder):
    draw = pipeline.Pipeline.load(str(folder / "kept"))
    both = draw(["a red circle", "a ring"], seed=3, steps=2)
    assert both.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(draw("a ring", seed=3, index=[1], steps=2)[0], both[1])


def test_latents_are_scaled_on_the_way_there_and_back():
    own = config()
    own.model.autoencoder.update(scaling_factor=0.5, shift_factor=0.25)
    net = autoencoders.of_config(own)
    space = autoencoders.latents(net, (16, 16))
    image_BHWC = jnp.linspace(-1, 1, 2 * 16 * 16 * 3).reshape(2, 16, 16, 3)
    nets = {"autoencoder": runs.filled(space.init["autoencoder"], jax.random.key(0), None)}
    mean_BhwC, _ = net.apply(nets["autoencoder"], image_BHWC)
    batch = {"mean": mean_BhwC}
    z_BhwC = space.encode(nets, batch, None)
    np.testing.assert_allclose(z_BhwC, (mean_BhwC - 0.25) * 0.5, rtol=1e-5)
    want = net.apply(nets["autoencoder"], mean_BhwC, method="decode")
    np.testing.assert_allclose(space.decode(nets, z_BhwC), want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_kept_is_named(tmp_path):
    for name in ("momentz", "sample", "loss_at_times"):
        with pytest.raises(errors.ConfigError, match=f"unknown prediction to be kept '{name}'"):
            loop.Run(config(cache=name), tmp_path / "run")
    with pytest.raises(errors.ConfigError, match="a side of 18 pixels is no multiple of 4"):
        objective.make(config(res=18))


@pytest.mark.slow
def test_moments_of_an_autoencoder_that_learned_on_are_refused(folder):
    own = config(load=dict(autoencoder=str(folder / "kl")), cache="moments")
    run = loop.Run(own, folder / "new")
    run.load_frozen()
    cache.write(folder / "new/pictures", *run.kept_rows("moments"))
    more = shapes_tokenizer.get_config("kl,debug")
    more.steps = 3
    loop.train(more, folder / "kl")
    with pytest.raises(errors.ConfigError, match="pictures are stale: sources"):
        loop.train(own, folder / "new")
