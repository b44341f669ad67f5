"""What a flow network's output means.   B batch · H W pixels · C channels"""

from typing import Annotated

import jax
import jax.numpy as jnp

from t2i_jax import fields

DATA_STD = 0.8  # of pixels in [-1, 1], for the preconditioning
KINDS = ("v", "x", "edm")
Kind = Annotated[str, fields.one_of(KINDS)]
TIME_FLOOR = 1e-12  # keeps t = 0 finite; noise of so little time is lost in rounding


def velocity(kind: str, out_BHWC, z_BHWC, t_B):
    """The velocity ε − x of a network's output at z = (1 − t)·x + t·ε.

    kind:
      "v"    the output is the velocity;
      "x"    the picture, as in JiT (arXiv:2511.13720);
      "edm"  what remains of the picture after its best linear estimate, scaled to unit variance
             (Karras et al. 2022, arXiv:2206.00364, appendix B.6): "x" in noise, "v" near the data.
    """
    t = t_B[:, None, None, None]
    if kind == "v":
        return out_BHWC
    if kind == "x":
        return (z_BHWC - out_BHWC) / jnp.maximum(t, TIME_FLOOR)
    return _from_edm(out_BHWC, z_BHWC, t)


def _from_edm(out_BHWC, z_BHWC, t):
    """(z − x̂)/t where x̂ = c_skip·z + c_out·out, with t cancelled.

    c_skip and c_out are those of Karras et al. at σ = t/(1 − t) for z/(1 − t).
    """
    power = (1 - t) ** 2 * DATA_STD**2 + t**2  # of z
    skip = (t - (1 - t) * DATA_STD**2) / power  # (1 − c_skip)/t
    return skip * z_BHWC - DATA_STD * jax.lax.rsqrt(power) * out_BHWC


def parts(kind: str, out_BHWC, z_BHWC, alpha, sigma):
    """The image and the noise that an output at z = α·x + σ·ε says.   -> (x_BHWC, ε_BHWC)

    kind:
      "eps"   the noise (arXiv:2006.11239);   "x"  the image;
      "v"     α·ε − σ·x, of paths where α² + σ² = 1 (arXiv:2202.00512, appendix D);
      "flow"  ε − x, of the straight line, where α + σ = 1.
    """
    if kind == "eps":
        # α is above 0: `Scheduler.grid` refuses this kind otherwise.
        return (z_BHWC - sigma * out_BHWC) / alpha, out_BHWC
    if kind == "x":
        return out_BHWC, (z_BHWC - alpha * out_BHWC) / jnp.maximum(sigma, TIME_FLOOR)
    if kind == "v":
        return alpha * z_BHWC - sigma * out_BHWC, sigma * z_BHWC + alpha * out_BHWC
    return z_BHWC - sigma * out_BHWC, z_BHWC + alpha * out_BHWC
