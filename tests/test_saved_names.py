"""Names in saved files that the code calls otherwise: they are still read, and still written."""

import jax
import jax.numpy as jnp

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
