"""Paths from an image to noise: what a flow model mixes, learns and walks back.

z = α(t)·x + σ(t)·ε for an image x and noise ε; time 0 is the image, time 1 the noise.

B batch · S times
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, losses
from t2i_jax.sampling import prediction

X_FLOOR = 0.2  # an x-prediction's loss is weighted by 1/t² down to here
STEPS = 1000  # of a discrete schedule (Ho et al. 2020, arXiv:2006.11239, section 4)


class Path(NamedTuple):
    """One way from images to noise.

    alpha, sigma: time -> share of the image and of the noise.
    kinds: what a network's output may mean on this path.
    draw: standard normal numbers -> training times.
    error: (kind, out, z, x, noise, t_B) -> the loss of each example, B.
    velocity: (kind, out, z, t_B) -> how the solver's state changes with its clock.
    clock: time -> the solver's clock.
    scaled: whether the solver's state is z/α in place of z.
    latest: time at which solvers begin: 1, or where σ/α is small enough for a step from there.
    """

    alpha: Callable
    sigma: Callable
    kinds: tuple[str, ...]
    draw: Callable
    error: Callable
    velocity: Callable
    clock: Callable = lambda t: t
    scaled: bool = False
    latest: float = 1.0

    def mix(self, x, noise, t):
        """z at a time, which is a scalar or one for each example."""
        t = _each(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def state(self, z, t):
        """The solver's state of a z."""
        return z / self.alpha(_each(t, z)) if self.scaled else z

    def of_state(self, state, t):
        """The z of a solver's state."""
        return state * self.alpha(_each(t, state)) if self.scaled else state


def make(name: str, *, mean: float = 0.0, std: float = 1.0) -> Path:
    """The path "straight", or that of one of SCHEDULES.

    Args:
      mean, std: of the normal that training times come from.
    """
    if name == "straight":
        return straight(mean, std)
    errors.check_known("path", name, NAMES, where="config.loss.path")
    return discrete(SCHEDULES[name](), mean, std, latest=LATEST.get(name, 1.0))


def straight(mean: float = 0.0, std: float = 1.0) -> Path:
    """Rectified flow, z = (1 − t)·x + t·ε (arXiv:2209.03003, 2210.02747).

    Training times are the sigmoid of a normal (arXiv:2403.03206, section 3.1). The loss is the
    squared error of the velocity ε − x, of an x-prediction times min(t/0.2, 1)²: else the network
    would spend most of it on pixels that are right already, where little noise is left.
    """

    def error(kind, out, z, x, noise, t_B):
        error_B = losses.squared_error(prediction.velocity(kind, out, z, t_B), noise - x)
        return error_B * jnp.minimum(t_B / X_FLOOR, 1) ** 2 if kind == "x" else error_B

    return Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        kinds=prediction.KINDS,
        draw=lambda normal_B: jax.nn.sigmoid(mean + std * normal_B),
        error=error,
        velocity=prediction.velocity,
    )


def discrete(beta_T, mean: float = 0.0, std: float = 1.0, latest: float = 1.0) -> Path:
    """Diffusion in T steps, α_i² = Π (1 − β_j) and σ² = 1 − α² (arXiv:2006.11239, eq. 4).

    Time i/T is step i; other times are those of the nearest step, and step 0 is the image. Training
    times are uniform over the steps for the default `mean` and `std`. The loss is the squared error
    of what the network puts out: the noise ("eps"), α·ε − σ·x ("v", arXiv:2202.00512) or the image
    ("x"). A solver moves z/α along the clock σ/α, where the velocity is the noise
    (arXiv:2010.02502, eq. 14): Euler's steps there are DDIM's.

    Args:
      beta_T: variances of the steps, each in (0, 1).
      latest: time at which solvers begin.
    """
    # In float64: a product of a thousand factors near 1 loses digits in float32.
    kept_T = np.concatenate([[1.0], np.cumprod(1 - np.asarray(beta_T, np.float64))])
    alphas = jnp.asarray(np.sqrt(kept_T), jnp.float32)
    sigmas = jnp.asarray(np.sqrt(1 - kept_T), jnp.float32)
    with np.errstate(divide="ignore"):  # a last step may leave nothing of the image
        clocks = jnp.asarray(np.sqrt(1 / kept_T - 1), jnp.float32)
    steps = len(kept_T) - 1
    at = lambda table: lambda t: table[jnp.round(jnp.asarray(t) * steps).astype(jnp.int32)]

    def noise_of(kind, out, z, t):
        alpha, sigma = (table(_each(t, z)) for table in (at(alphas), at(sigmas)))
        if kind == "eps":
            return out
        if kind == "v":
            return sigma * z + alpha * out
        noise = (z - alpha * out) / jnp.maximum(sigma, prediction.TIME_FLOOR)
        return jnp.where(sigma > 0, noise, 0)  # step 0 is the image, and has none

    def error(kind, out, z, x, noise, t_B):
        t = _each(t_B, x)
        target = {"eps": noise, "v": at(alphas)(t) * noise - at(sigmas)(t) * x, "x": x}[kind]
        return losses.squared_error(out, target)

    # The normal's distribution function makes uniform numbers of normal ones; the image, step 0,
    # is never drawn, as nothing is to be learned there.
    uniform = lambda normal_B: jax.scipy.stats.norm.cdf(mean + std * normal_B)
    return Path(
        alpha=at(alphas),
        sigma=at(sigmas),
        kinds=("eps", "v", "x"),
        draw=lambda normal_B: jnp.clip(jnp.ceil(uniform(normal_B) * steps), 1, steps) / steps,
        error=error,
        velocity=noise_of,
        clock=at(clocks),
        scaled=True,
        latest=latest,
    )


def cosine(steps: int = STEPS):
    """β_T whose α² falls as a squared cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17)."""
    # The paper's offset of 0.008 keeps the first β from being too small.
    kept = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)  # the paper's limit, which keeps α above 0


SCHEDULES = {  # name -> () -> β_T
    # Ho et al. 2020, section 4
    "linear": lambda: np.linspace(1e-4, 0.02, STEPS),
    # Stable Diffusion's (arXiv:2112.10752): the square roots are even
    "scaled_linear": lambda: np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2,
    "cosine": cosine,
}
LATEST = {"cosine": 0.99}  # where α is .016; at 1 a first step would multiply errors by 20,000
NAMES = ("straight", *SCHEDULES)


def _each(t, x):
    """A time for each example, so that it multiplies x; a scalar stays one."""
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if jnp.ndim(t) else t
