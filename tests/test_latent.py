"""Pretrained pipelines: whole drawings equal diffusers', on folders that it wrote."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from t2i_jax import errors, pipeline
from t2i_jax.pretrained import folder, writer

torch = pytest.importorskip("torch")
folders = pytest.importorskip("tests.folders")  # needs diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

HEIGHT, WIDTH = 24, 16
STEPS, GUIDANCE = 5, 3.0
CLOSE = 2  # of 255


LONG = ("sd2", "sd3")  # pipelines whose parts others have, too
KINDS = [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in folders.PIPELINES]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """The name of a kind of pipeline, diffusers' and ours."""
    path = tmp_path_factory.mktemp(request.param)
    theirs = folders.save(folders.PIPELINES[request.param], path)
    return request.param, theirs, pipeline.Pipeline.load(str(path))


def drawn(theirs, noise_BhwC, **options):
    """What diffusers draws for both prompts from given noise: uint8 BHWC."""
    latents = torch.from_numpy(noise_BhwC.transpose(0, 3, 1, 2).copy())
    if type(theirs).__name__ == "FluxPipeline":
        latents = theirs._pack_latents(latents, *(latents.shape[i] for i in range(4)))
        options.pop("negative_prompt", None)
    if type(theirs).__name__.startswith("PixArt"):
        options |= dict(use_resolution_binning=False, clean_caption=False)
    asked = dict(height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    asked |= dict(prompt=folders.PROMPTS, latents=latents, output_type="np")
    with torch.no_grad():
        images = theirs(**asked | options).images
    return np.round(images * 255).astype(np.uint8)


@pytest.mark.slow
def test_verify_says_what_both_compute():
    """The command's own results and diffusers', of the pipeline that ships."""
    command = [sys.executable, "-m", "t2i_jax", "verify", str(folder.TINY), "--with=diffusers"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    apart = [float(text) for text in re.findall(r"difference (\S+)", said)]
    assert len(apart) == 3  # text, denoiser, autoencoder
    assert max(apart) < 1e-4


def test_without_strength_no_caption_changes_an_image():
    pipe = pipeline.Pipeline.load(str(folder.TINY))
    res = pipe.config.res
    image_BHWC = np.random.default_rng(0).integers(0, 256, (1, res, res, 3), np.uint8)
    drawn = [
        pipe.draw("img2img", {"caption": [caption], "image": image_BHWC}, strength=0.0, steps=3)
        for caption in folders.PROMPTS
    ]
    assert drawn[0].shape == image_BHWC.shape
    np.testing.assert_array_equal(*drawn)


def start(ours):
    """Noise of two rectangles."""
    family = ours.predictor.objective.predict["sample"].__self__
    shape = (2, HEIGHT // 2, WIDTH // 2, family.space.shape[-1])
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


RECTANGLE = dict(width=WIDTH, height=HEIGHT, steps=STEPS)


def test_a_rectangle_is_the_same(pair):
    """Two prompts, a negative prompt, guidance, the folder's own scheduler."""
    name, theirs, ours = pair
    noise_BhwC = start(ours)
    negative = {} if name == "flux" else {"negative_prompt": folders.NEGATIVE}
    wanted = drawn(theirs, noise_BhwC, **{k: [v] * 2 for k, v in negative.items()})
    image_BHWC = ours(folders.PROMPTS, noise=noise_BhwC, **negative, **RECTANGLE, guidance=GUIDANCE)
    assert image_BHWC.shape == (2, HEIGHT, WIDTH, 3)
    assert np.ptp(wanted.astype(int)) > 20  # not a flat picture
    assert np.abs(image_BHWC.astype(int) - wanted).max() <= CLOSE


@pytest.mark.parametrize(
    ("size", "res"), [(None, 256), ([8, 8], 16), (8, 16), ([8, 16], 0), (True, 0)]
)
def test_a_pipelines_side_is_what_its_config_says(size, res, tmp_path):
    path = shutil.copytree(folder.TINY, tmp_path / "a,b#c")  # a name that other rules would cut
    config = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": size}))
    if res:
        assert folder.described(str(path))["res"] == res
    else:
        with pytest.raises(errors.ConfigError, match="no side of a square"):
            folder.described(str(path))


def test_an_autoencoder_from_elsewhere_brings_its_own_scale(tmp_path):
    whole = shutil.copytree(folder.TINY, tmp_path / "whole")
    path = whole / "vae" / "config.json"
    config = json.loads(path.read_text()) | {"scaling_factor": 0.5, "shift_factor": 0.1}
    path.write_text(json.dumps(config))
    load = {"vae": str(whole / "vae")}
    found = pipeline.Pipeline.load(str(folder.TINY), load=load).predictor.objective
    family = found.predict["sample"].__self__
    assert (family.vae.scaling_factor, family.vae.shift_factor) == (0.5, 0.1)
    opened = folder.open(str(folder.TINY))
    writer.pipeline(opened, tmp_path / "out", {}, "float32", load)
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text()) == config
    assert pipeline.Pipeline.load(str(tmp_path / "out")).config.res == 16
    path.write_text(json.dumps(config | {"latent_channels": 5}))
    with pytest.raises(errors.ConfigError, match="latents have 5 channels, the denoiser's 4"):
        pipeline.Pipeline.load(str(folder.TINY), load=load)


def test_a_picture_without_a_negative_prompt_is_the_same_beside_one_with(pair):
    """SDXL's null is zeros, and FLUX.1 has none; of others it is the empty text either way."""
    name, _, ours = pair
    if name not in ("sdxl", "flux"):
        return
    # By the same program as the rectangle above.
    options = dict(noise=start(ours), **RECTANGLE, guidance=40.0)
    if name == "flux":
        with pytest.raises(errors.ConfigError, match="no negative prompt"):
            ours(folders.PROMPTS, negative_prompt=folders.NEGATIVE, **options)
        return
    mixed = ours(folders.PROMPTS, negative_prompt=[folders.NEGATIVE, None], **options)
    none = ours(folders.PROMPTS, **options)
    assert np.abs(mixed[1].astype(int) - none[1]).max() <= 1
    assert np.abs(mixed[0].astype(int) - none[0]).max() > 1
