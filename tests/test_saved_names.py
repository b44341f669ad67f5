"""Names in saved files that the code calls otherwise: they are still read, and still written."""

import types

import jax
import jax.numpy as jnp
import pytest

from t2i_jax import loop
from t2i_jax.models import gan, mlp
from t2i_jax.models.types import Cond


@pytest.mark.parametrize("meta", [{"evaluated": True}, {"evaluated": False}, {"hooked": True}])
def test_a_checkpoint_says_whether_its_step_was_evaluated(meta, tmp_path):
    saved = types.SimpleNamespace(restore_newest=lambda target: ("state", 4), meta=lambda _: meta)
    nothing = dict(config=None, shapes={}, _placed={}, frozen={}, _frozen_digests=None)
    run = types.SimpleNamespace(workdir=tmp_path, **nothing)
    assert loop.Run._first_state(run, saved) == ("state", 4, *meta.values())


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
