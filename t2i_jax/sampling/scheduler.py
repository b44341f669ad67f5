"""What a `scheduler_config.json` of diffusers says, as arrays: the path, and a solver's numbers.

The numbers are those of the class that the file names, step for step. All are made in float64 on
the host; a program gets them as arrays.

S calls of the network · T steps of training
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, fields
from t2i_jax.sampling import path as paths

CONFIG = "scheduler_config.json"
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
CLASSES = {  # class -> the solver it is
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
    "DDPMScheduler": "ddpm",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}
FLOW = ("euler", "heun")  # solvers of straight lines
SPACING = {  # solver -> its class's timestep_spacing, where the config says none
    **dict.fromkeys(("ddim", "pndm", "lcm", "ddpm"), "leading"),
    **dict.fromkeys(("euler", "euler_ancestral", "heun", "dpmpp_2m"), "linspace"),
}
OWN = {  # solver -> the fields of its class, beside those that all have
    "ddim": "clip_sample thresholding set_alpha_to_one rescale_betas_zero_snr",
    "pndm": "skip_prk_steps set_alpha_to_one",
    "euler": "interpolation_type timestep_type sigma_min sigma_max final_sigmas_type "
    "use_karras_sigmas use_exponential_sigmas use_beta_sigmas rescale_betas_zero_snr",
    "euler_ancestral": "rescale_betas_zero_snr",
    "heun": "clip_sample use_karras_sigmas use_exponential_sigmas use_beta_sigmas",
    "dpmpp_2m": "thresholding algorithm_type solver_type solver_order lower_order_final "
    "euler_at_final lambda_min_clipped variance_type final_sigmas_type use_karras_sigmas "
    "use_exponential_sigmas use_beta_sigmas use_lu_lambdas use_flow_sigmas rescale_betas_zero_snr",
    "lcm": "clip_sample thresholding original_inference_steps timestep_scaling "
    "rescale_betas_zero_snr",
    "ddpm": "clip_sample thresholding variance_type rescale_betas_zero_snr",
}
COMMON = (
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "timestep_spacing steps_offset"
)
REFUSED = {  # field -> the values that change no number
    "thresholding": (False,),
    "clip_sample": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "solver_order": (1, 2),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "time_shift_type": ("exponential",),
    "variance_type": ("fixed_small",),
    "lambda_min_clipped": (-math.inf,),
    "sigma_min": (),
    "sigma_max": (),
    "skip_prk_steps": (True,),
}
DEFAULTS = {  # of classes; another solver than the folder's takes what REFUSED allows
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"skip_prk_steps": False},
}
_BETA, _ABOVE = (fields.above(0), fields.below(1)), Annotated[float, fields.above(0)]
_FLAGS = (
    *("set_alpha_to_one", "rescale_betas_zero_snr", "use_karras_sigmas", "euler_at_final"),
    *("lower_order_final", "use_dynamic_shifting"),
)
# Tokens of a picture, between which the shift of a flow grows, and their defaults.
LENGTHS = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
FIELDS = {  # field -> its type and bounds
    "num_train_timesteps": Annotated[int, fields.count(100_000)],
    **dict.fromkeys(("beta_start", "beta_end"), Annotated[float, *_BETA]),
    "trained_betas": Annotated[tuple[float, ...], *_BETA],
    **dict.fromkeys(("prediction_type", "beta_schedule"), str),
    "steps_offset": Annotated[int, fields.at_least(0)],
    "original_inference_steps": fields.Size,
    **dict.fromkeys(("timestep_scaling", "shift"), _ABOVE),
    **dict.fromkeys(("base_shift", "max_shift"), float),
    **dict.fromkeys(LENGTHS, fields.Size),
    "shift_terminal": Annotated[float, fields.at_least(0), fields.below(1)],
    **dict.fromkeys(_FLAGS, bool),
}
KARRAS = 7.0  # ρ of the grid (Karras et al. 2022, eq. 5)
SMALLEST = 2.0**-24  # α² at a last step of no signal, as Euler's class has it
LCM_DATA = 0.5  # σ_data of LCM's boundary scaling


class Grid(NamedTuple):
    """A solver's numbers. Of a call of the network: `time_S`, what it is told; `alpha_S` and
    `sigma_S`, α and σ of the state before; the others are the solver's, see there.

    start: what unit noise is multiplied by at first.
    kind: what outputs mean, of `prediction.parts`.
    draws, repeats: whether any step takes new noise, or begins where the one before did.
    """

    time_S: Any
    alpha_S: Any
    sigma_S: Any
    kept_S: Any
    x_share_S: Any
    noise_share_S: Any
    fresh_S: Any
    again_S: Any
    mix_S: Any
    start: float = 1.0
    kind: str = "eps"
    draws: bool = False
    repeats: bool = False

    def arrays(self):
        """The numbers of all calls, for a scan: what is no number is left out."""
        number = lambda name: jnp.asarray(getattr(self, name)) if name.endswith("_S") else None
        return Grid(*map(number, self._fields))

    def at(self, n) -> "Grid":
        """The numbers of call n, which may be traced."""
        return jax.tree.map(lambda x_S: x_S[n], self.arrays())

    def after(self, begin: int) -> "Grid":
        """The grid without its first `begin` calls, for what begins with less noise."""
        if not begin:
            return self
        rest = {k: v[begin:] for k, v in self._asdict().items() if k.endswith("_S")}
        # A slice is a view, and the grid itself must not change. Heun's single column keeps its
        # value.
        mix_S = rest["mix_S"].copy()
        mix_S[:1] = mix_S[:1].sum(1, keepdims=True) * np.eye(1, mix_S.shape[1])  # none is before
        return self._replace(**rest | {"mix_S": mix_S}, start=1.0)


class Scheduler(NamedTuple):
    """What a scheduler's config says.

    config: its values, without those that say nothing.
    name: its solver, of `solvers.SOLVERS`.
    path: of training.
    kind: what the network puts out, one of the path's kinds.
    """

    config: Mapping
    name: str
    path: paths.Path
    kind: str

    @property
    def flow(self) -> bool:
        """Whether the path is the straight line."""
        return self.config["_class_name"].startswith("FlowMatch")

    @property
    def steps(self) -> int:
        """T."""
        return self.config.get("num_train_timesteps", paths.STEPS)

    def time(self, t):
        """What the network is told at a time of the path."""
        # Time i/T is step i, and networks count steps from 0.
        return t * self.steps if self.flow else t * self.steps - 1

    def grid(
        self,
        steps: int,
        *,
        tokens: int = 0,
        solver: str = "",
        even: bool = False,
        strength: float = 1.0,
    ) -> Grid:
        """The numbers of so many steps.

        Args:
          tokens: of a picture, which a scheduler may shift its noise by.
          solver: another than the config's. It reads the fields that its class has, and for the
            others takes that class's defaults. But nothing is clipped, and "pndm" is PLMS.
          even: the noise levels of a flow begin as 1, 1 − 1/steps, …, as FLUX.1 wants.
          strength: share of the steps that are done, the last ones. Their grid may be empty.
        Raises:
          ConfigError: a solver of other paths, more steps than there are, or a network that says
            the noise where nothing else is.
        """
        solver = solver or self.name
        if self.flow:
            errors.check_known("sampler of this model", solver, FLOW, where="--sampler")
        if steps > self.steps:
            raise errors.ConfigError(
                f"{steps} steps of {self.steps}", where="--steps", fix=f"use {self.steps} or fewer"
            )
        if self.flow:
            # "v" of the straight path is the velocity, which solvers call "flow".
            sigma_S = _flow_sigmas(self.config, self.steps, steps, tokens, even)
            grid = _explicit(solver, sigma_S[:-1] * self.steps, 1 - sigma_S, sigma_S, "flow")
            # Diffusers rounds down what is left out for flows, and what is done for the others.
            return grid.after(int(steps - steps * strength))
        config = _own(self.config, solver)
        _check(config)
        kept_T = _kept(config, solver)
        begin = steps - int(steps * strength)
        if solver == "pndm":
            grid = _pndm(config, solver, kept_T, steps, self.kind, begin)
        else:
            made = {"dpmpp_2m": _dpm, "lcm": _lcm}.get(solver, _discrete)
            grid = made(config, solver, kept_T, steps, self.kind).after(begin)
        if self.kind == "eps" and not grid.alpha_S.all():
            raise errors.ConfigError(
                "prediction_type epsilon with rescale_betas_zero_snr: where nothing is left of the "
                "image, the noise says nothing of it",
                where=CONFIG,
                fix="use --sampler=euler, or timestep_spacing leading",
            )
        return grid


def from_config(config: Mapping) -> Scheduler:
    """The scheduler that a config describes.

    Raises:
      ConfigError: a class, or a value of a field, that is not implemented or has no sense.
    """
    config = _checked({key: value for key, value in config.items() if value is not None})
    kind = str(config.get("_class_name"))
    errors.check_known("scheduler", kind, CLASSES, where=CONFIG)
    name = CLASSES[kind]
    config = DEFAULTS.get(kind, {}) | config
    flow = kind.startswith("FlowMatch")
    _check(config if flow else _own(config, name))
    if flow:
        if config.get("use_karras_sigmas"):
            raise errors.ConfigError(
                "use_karras_sigmas True is not implemented for flows",
                where=CONFIG,
                fix="set it to False",
            )
        return Scheduler(config, name, paths.straight(), "v")
    predicted = config.get("prediction_type", "epsilon")
    errors.check_known("prediction_type", predicted, KINDS, where=CONFIG)
    return Scheduler(config, name, paths.discrete(_betas(config)), KINDS[predicted])


def min_snr(path: paths.Path, kind: str, t_B, gamma: float):
    """Weights of losses by signal to noise (Hang et al. 2023, arXiv:2303.09556, 3.4).   -> B

    min(SNR, γ) of an image. The image's error is σ times that of v, also of a straight line's
    velocity, and σ/α times that of the noise: so the weights are divided by 1/σ² and by SNR.
    """
    noise_B = jnp.square(path.sigma(t_B))
    snr_B = jnp.square(path.alpha(t_B)) / jnp.maximum(noise_B, 1e-12)
    if kind == "eps":
        return jnp.minimum(1.0, gamma / jnp.maximum(snr_B, 1e-12))
    return jnp.minimum(snr_B, gamma) * (noise_B if kind == "v" else 1.0)


def _checked(config) -> dict:
    """The config, each field in its type."""
    config = {
        field: fields.checked(FIELDS.get(field, Any), field, value, where=CONFIG)
        for field, value in config.items()
    }
    steps = config.get("num_train_timesteps", paths.STEPS)
    for field, most in (("steps_offset", steps - 1), ("original_inference_steps", steps)):
        within = Annotated[int, fields.between(0, most)]
        fields.checked(within, field, config.get(field, 0), where=CONFIG)
    if len(config.get("trained_betas", range(steps))) != steps:
        raise errors.ConfigError(
            f"trained_betas is of {len(config['trained_betas'])} steps, not {steps}",
            where=CONFIG,
            fix="write as many as num_train_timesteps",
        )
    least, most = (config.get(field, default) for field, default in LENGTHS.items())
    if least >= most:
        raise errors.ConfigError(
            f"base_image_seq_len is {least}, and max_image_seq_len {most}",
            where=CONFIG,
            fix="write the smaller number of tokens as base_image_seq_len",
        )
    return config


def _own(config, solver: str) -> dict:
    """The fields of a config that a solver's class has."""
    return {key: config[key] for key in f"{COMMON} {OWN[solver]}".split() if key in config}


def _check(config) -> None:
    for field, values in REFUSED.items():
        if field in config and config[field] not in values:
            fix = f"set it to {json.dumps(values[0])}" if values else "leave it out"
            raise errors.ConfigError(
                f"{field} {config[field]!r} is not implemented", where=CONFIG, fix=fix
            )


def _betas(config):
    """β_T, perhaps rescaled so that nothing is left of the image at the last step (Lin et al. 2023,
    arXiv:2305.08891, alg. 1).
    """
    if "trained_betas" in config:
        beta_T = np.asarray(config["trained_betas"], np.float64)
    else:
        steps = config.get("num_train_timesteps", paths.STEPS)
        first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        schedule = config.get("beta_schedule", "linear")
        made = {
            "linear": lambda: np.linspace(first, last, steps),
            "scaled_linear": lambda: np.linspace(first**0.5, last**0.5, steps) ** 2,
            "squaredcos_cap_v2": lambda: paths.cosine(steps),
        }
        errors.check_known("beta_schedule", schedule, made, where=CONFIG)
        # The classes compute in float32; products of a thousand factors remember it.
        beta_T = np.asarray(made[schedule](), np.float32).astype(np.float64)
    if config.get("rescale_betas_zero_snr"):
        root_T = np.sqrt(np.cumprod(1 - beta_T))
        root_T = (root_T - root_T[-1]) * root_T[0] / (root_T[0] - root_T[-1])
        kept_T = root_T**2
        beta_T = 1 - kept_T / np.concatenate([[1.0], kept_T[:-1]])
    return beta_T


def _kept(config, solver: str):
    """α² of each step."""
    kept_T = np.cumprod(1 - _betas(config))
    # These classes compute σ/α, which would be infinite.
    if config.get("rescale_betas_zero_snr") and solver in ("euler", "euler_ancestral", "dpmpp_2m"):
        kept_T[-1] = SMALLEST
    return kept_T


def _times(config, solver: str, steps: int):
    """The times that the network is told, from noise to data, by timestep_spacing (Lin et al. 2023,
    table 2).
    """
    total = config.get("num_train_timesteps", paths.STEPS)
    spacing = config.get("timestep_spacing", SPACING[solver])
    more = solver == "dpmpp_2m"  # its class makes one more time, and leaves the last out
    if spacing == "linspace":
        time_S = np.linspace(0, total - 1, steps + more)[::-1]
        # The classes that work in σ/α tell fractions of steps, the others whole steps.
        time_S = time_S if solver in ("euler", "euler_ancestral", "heun") else time_S.round()
    elif spacing == "leading":
        count, offset = steps + more, config.get("steps_offset", 0)
        begins = lambda n: (n - 1) * (total // n) + offset
        if begins(count) >= total:
            most = max(n for n in range(1, count) if begins(n) < total) - more
            raise errors.ConfigError(
                f"{steps} steps with steps_offset {offset} begin beyond the last of {total}",
                where="--steps",
                fix=f"use {most} or fewer",
            )
        time_S = np.linspace(begins(count), offset, count)
    elif spacing == "trailing":
        time_S = np.round(np.arange(total, 0, -total / steps)) - 1
    else:
        names = ("linspace", "leading", "trailing")
        raise errors.unknown("timestep_spacing", spacing, names, where=CONFIG)
    # Rounding may also make arange one entry longer than it should be.
    return time_S[:steps]


def _levels(config, solver, kept_T, steps: int):
    """Times; at them and at the end σ/α, α and σ."""
    ratio_T = np.sqrt((1 - kept_T) / kept_T)
    time_S = _times(config, solver, steps)
    level_S = np.interp(time_S, np.arange(len(ratio_T)), ratio_T)
    if config.get("use_karras_sigmas"):
        high, low = (level_S[0], level_S[-1]) if solver != "dpmpp_2m" else (ratio_T[-1], ratio_T[0])
        ramp = np.linspace(0, 1, steps)
        level_S = (
            high ** (1 / KARRAS) + ramp * (low ** (1 / KARRAS) - high ** (1 / KARRAS))
        ) ** KARRAS
        time_S = np.interp(np.log(level_S), np.log(ratio_T), np.arange(len(ratio_T)))
        time_S = time_S.round() if solver == "dpmpp_2m" else time_S
    final = config.get("final_sigmas_type", "zero")
    errors.check_known("final_sigmas_type", final, ("zero", "sigma_min"), where=CONFIG)
    level_S = np.append(level_S, ratio_T[0] if final == "sigma_min" else 0.0)
    alpha_S = 1 / np.sqrt(level_S**2 + 1)
    return time_S, level_S, alpha_S, level_S * alpha_S


def _grid(kind: str, time_S, alpha_S, sigma_S, **more) -> Grid:
    """A grid of one number a call; what is not given is 0."""
    n = len(time_S)
    numbers = dict(time_S=time_S, alpha_S=alpha_S, sigma_S=sigma_S)
    numbers |= {k: more.pop(k, np.zeros(n)) for k in ("kept_S", "x_share_S", "noise_share_S")}
    numbers["fresh_S"] = fresh_S = more.pop("fresh_S", np.zeros(n))
    numbers["mix_S"] = more.pop("mix_S", np.ones((n, 1)))
    arrays = {k: np.asarray(v, np.float32) for k, v in numbers.items()}
    again_S = np.asarray(more.pop("again_S", np.zeros(n)), bool)
    return Grid(**arrays, again_S=again_S, kind=kind, draws=bool(fresh_S.any()), **more)


def _explicit(solver, time_S, alpha_S, sigma_S, kind, start=1.0) -> Grid:
    """Euler's and Heun's steps between α and σ, which have one entry more than times."""
    options = dict(x_share_S=alpha_S[1:], noise_share_S=sigma_S[1:], start=start)
    if solver == "heun":
        # The last step has no second call, so its number is never read.
        later_S = np.append(time_S[1:], 0.0)
        again_S = np.arange(len(time_S)) < len(time_S) - 1
        if kind == "flow":  # the state moves by its own velocity, not by noise over α
            kept_S = sigma_S[1:] - sigma_S[:-1]
        else:
            kept_S = alpha_S[1:] * (sigma_S[1:] / alpha_S[1:] - sigma_S[:-1] / alpha_S[:-1])
        options |= dict(mix_S=later_S[:, None], again_S=again_S, kept_S=kept_S)
    return _grid(kind, time_S, alpha_S[:-1], sigma_S[:-1], **options)


def _discrete(config, solver, kept_T, steps, kind) -> Grid:
    if solver in ("ddim", "ddpm"):
        return _by_steps(config, solver, kept_T, steps, kind)
    time_S, level_S, alpha_S, sigma_S = _levels(config, solver, kept_T, steps)
    # The classes begin with noise of the highest level, or with what an image would add to it.
    leading = config.get("timestep_spacing", SPACING[solver]) == "leading"
    start = 1.0 if leading else sigma_S[0]
    if solver != "euler_ancestral":
        return _explicit(solver, time_S, alpha_S, sigma_S, kind, start)
    now_S, next_S = level_S[:-1], level_S[1:]
    up_S = np.sqrt(next_S**2 * (now_S**2 - next_S**2) / now_S**2)
    down_S = np.sqrt(next_S**2 - up_S**2)
    ends = dict(x_share_S=alpha_S[1:], noise_share_S=alpha_S[1:] * down_S)
    ends |= dict(fresh_S=alpha_S[1:] * up_S, start=start)
    return _grid(kind, time_S, alpha_S[:-1], sigma_S[:-1], **ends)


def _ends(config, kept_T, time_S, steps, solver):
    """α² at each time, and where its step leads: `T // steps` earlier, beyond the first to 1 or to
    the first's.
    """
    before_S = time_S.astype(int) - len(kept_T) // steps
    last = 1.0 if config.get("set_alpha_to_one", solver != "pndm") else kept_T[0]
    return kept_T[time_S.astype(int)], np.where(before_S >= 0, kept_T[before_S.clip(0)], last)


def _by_steps(config, solver, kept_T, steps, kind) -> Grid:
    """DDIM, and DDPM's ancestral steps with the smaller of its variances."""
    time_S = _times(config, solver, steps)
    now_S, next_S = _ends(config, kept_T, time_S, steps, solver)
    if solver == "ddpm":  # its class goes to the next of the times
        next_S = np.append(now_S[1:], 1.0)
    numbers = (time_S, np.sqrt(now_S), np.sqrt(1 - now_S))
    if solver == "ddim":
        ends = dict(x_share_S=np.sqrt(next_S), noise_share_S=np.sqrt(1 - next_S))
        return _grid(kind, *numbers, **ends)
    beta_S = 1 - now_S / next_S
    # The floor of diffusers' class, which adds no noise at time 0.
    variance_S = np.maximum((1 - next_S) / (1 - now_S) * beta_S, 1e-20)
    return _grid(
        kind,
        *numbers,
        x_share_S=np.sqrt(next_S) * beta_S / (1 - now_S),
        kept_S=np.sqrt(1 - beta_S) * (1 - next_S) / (1 - now_S),
        fresh_S=np.where(time_S > 0, np.sqrt(variance_S), 0.0),
    )


def _pndm(config, solver, kept_T, steps, kind, begin: int) -> Grid:
    """PLMS: the outputs of the last four times, mixed as Adams and Bashforth do. The second call
    does the first step again with the mean of both outputs.

    The second time is in the list of calls twice. Without its first `begin` calls the list has it
    once, and diffusers' class goes on all the same: its third call is told a step too little noise.
    """
    time_S = _times(config, solver, steps)
    twice = [0, 1, *range(1, steps)] if steps > 1 else [0]
    # The list has one entry more than steps, so `begin` alone would leave one.
    time_S = time_S[twice[begin:] if begin < steps else []]
    calls = np.arange(len(time_S))
    # The second call is told where the first one led to, and goes there from where that began.
    from_S = time_S + np.where(calls == 1, len(kept_T) // steps, 0)
    now_S, next_S = _ends(config, kept_T, from_S, steps, solver)
    adams = np.array([[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0]])
    adams = [*adams, np.array([23, -16, 5, 0]) / 12, np.array([55, -59, 37, -9]) / 24]
    return _grid(
        kind,
        time_S,
        *(np.sqrt(now_S), np.sqrt(1 - now_S)),
        x_share_S=np.sqrt(next_S),
        noise_share_S=np.sqrt(1 - next_S),
        mix_S=np.array([adams[min(n, 4)] for n in calls]).reshape(-1, 4),
        again_S=calls == 1,
        repeats=len(calls) > 1,
    )


def _dpm(config, solver, kept_T, steps, kind) -> Grid:
    time_S, level_S, alpha_S, sigma_S = _levels(config, solver, kept_T, steps)
    # Where the last level is 0, λ is infinite, and the step ends on x̂ itself.
    with np.errstate(divide="ignore"):
        lambda_S = -np.log(level_S)
    kept_S = sigma_S[1:] / sigma_S[:-1]
    width_S = lambda_S[1:] - lambda_S[:-1]
    x_S = -alpha_S[1:] * np.expm1(-width_S)  # the share of x̂ in a step of first order
    mix_S = np.stack([x_S, np.zeros(steps)], 1)
    # Towards a level of 0 the width is infinite, which only a first order step can take.
    ends_low = config.get("euler_at_final") or config.get("final_sigmas_type", "zero") == "zero"
    # The class reads this field only below 15 steps.
    ends_low = ends_low or (config.get("lower_order_final", True) and steps < 15)
    second = range(1, steps - bool(ends_low)) if config.get("solver_order", 2) == 2 else ()
    for n in second:
        # The slope of x̂ over λ is that between its last two values.
        if not width_S[n - 1]:
            raise errors.ConfigError(
                f"{steps} steps, two of them at one level of noise",
                where="--steps",
                fix="use fewer, or --sampler=euler",
            )
        slope = 0.5 * x_S[n] * width_S[n] / width_S[n - 1]
        mix_S[n] = x_S[n] + slope, -slope
    return _grid(kind, time_S, alpha_S[:-1], sigma_S[:-1], kept_S=kept_S, mix_S=mix_S)


def _lcm(config, solver, kept_T, steps, kind) -> Grid:
    """A consistency model's jumps to x̂, each but the last with new noise (arXiv:2310.04378)."""
    origin = config.get("original_inference_steps", 50)
    time_N = (np.arange(1, origin + 1) * (len(kept_T) // origin) - 1)[::-1]
    if steps > len(time_N):
        raise errors.ConfigError(
            f"{steps} steps of {origin}", where="--steps", fix=f"use {origin} or fewer"
        )
    time_S = time_N[np.floor(np.linspace(0, len(time_N), steps, endpoint=False)).astype(int)]
    now_S, next_S = kept_T[time_S], np.append(kept_T[time_S[1:]], 1.0)
    # The network's x̂ and the state are mixed so that the state stays at time 0 (section 3).
    scaled_S = time_S * config.get("timestep_scaling", 10.0)
    state_S = LCM_DATA**2 / (scaled_S**2 + LCM_DATA**2)
    x_S = scaled_S / np.sqrt(scaled_S**2 + LCM_DATA**2)
    return _grid(
        kind,
        time_S,
        *(np.sqrt(now_S), np.sqrt(1 - now_S)),
        kept_S=np.sqrt(next_S) * state_S,
        x_share_S=np.sqrt(next_S) * x_S,
        fresh_S=np.sqrt(1 - next_S),
    )


def _flow_sigmas(config, total: int, steps: int, tokens: int, even: bool):
    """The noise levels of a flow's steps, and 0 (arXiv:2403.03206, section 5.3.2)."""
    shift = config.get("shift", 1.0)
    dynamic = config.get("use_dynamic_shifting", False)
    moved = lambda s: shift * s / (1 + (shift - 1) * s)
    if even:
        sigma_S = np.linspace(1.0, 1 / steps, steps)
    else:
        ends = np.array([1.0, 1 / total])
        # Without dynamic shifting the class moves the ends, and then the grid between them once
        # more.
        first, last = ends if dynamic else moved(ends)
        sigma_S = np.linspace(first, last, steps)
    if dynamic:  # by the number of a picture's tokens
        low, high = (config.get(field, default) for field, default in LENGTHS.items())
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = least + (most - least) * (tokens - low) / (high - low)
        sigma_S = math.exp(mu) / (math.exp(mu) + (1 / sigma_S - 1))
    else:
        sigma_S = moved(sigma_S)
    end = config.get("shift_terminal")
    if end and steps > 1:  # one step begins with noise alone, and is left there
        # The shares of the image are stretched so that the last level is `end`; the first stays 1.
        rest_S = 1 - sigma_S
        sigma_S = 1 - rest_S * (1 - end) / rest_S[-1]
    return np.append(sigma_S, 0.0)
