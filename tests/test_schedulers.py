"""What a scheduler_config.json says, step for step as diffusers does it: whole trajectories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import errors
from t2i_jax.sampling import scheduler, solvers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPE = (2, 3, 5, 4)  # BHWC
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
V = dict(prediction_type="v_prediction")
ZERO = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", **V)
DDIM = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
CASES = [
    ("DDIMScheduler", BETAS | DDIM, 7),
    ("DDIMScheduler", BETAS | V | dict(clip_sample=False, timestep_spacing="trailing"), 10),
    ("DDIMScheduler", BETAS | ZERO | dict(clip_sample=False), 6),
    ("DDIMScheduler", dict(clip_sample=False, prediction_type="sample"), 5),
    ("DDIMScheduler", dict(beta_schedule="squaredcos_cap_v2", clip_sample=False), 5),
    ("PNDMScheduler", BETAS | dict(skip_prk_steps=True, steps_offset=1), 9),
    ("PNDMScheduler", BETAS | V | dict(skip_prk_steps=True, set_alpha_to_one=True), 4),
    ("PNDMScheduler", BETAS | dict(skip_prk_steps=True, timestep_spacing="trailing"), 1),
    ("EulerDiscreteScheduler", BETAS | dict(timestep_spacing="leading", steps_offset=1), 7),
    ("EulerDiscreteScheduler", BETAS | V, 6),
    ("EulerDiscreteScheduler", BETAS | dict(use_karras_sigmas=True), 6),
    ("EulerDiscreteScheduler", BETAS | ZERO, 5),
    ("EulerDiscreteScheduler", BETAS | dict(final_sigmas_type="sigma_min"), 5),
    ("EulerAncestralDiscreteScheduler", BETAS, 6),
    ("EulerAncestralDiscreteScheduler", BETAS | V | dict(timestep_spacing="trailing"), 6),
    ("HeunDiscreteScheduler", BETAS, 6),
    ("HeunDiscreteScheduler", BETAS | V | dict(use_karras_sigmas=True), 5),
    ("DPMSolverMultistepScheduler", dict(beta_start=1e-4, beta_end=0.02), 20),
    ("DPMSolverMultistepScheduler", BETAS | dict(use_karras_sigmas=True), 6),
    ("DPMSolverMultistepScheduler", BETAS | V | dict(timestep_spacing="trailing"), 8),
    ("DPMSolverMultistepScheduler", BETAS | dict(timestep_spacing="leading", steps_offset=1), 8),
    ("DPMSolverMultistepScheduler", BETAS | dict(final_sigmas_type="sigma_min"), 18),
    ("DPMSolverMultistepScheduler", BETAS | dict(solver_order=1, euler_at_final=True), 5),
    ("LCMScheduler", BETAS, 4),
    ("LCMScheduler", BETAS | V, 1),
    ("DDPMScheduler", BETAS | dict(clip_sample=False), 6),
    (FLOW, dict(shift=3.0), 7),
    (FLOW, {}, 3),
    (FLOW, DYNAMIC, 6),
    (FLOW, DYNAMIC | dict(shift_terminal=0.02), 6),
    ("FlowMatchHeunDiscreteScheduler", dict(shift=2.0), 5),
]
WEIGHT = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32) / 2
TOKENS = 300


def network(library, z, time):
    """A toy that bends and mixes channels, differently at each time."""
    return 0.9 * library.tanh(z @ WEIGHT_OF[library] + time / 700.0) + 0.1 * z


WEIGHT_OF = {torch: torch.from_numpy(WEIGHT), jnp: jnp.asarray(WEIGHT)}


def noise(n):
    return np.random.default_rng(100 + n).standard_normal(SHAPE).astype(np.float32)


def theirs(name, config, steps, monkeypatch):
    """The last state of diffusers' own loop, which begins with noise(0)."""
    made = getattr(diffusers, name)(**config)
    drawn = iter(range(1, 100))
    fresh = lambda *args, **options: torch.from_numpy(noise(next(drawn)))
    monkeypatch.setattr(f"{type(made).__module__}.randn_tensor", fresh, raising=False)
    if config.get("use_dynamic_shifting"):
        slope = (config["max_shift"] - config["base_shift"]) / (4096 - 256)
        made.set_timesteps(steps, mu=config["base_shift"] + slope * (TOKENS - 256))
    else:
        made.set_timesteps(steps)
    z = torch.from_numpy(noise(0)) * getattr(made, "init_noise_sigma", 1.0)
    scale = getattr(made, "scale_model_input", lambda z, t: z)
    for time in made.timesteps:
        out = network(torch, scale(z, time), time)
        z = made.step(out, time, z, return_dict=False)[0]
    return z.numpy(), json.loads(made.to_json_string())


@pytest.mark.parametrize(("name", "config", "steps"), CASES)
def test_a_trajectory_is_that_of_diffusers(name, config, steps, monkeypatch):
    want, saved = theirs(name, config, steps, monkeypatch)
    ours = scheduler.from_config(saved)
    grid = ours.grid(steps, tokens=TOKENS)
    fresh = jnp.stack([noise(n + 1) for n in range(steps)])
    output = lambda z, time: network(jnp, z, time)
    solve = jax.jit(lambda z: solvers.SOLVERS[ours.name](output, z, grid, lambda n: fresh[n]))
    got = solve(grid.start * noise(0))
    if config.get("final_sigmas_type") == "sigma_min" and name.startswith("Euler"):
        got = got * np.sqrt(
            1
            + scheduler._levels(ours.config, "euler", scheduler._kept(ours.config, "euler"), steps)[
                1
            ][-1]
            ** 2
        )  # their state is z / α
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_another_solver_takes_the_folders_betas_as_diffusers_does(monkeypatch):
    saved = json.loads(diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True).to_json_string())
    other = diffusers.EulerDiscreteScheduler.from_config(saved)
    monkeypatch.setattr(diffusers, "Other", lambda: other, raising=False)
    want, _ = theirs("Other", {}, 6, monkeypatch)
    grid = scheduler.from_config(saved).grid(6, solver="euler")
    got = solvers.SOLVERS["euler"](
        lambda z, time: network(jnp, z, time), grid.start * noise(0), grid, None
    )
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("UniPCMultistepScheduler", {}, "unknown scheduler"),
        ("DDIMScheduler", {}, "clip_sample True"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("EulerDiscreteScheduler", {"prediction_type": "flow"}, "prediction_type"),
        ("EulerDiscreteScheduler", {"beta_schedule": "sine"}, "beta_schedule"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        (FLOW, {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_what_is_not_implemented_is_refused(name, change, message):
    with pytest.raises(errors.ConfigError, match=message):
        scheduler.from_config({"_class_name": name} | change)


@pytest.mark.parametrize("kind", ["eps", "v", "x"])
def test_weights_by_signal_to_noise(kind):
    """Written out: min(SNR, γ) over what each prediction's error is multiplied by."""
    path = scheduler.from_config({"_class_name": "EulerDiscreteScheduler"} | BETAS).path
    time = jnp.array([0.1, 0.5, 1.0])
    snr = np.square(path.alpha(time) / path.sigma(time))
    divided = {"eps": snr, "v": snr + 1, "x": 1}[kind]
    want = np.minimum(snr, 5.0) / divided
    np.testing.assert_allclose(scheduler.min_snr(path, kind, time, 5.0), want, rtol=1e-5)
