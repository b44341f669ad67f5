"""Pretrained pipelines are trained, whole or by adapters, and written back for diffusers."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from configs import finetune, finetune_lora
from t2i_jax import errors, loop, objective, pipeline, weights
from t2i_jax.objectives import latent
from t2i_jax.pretrained import lora_files
from t2i_jax.text import tokenize
from tests import runs, test_latent

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
folders = test_latent.folders

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = dict(width=test_latent.WIDTH, height=test_latent.HEIGHT, steps=4, guidance=3.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A pipeline of Stable Diffusion 1 as diffusers wrote it."""
    folder = tmp_path_factory.mktemp("source")
    folders.save(folders.sd1, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight photographs of different sizes with captions."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = []
    for i in range(8):
        image = rng.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": folders.PROMPTS[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def small(make, source, data, more="", **changes):
    config = make.get_config(f"source={source},path={data},steps=3,res=16{more}")
    config.text.dtype = config.model.model.dtype = "float32"
    config.batch_size, config.strategy = 4, "data"
    config.sample_every = config.save_minutes = 0
    config.log_every = 1
    for spec in config.optim.values():
        spec.update(learning_rate=3e-2, warmup=0, decay="constant")
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def adapted(source, data, tmp_path_factory):
    """A run that trained adapters of the U-net."""
    workdir = tmp_path_factory.mktemp("lora")
    loop.train(small(finetune_lora, source, data), workdir)
    return workdir


def noise():
    shape = (2, test_latent.HEIGHT // 2, test_latent.WIDTH // 2, 4)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def theirs(folder, start):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda: test_latent.drawn(pipe, start, num_inference_steps=4)


def written(workdir, output, *flags):
    """What `t2i_jax export --format=diffusers` writes."""
    command = [sys.executable, "-m", "t2i_jax", "export", "--format=diffusers", "--dtype=float32"]
    subprocess.run(
        [*command, f"--workdir={workdir}", f"--output={output}", *flags], cwd=ROOT, check=True
    )
    return output


def apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_adapters_draw_the_same_in_diffusers(source, adapted, tmp_path):
    """Trained here, written as PEFT's file, opened there and here again."""
    start = noise()
    run = pipeline.Pipeline.load(str(adapted))
    assert run.words is None  # the pipeline knows more words than the captions have
    ours = run(folders.PROMPTS, noise=start, **OPTIONS)
    folder = written(adapted, tmp_path / "lora")
    pipe, draw = theirs(source, start)
    before = draw()
    pipe.load_lora_weights(folder)
    assert apart(draw(), ours) <= test_latent.CLOSE < 5 < apart(before, ours)
    again = pipeline.Pipeline.load(str(source), lora={str(folder): 1.0})
    assert apart(again(folders.PROMPTS, noise=start, **OPTIONS), ours) <= 1
    none = pipeline.Pipeline.load(str(source), lora={str(folder): 0.0})
    assert apart(none(folders.PROMPTS, noise=start, **OPTIONS), before) <= test_latent.CLOSE


def test_a_run_has_rectangles_of_one_size(source, data, tmp_path):
    """Also its samples have that size, and a family of squares refuses it."""
    config = small(finetune, source, data, size=(24, 16))
    config.data.pad = True
    run = loop.Run(config, tmp_path)
    assert run.batches.batch(0).arrays["image"].shape == (4, 24, 16, 3)
    assert run.predictor.trace("sample").out_info.shape == (4, 24, 16, 3)
    for size in ((20, 17), (24,)):
        with pytest.raises(errors.ConfigError) as e:
            loop.Run(small(finetune, source, data, size=size), tmp_path / "new")
        assert e.value.where == "config.size"
    with pytest.raises(errors.ConfigError, match="learns squares"):
        loop.Run(runs.config(size=(24, 16)), tmp_path / "new")


@pytest.mark.slow
def test_a_run_learns_rectangles_and_draws_them(source, data, tmp_path):
    config = small(finetune, source, data, size=(24, 16), steps=1, sample_every=1)
    config.prompts, config.sample = ("a red circle",), dict(steps=1)
    loop.train(config, tmp_path)
    with Image.open(tmp_path / "samples/step_00000001.png") as picture:
        assert picture.size == (16, 24)


@pytest.mark.parametrize("make", [finetune, finetune_lora])
def test_width_and_height_are_arguments(source, make):
    config = make.get_config(f"source={source},path=DATA,width=16,height=24,prior=CLASS")
    assert config.size == (24, 16)
    with pytest.raises(errors.ConfigError, match="only one of width and height"):
        make.get_config(f"source={source},width=16")
    assert (config.data.source, config.data.prior) == ("subject", "CLASS")


def test_sdxl_is_told_where_pictures_come_from(tmp_path):
    """The loss changes with what `inputs.origin` says, and the denoiser reads it in its place."""
    folders.save(folders.sdxl, tmp_path)
    config = weights.config_at(str(tmp_path))
    config.res = 16
    family = latent.Latent(config)
    nets = pipeline.Pipeline.load(str(tmp_path)).nets
    tokens, _ = tokenize.read(family.captions.tokenizers, folders.PROMPTS)
    origin = np.array([[20, 30, 0, 10], [60, 16, 18, 0]], np.float32)
    cond = family.cond(nets, tokens, (24, 16), origin_B4=origin)
    np.testing.assert_array_equal(cond.numbers_BK, np.c_[origin, [[24, 16]] * 2])
    alone = family.cond(nets, tokens, (24, 16))
    np.testing.assert_array_equal(alone.numbers_BK, [[24, 16, 0, 0, 24, 16]] * 2)
    assert "origin" in objective.make(config).inputs[0].shapes
    image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    batch = dict(image=image, text=tokens, index=np.arange(2), weight=np.ones(2, np.float32))
    loss = jax.jit(lambda batch: family.loss(nets, batch, jax.random.key(0), 0)[0])
    losses = [
        loss(batch | extra)
        for extra in ({}, {"origin": np.tile([16.0, 16, 0, 0], (2, 1))}, {"origin": origin})
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-4


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(source, data, adapted, tmp_path):
    for steps in (2, 3):
        loop.train(small(finetune_lora, source, data, steps=steps), tmp_path)
    whole, stopped = (pipeline.Pipeline.load(str(path)).nets for path in (adapted, tmp_path))
    same = jax.tree.map(np.array_equal, whole["model_lora"], stopped["model_lora"])
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory):
    """A pipeline of Stable Diffusion XL, whose two text encoders read each caption."""
    folder = tmp_path_factory.mktemp("sdxl")
    folders.save(folders.sdxl, folder)
    return folder


def opened(folder, start):
    """diffusers' pipeline, and what draws with it."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda: test_latent.drawn(pipe, start, num_inference_steps=4)


@pytest.mark.slow
def test_adapters_of_both_text_encoders_draw_the_same_in_diffusers(two_encoders, data, tmp_path):
    """They learn beside those of the denoiser, and one file holds all three."""
    start = noise()
    config = small(finetune_lora, two_encoders, data, ",text_rank=4")
    loop.train(config, tmp_path / "run")
    pipe = pipeline.Pipeline.load(str(tmp_path / "run"))
    ours = pipe(folders.PROMPTS, noise=start, **OPTIONS)
    for name in ("encoders_0", "encoders_1"):
        pairs = jax.tree.leaves(pipe.nets["text_lora"]["params"][name])
        assert max(np.abs(x).max() for x in pairs[1::2]) > 1e-3  # B, which begins as zero
    folder = written(tmp_path / "run", tmp_path / "lora")
    theirs, draw = opened(two_encoders, start)
    theirs.load_lora_weights(folder)
    parts = [theirs.unet, theirs.text_encoder, theirs.text_encoder_2]
    assert all(hasattr(part, "peft_config") for part in parts)
    assert apart(draw(), ours) <= test_latent.CLOSE
    again = pipeline.Pipeline.load(str(two_encoders), lora={str(folder): 1.0})
    assert apart(again(folders.PROMPTS, noise=start, **OPTIONS), ours) <= 1
    # Without those of the text encoders the pictures are others.
    whole = safetensors.numpy.load_file(folder / lora_files.WEIGHTS)
    denoiser = {name: x for name, x in whole.items() if name.startswith("unet.")}
    safetensors.numpy.save_file(denoiser, tmp_path / "unet.safetensors")
    less = pipeline.Pipeline.load(str(two_encoders), lora={str(tmp_path / "unet.safetensors"): 1.0})
    assert apart(less(folders.PROMPTS, noise=start, **OPTIONS), ours) > 5


def test_peft_s_adapters_of_both_text_encoders_draw_the_same_here(two_encoders, tmp_path):
    torch.manual_seed(0)
    start = noise()
    theirs, draw = opened(two_encoders, start)
    before, found = draw(), {}
    for part in ("text_encoder", "text_encoder_2"):
        net = getattr(theirs, part)
        spec = dict(r=3, lora_alpha=6, init_lora_weights=False)
        spec["target_modules"] = ["q_proj", "out_proj", "fc1"]
        peft.inject_adapter_in_model(peft.LoraConfig(**spec), net)
        found[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(net)
        notes = net.peft_config["default"].to_dict()
        notes["target_modules"] = sorted(notes["target_modules"])
        found[f"{part}_lora_adapter_metadata"] = notes
    theirs.save_lora_weights(tmp_path, **found)
    ours = pipeline.Pipeline.load(str(two_encoders), lora={str(tmp_path): 1.0})
    drawn = ours(folders.PROMPTS, noise=start, **OPTIONS)
    assert apart(draw(), drawn) <= test_latent.CLOSE < 5 < apart(before, drawn)


@pytest.mark.slow
def test_merged_adapters_are_a_pipeline(source, adapted, tmp_path):
    start = noise()
    ours = pipeline.Pipeline.load(str(adapted))(folders.PROMPTS, noise=start, **OPTIONS)
    folder = written(adapted, tmp_path / "merged", "--merge")
    assert apart(theirs(folder, start)[1](), ours) <= test_latent.CLOSE
    assert (
        apart(pipeline.Pipeline.load(str(folder))(folders.PROMPTS, noise=start, **OPTIONS), ours)
        <= 1
    )


@pytest.mark.slow
def test_adapters_of_peft_draw_the_same_here(source, tmp_path):
    """With another alpha than rank, also of convolutions."""
    torch.manual_seed(0)
    start = noise()
    pipe, draw = theirs(source, start)
    kind = dict(r=3, lora_alpha=5, init_lora_weights=False)
    targets = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=targets, **kind))
    layers = peft.get_peft_model_state_dict(pipe.unet)
    notes = pipe.unet.peft_config["default"].to_dict()
    notes["target_modules"] = sorted(notes["target_modules"])
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=notes)
    ours = pipeline.Pipeline.load(str(source), lora={str(tmp_path / lora_files.WEIGHTS): 1.0})
    assert apart(ours(folders.PROMPTS, noise=start, **OPTIONS), draw()) <= test_latent.CLOSE


@pytest.mark.slow
def test_a_whole_fine_tune_opens_in_diffusers(source, data, tmp_path):
    """It learns, and draws the same there."""
    config = small(finetune, source, data)
    loop.train(config, tmp_path / "run")
    start = noise()
    ours = pipeline.Pipeline.load(str(tmp_path / "run"))(folders.PROMPTS, noise=start, **OPTIONS)
    before = pipeline.Pipeline.load(str(source))(folders.PROMPTS, noise=start, **OPTIONS)
    assert apart(before, ours) > 5
    folder = written(tmp_path / "run", tmp_path / "tuned")
    assert apart(theirs(folder, start)[1](), ours) <= test_latent.CLOSE
