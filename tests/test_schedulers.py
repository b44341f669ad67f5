"""What a scheduler_config.json says, step for step as diffusers does it: whole trajectories."""

import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import errors
from t2i_jax.sampling import prediction, scheduler, solvers

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
    ("DDIMScheduler", BETAS | DDIM, 3),
    ("DDIMScheduler", BETAS | V | dict(clip_sample=False, timestep_spacing="trailing"), 4),
    ("DDIMScheduler", BETAS | ZERO | dict(clip_sample=False), 3),
    ("DDIMScheduler", dict(clip_sample=False, prediction_type="sample"), 5),
    ("DDIMScheduler", dict(beta_schedule="squaredcos_cap_v2", clip_sample=False), 5),
    ("PNDMScheduler", BETAS | dict(skip_prk_steps=True, steps_offset=1), 6),
    ("PNDMScheduler", BETAS | V | dict(skip_prk_steps=True, set_alpha_to_one=True), 4),
    ("PNDMScheduler", BETAS | dict(skip_prk_steps=True, timestep_spacing="trailing"), 1),
    ("EulerDiscreteScheduler", BETAS | dict(timestep_spacing="leading", steps_offset=1), 3),
    ("EulerDiscreteScheduler", BETAS | V, 6),
    ("EulerDiscreteScheduler", BETAS | dict(use_karras_sigmas=True), 6),
    ("EulerDiscreteScheduler", BETAS | ZERO, 5),
    ("EulerDiscreteScheduler", BETAS | dict(final_sigmas_type="sigma_min"), 5),
    ("EulerAncestralDiscreteScheduler", BETAS, 6),
    ("EulerAncestralDiscreteScheduler", BETAS | V | dict(timestep_spacing="trailing"), 6),
    ("HeunDiscreteScheduler", BETAS, 6),
    ("HeunDiscreteScheduler", BETAS | V | dict(use_karras_sigmas=True), 5),
    ("DPMSolverMultistepScheduler", dict(beta_start=1e-4, beta_end=0.02), 15),
    ("DPMSolverMultistepScheduler", BETAS | dict(use_karras_sigmas=True), 6),
    ("DPMSolverMultistepScheduler", BETAS | V | dict(timestep_spacing="trailing"), 5),
    ("DPMSolverMultistepScheduler", BETAS | dict(timestep_spacing="leading", steps_offset=1), 5),
    ("DPMSolverMultistepScheduler", BETAS | dict(final_sigmas_type="sigma_min"), 15),
    ("DPMSolverMultistepScheduler", BETAS | dict(solver_order=1, euler_at_final=True), 5),
    ("LCMScheduler", BETAS, 4),
    ("LCMScheduler", BETAS | V, 1),
    ("DDPMScheduler", BETAS | dict(clip_sample=False), 6),
    ("DDPMScheduler", BETAS | dict(clip_sample=False, timestep_spacing="trailing"), 6),
    ("DDPMScheduler", BETAS | dict(clip_sample=False, timestep_spacing="linspace"), 6),
    (FLOW, dict(shift=3.0), 7),
    (FLOW, {}, 3),
    (FLOW, DYNAMIC, 6),
    (FLOW, DYNAMIC | dict(shift_terminal=0.02), 6),
    ("FlowMatchHeunDiscreteScheduler", dict(shift=2.0), 5),
]
WEIGHT = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32) / 2
TOKENS = 300
START = np.random.default_rng(4).normal(size=SHAPE).astype(np.float32)
PLMS, UNCLIPPED = dict(skip_prk_steps=True), dict(clip_sample=False)
FOLDERS = {  # fields of each class that others lack, or read otherwise
    "DDIMScheduler": UNCLIPPED | ZERO | dict(set_alpha_to_one=False),
    "PNDMScheduler": PLMS | dict(set_alpha_to_one=False, steps_offset=1),
    "EulerDiscreteScheduler": dict(use_karras_sigmas=True, timestep_spacing="leading"),
    "EulerAncestralDiscreteScheduler": V | dict(timestep_spacing="trailing"),
    "HeunDiscreteScheduler": dict(use_karras_sigmas=True),
    "DPMSolverMultistepScheduler": dict(use_karras_sigmas=True, final_sigmas_type="sigma_min"),
    "LCMScheduler": dict(original_inference_steps=20),
    "DDPMScheduler": UNCLIPPED | dict(timestep_spacing="linspace"),
}


def network(library, z, time):
    """A toy that bends and mixes channels, differently at each time."""
    return 0.9 * library.tanh(z @ WEIGHT_OF[library] + time / 700.0) + 0.1 * z


WEIGHT_OF = {torch: torch.from_numpy(WEIGHT), jnp: jnp.asarray(WEIGHT)}


def noise(n):
    return np.random.default_rng(100 + n).standard_normal(SHAPE).astype(np.float32)


def theirs(made, steps, monkeypatch, begin=0):
    """The last state of the loop of a scheduler of diffusers, which begins with noise(0), or with
    noise(0) added to START as its image-to-image does.
    """
    drawn = iter(range(begin + 1, 100))
    fresh = lambda *args, **options: torch.from_numpy(noise(next(drawn)))
    monkeypatch.setattr(f"{type(made).__module__}.randn_tensor", fresh, raising=False)
    if made.config.get("use_dynamic_shifting"):
        slope = (made.config["max_shift"] - made.config["base_shift"]) / (4096 - 256)
        made.set_timesteps(steps, mu=made.config["base_shift"] + slope * (TOKENS - 256))
    else:
        made.set_timesteps(steps)
    times = made.timesteps[begin * made.order :]
    if begin:
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(begin * made.order)
        start, first = torch.from_numpy(START), torch.from_numpy(noise(0))
        if hasattr(made, "add_noise"):
            z = made.add_noise(start, first, times[:1])
        else:
            z = made.scale_noise(start, times[:1], first)
    else:
        z = torch.from_numpy(noise(0)) * getattr(made, "init_noise_sigma", 1.0)
    scale = getattr(made, "scale_model_input", lambda z, t: z)
    for time in times:
        out = network(torch, scale(z, time), time)
        z = made.step(out, time, z, return_dict=False)[0]
    return z.numpy()


def ours(saved, steps, *, solver="", begin=0):
    """The same by a grid; without compiling, as it is short."""
    of = scheduler.from_config(saved)
    grid = of.grid(steps, tokens=TOKENS, solver=solver, strength=1 - begin / steps)
    output = lambda z, time: network(jnp, z, time)
    if begin:
        z = grid.alpha_S[0] * START + grid.sigma_S[0] * noise(0)
    else:
        z = grid.start * noise(0)
    with jax.disable_jit():
        z = solvers.SOLVERS[solver or of.name](
            output, jnp.asarray(z), grid, lambda n: noise(int(n) + begin + 1)
        )
    if saved.get("final_sigmas_type") == "sigma_min" and (solver or of.name) == "euler":
        z /= grid.x_share_S[-1]  # their state is z / α
    return np.asarray(z)


def near(got, want):
    assert np.isfinite(want).all()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def made_and_saved(name, config):
    made = getattr(diffusers, name)(**config)
    return made, json.loads(made.to_json_string())


@pytest.mark.parametrize(("name", "config", "steps"), CASES)
def test_a_trajectory_is_that_of_diffusers(name, config, steps, monkeypatch):
    made, saved = made_and_saved(name, config)
    near(ours(saved, steps), theirs(made, steps, monkeypatch))


def test_a_compiled_trajectory_is_the_same(monkeypatch):
    made, saved = made_and_saved("EulerAncestralDiscreteScheduler", BETAS)
    fresh = jnp.stack([noise(n + 1) for n in range(6)])
    grid = scheduler.from_config(saved).grid(6)
    output = lambda z, time: network(jnp, z, time)
    solve = jax.jit(lambda z: solvers.linear(output, z, grid, lambda n: fresh[n]))
    near(np.asarray(solve(grid.start * noise(0))), theirs(made, 6, monkeypatch))


@pytest.mark.parametrize("solver", scheduler.OWN)
@pytest.mark.parametrize("folder", FOLDERS)
def test_another_solver_reads_of_a_folder_what_its_class_has(folder, solver, monkeypatch):
    _, saved = made_and_saved(folder, BETAS | FOLDERS[folder])
    name = next(name for name, of in scheduler.CLASSES.items() if of == solver)
    want = theirs(getattr(diffusers, name).from_config(saved | PLMS | UNCLIPPED), 5, monkeypatch)
    near(ours(saved, 5, solver=solver), want)


@pytest.mark.parametrize("begin", [1, 3])
@pytest.mark.parametrize("name", scheduler.CLASSES)
def test_what_begins_with_an_image_goes_on_as_diffusers_does(name, begin, monkeypatch):
    discrete = {} if name.startswith("Flow") else BETAS | FOLDERS[name]
    made, saved = made_and_saved(name, discrete)
    near(ours(saved, 6, begin=begin), theirs(made, 6, monkeypatch, begin))


@pytest.mark.parametrize("name", scheduler.CLASSES)
def test_no_strength_leaves_no_steps(name):
    _, saved = made_and_saved(name, {} if name.startswith("Flow") else FOLDERS[name])
    assert not len(scheduler.from_config(saved).grid(6, strength=0.0).time_S)


def test_the_fields_of_solvers_are_those_of_the_classes():
    known = set(" ".join((scheduler.COMMON, *scheduler.OWN.values())).split())
    for name, solver in scheduler.CLASSES.items():
        if solver in scheduler.OWN and not name.startswith("Flow"):
            has = set(inspect.signature(getattr(diffusers, name).__init__).parameters) & known
            own = set(f"{scheduler.COMMON} {scheduler.OWN[solver]}".split())
            unread = {"set_alpha_to_one"} if solver == "lcm" else set()  # nor does their step
            assert has == own | unread, name


def test_one_step_of_a_stretched_flow_is_finite():
    saved = {"_class_name": FLOW} | DYNAMIC | dict(shift_terminal=0.02)
    grid = scheduler.from_config(saved).grid(1, tokens=TOKENS)
    assert grid.sigma_S.tolist() == [1.0]
    assert np.isfinite(grid.x_share_S).all()


def test_noise_alone_says_nothing_of_the_image():
    saved = dict(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    made = scheduler.from_config({"_class_name": "DDIMScheduler"} | saved)
    with pytest.raises(errors.ConfigError, match="nothing is left of the image"):
        made.grid(5)
    made.grid(5, solver="euler")  # its class leaves a little
    made.grid(5, strength=0.5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("UniPCMultistepScheduler", {}, "unknown scheduler"),
        ("DDIMScheduler", {}, "clip_sample True"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("EulerDiscreteScheduler", {"prediction_type": "flow"}, "prediction_type"),
        ("EulerDiscreteScheduler", {"beta_schedule": "sine"}, "beta_schedule"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample"),
        ("PNDMScheduler", {}, "skip_prk_steps"),
        (FLOW, {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_what_is_not_implemented_is_refused(name, change, message):
    with pytest.raises(errors.ConfigError, match=message):
        scheduler.from_config({"_class_name": name} | change)


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": 10**6},
        {"steps_offset": 5000},
        {"steps_offset": -900},
        {"trained_betas": [0.1, 0.2]},
        {"trained_betas": [0.1] * 999 + [1.5]},
        {"beta_start": math.nan},
        {"beta_end": 2.0},
        {"beta_schedule": ["linear"]},
        {"prediction_type": ["epsilon"]},
        {"set_alpha_to_one": "false"},
        {"original_inference_steps": 1001},
    ],
)
def test_a_value_of_no_sense_is_named(change):
    (field,) = change
    with pytest.raises(errors.ConfigError, match=f"^{field} is .*at {scheduler.CONFIG}"):
        scheduler.from_config({"_class_name": "DDIMScheduler", "clip_sample": False} | change)


def test_a_whole_number_may_be_written_with_a_point():
    saved = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000.0}
    assert len(scheduler.from_config(saved).grid(3).time_S) == 3


@pytest.mark.parametrize("change", [{"shift": 0}, {"shift_terminal": 1}, {"max_shift": "1"}])
def test_a_shift_of_no_sense_is_named(change):
    with pytest.raises(errors.ConfigError, match=f"^{next(iter(change))} is"):
        scheduler.from_config({"_class_name": FLOW} | change)


def test_a_shift_between_equal_lengths_is_named():
    saved = {"_class_name": FLOW, "base_image_seq_len": 4096}
    with pytest.raises(errors.ConfigError, match="base_image_seq_len is 4096, and max_image_seq"):
        scheduler.from_config(saved)


def test_more_steps_than_there_is_noise_for_are_refused():
    saved = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    made = scheduler.from_config(saved)
    with pytest.raises(errors.ConfigError, match=r"at --steps.*use 999 or fewer"):
        made.grid(1000)
    made.grid(999)
    made = scheduler.from_config({"_class_name": "DPMSolverMultistepScheduler"})
    with pytest.raises(errors.ConfigError, match="1000 steps, two of them at one level"):
        made.grid(1000)
    assert np.isfinite(made.grid(999).mix_S).all()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", FLOW])
@pytest.mark.parametrize("kind", ["eps", "v", "x"])
def test_weights_by_signal_to_noise(kind, name):
    """Of an error of what the network puts out, which is another one of the image: min(SNR, γ)."""
    path = scheduler.from_config({"_class_name": name}).path
    time = jnp.array([0.1, 0.5, 0.9])
    alpha, sigma = path.alpha(time), path.sigma(time)
    told = {"v": "v" if name != FLOW else "flow"}.get(kind, kind)
    x = lambda out: prediction.parts(told, out, 1.0, alpha, sigma)[0]
    want = np.minimum(np.square(alpha / sigma), 5.0) * np.square(x(1.5) - x(0.5))
    np.testing.assert_allclose(scheduler.min_snr(path, kind, time, 5.0), want, rtol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "v", "x"])
def test_weights_are_finite_at_both_ends(kind):
    saved = {"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}
    path = scheduler.from_config(saved).path
    weight = scheduler.min_snr(path, kind, jnp.array([0.0, 1.0]), 5.0)
    assert np.isfinite(weight).all()
    assert weight[1] == {"eps": 1, "v": 0, "x": 0}[kind]
