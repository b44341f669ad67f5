"""Pretrained pipelines: whole drawings equal diffusers', on folders that it wrote."""

import functools
import gc
import json
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors, objective, pipeline, weights
from t2i_jax.commands import verify
from t2i_jax.pretrained import folder, hf, previews, writer

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


def test_diffusers_is_told_which_files_are_there(tmp_path, monkeypatch):
    """It looks for a variant only where it is asked for one."""
    path = shutil.copytree(folder.TINY, tmp_path / "tiny")
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    monkeypatch.setattr(verify, "PROMPT", types.SimpleNamespace(value=folders.PROMPTS[0]))
    opened, config = folder.open(str(path)), weights.config_at(str(path))
    family = pipeline.Predictor(config).objective.predict["parts"].__self__
    found = verify.diffusers_parts(opened, np.zeros((1, 8, 8, 4), np.float32), family)
    assert found["denoiser"].shape == (1, 8, 8, 4)


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


@pytest.mark.parametrize("trained", ["model", "text"])
def test_an_export_holds_the_text_encoder_that_was_read(trained, tmp_path):
    """Of what `config.load.text` names, which need not lie in the model's folder."""
    other = shutil.copytree(folder.TINY / "text_encoder", tmp_path / "other")
    (other / "from_elsewhere.txt").write_text("")
    stored = safetensors.numpy.load_file(other / "model.safetensors")
    name = next(name for name in stored if name.endswith("final_layer_norm.bias"))
    stored[name] += 1
    safetensors.numpy.save_file(stored, other / "model.safetensors", {"format": "pt"})
    config = weights.config_at(str(folder.TINY))
    weights.override(config, {"text": str(other)})
    shapes = weights.abstract_nets(objective.make(config), config)[trained]
    net = weights.load_net(config.load[trained], trained, shapes)
    opened = writer.of_run(config)
    parts = opened.by_part({trained: net["params"]})
    others = writer.elsewhere(opened, weights.sources(config))
    writer.pipeline(opened, tmp_path / "out", parts, "float32", others)
    found = tmp_path / "out" / "text_encoder"
    assert (found / "from_elsewhere.txt").exists()
    same = safetensors.numpy.load_file(found / "model.safetensors")[name]
    np.testing.assert_array_equal(same, stored[name])
    index, before = (hf.read_json(at / hf.PIPELINE) for at in (tmp_path / "out", folder.TINY))
    assert index["text_encoder"] == before["text_encoder"]


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


OPTIONS = dict(steps=3, guidance=4.0, seed=1)
THREE = [*folders.PROMPTS, "a ring"]


@pytest.fixture(scope="module")
def whole():
    return pipeline.Pipeline.load(str(folder.TINY))


@pytest.fixture(scope="module")
def frugal():
    return pipeline.Pipeline.load(str(folder.TINY), low_memory=True)


def photos(pipe, n):
    res = pipe.config.res
    return np.random.default_rng(0).integers(0, 256, (n, res, res, 3), np.uint8)


def apart(a, b):
    return np.abs(a.astype(int) - b).max()


def bytes_held():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def size(net):
    return sum(x.nbytes for x in jax.tree.leaves(net))


def test_nets_that_come_and_go_draw_the_same(whole, frugal, monkeypatch):
    """Two batches; each net is loaded once for both. Pictures to 1 of 255."""
    loaded, load = [], weights.OnDemand.__getitem__
    monkeypatch.setattr(
        weights.OnDemand, "__getitem__", lambda self, name: loaded.append(name) or load(self, name)
    )
    options = OPTIONS | dict(batch_size=2)
    drawn = whole(THREE, negative_prompt=folders.NEGATIVE, **options)
    again = frugal(THREE, negative_prompt=folders.NEGATIVE, **options)
    assert loaded == ["text", "model", "vae"]
    assert np.ptp(drawn.astype(int)) > 20
    assert apart(again, drawn) <= 1
    examples = {"caption": folders.PROMPTS, "image": photos(whole, 2)}
    for strength in (0.0, 0.7):
        loaded.clear()
        pair = (p.draw("img2img", examples, strength=strength, **OPTIONS) for p in (whole, frugal))
        assert apart(*pair) <= 1
        assert loaded == ["vae", "text", "model", "vae"]


def test_img2img_has_the_settings_of_drawing(whole):
    settings = whole.predictor.check("img2img")
    for name, value in whole.config.sample.items():
        assert settings[name] == value


def test_what_would_change_nothing_is_told(whole, caplog):
    with pytest.raises(errors.ConfigError, match="files and weights"):
        pipeline.Pipeline.load(str(folder.TINY), lora=["FILE:0.8"])
    with pytest.raises(errors.ConfigError, match="guidance is 0"):
        whole(THREE, guidance=0.0)
    config = weights.config_at(str(folder.TINY))
    config.text = dict(dtype="float32", clip=dict(skip=1))
    with pytest.raises(errors.ConfigError, match=r"clip.*config.text"):
        pipeline.Predictor(config)
    for _ in range(2):
        whole._tell_what_is_not_read(["a ring " * 100])
    assert caplog.text.count("too long for the model") == 1


def test_noise_of_the_steps_is_a_picture_s_own(whole):
    """Of a solver that draws some in each step: it depends on seed and place alone."""
    options = OPTIONS | dict(sampler="euler_ancestral")
    both = whole(THREE[:2], **options)
    alone = whole(THREE[1], index=[1], **options)
    assert apart(both[1], alone[0]) <= 1
    assert apart(whole(THREE[1], index=[0], **options)[0], alone[0]) > 1


def test_only_the_largest_net_is_held(frugal):
    nets = {name: size(net) for name, net in frugal.nets.items()}
    held, before = [], bytes_held()
    frugal.predictor.poll = lambda: held.append(bytes_held() - before)
    frugal(folders.PROMPTS, **OPTIONS)
    frugal.predictor.poll = lambda: None
    # Of text, twice of the denoiser, of the autoencoder.
    wanted = [nets[name] for name in ("text", "model", "model", "vae")]
    np.testing.assert_allclose(held, wanted, rtol=0.02, atol=2**12)
    assert max(held) < 0.75 * sum(nets.values())
    assert bytes_held() - before < 2**12


@pytest.mark.slow
def test_adapters_come_and_go_with_their_nets(whole, tmp_path):
    """A file of adapters, of the denoiser and of the text encoder."""
    rng, pairs = np.random.default_rng(0), {}
    for part, chosen in (("unet", "to_q.weight"), ("text_encoder", "q_proj.weight")):
        (file,) = (folder.TINY / part).glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items():
            if name.endswith(chosen):
                for letter, shape in (("A", (2, value.shape[1])), ("B", (value.shape[0], 2))):
                    key = f"{part}.{name.removesuffix('weight')}lora_{letter}.weight"
                    pairs[key] = rng.normal(size=shape).astype(np.float32)
    safetensors.numpy.save_file(pairs, path := tmp_path / "adapters.safetensors")
    load = lambda **how: pipeline.Pipeline.load(str(folder.TINY), lora={str(path): 1.0}, **how)
    adapted = load()
    assert {"model_lora", "text_lora"} < adapted.nets.keys()
    drawn = adapted(folders.PROMPTS, **OPTIONS)
    assert apart(drawn, whole(folders.PROMPTS, **OPTIONS)) > 2
    assert apart(load(low_memory=True)(folders.PROMPTS, **OPTIONS), drawn) <= 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small autoencoder of diffusers, and its folder."""
    torch.manual_seed(0)
    widths = dict(encoder_block_out_channels=(6, 6), decoder_block_out_channels=(6, 6))
    depths = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    net = folders.diffusers.AutoencoderTiny(**widths, **depths, latent_channels=4).eval()
    net.save_pretrained(path := tmp_path_factory.mktemp("small"))
    return net, str(path)


def test_a_callback_sees_each_step_and_changes_nothing(whole, frugal, small):
    pipe = pipeline.Pipeline.load(str(folder.TINY), preview=small[1])
    seen = []
    drawn = pipe(THREE, callback=lambda *said: seen.append(said), batch_size=2, **OPTIONS)
    shapes = [(step, image_BHWC.shape[0]) for step, image_BHWC in seen]
    # PNDM has one call more than steps. The last batch's copy is cut off.
    assert shapes == [(1, 2), (2, 2), (3, 2), (4, 2), (1, 1), (2, 1), (3, 1), (4, 1)]
    assert all(image.dtype == np.uint8 and image.shape[1:] == drawn.shape[1:] for _, image in seen)
    assert len({image.tobytes() for _, image in seen}) == len(seen)
    np.testing.assert_array_equal(drawn, frugal(THREE, batch_size=2, **OPTIONS))
    assert apart(drawn, whole(THREE, batch_size=2, **OPTIONS)) <= 1


def test_a_preview_is_what_the_small_autoencoder_of_diffusers_decodes(small):
    z_BHWC = np.random.default_rng(0).normal(size=(2, 5, 7, 4)).astype(np.float32)
    got = previews.Preview(small[1], str(folder.TINY) + "#vae")(z_BHWC)
    with torch.no_grad():
        image = small[0].decode(torch.from_numpy(z_BHWC).permute(0, 3, 1, 2)).sample
    wanted = (image.permute(0, 2, 3, 1).numpy().clip(-1, 1) + 1) * 127.5
    assert np.ptp(wanted) > 20
    assert np.abs(got - wanted).max() <= 1


def test_the_last_preview_is_of_the_picture(whole):
    """The last step of DDIM leaves no noise: what it expects is what is decoded."""
    seen = []
    drawn = whole.predictor.sample(
        whole.nets,
        folders.PROMPTS,
        sampler="euler",
        watch=lambda *said: seen.append(said),
        **OPTIONS,
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    space = whole.predictor.objective.predict["sample"].__self__.space
    assert apart(pipeline.images.to_uint8(space.decode(whole.nets, seen[-1][1])), drawn) <= 1


def test_no_program_is_compiled_for_a_step(whole):
    watch = lambda *said: None
    whole.predictor.sample(whole.nets, THREE, watch=watch, **OPTIONS)
    programs = [
        whole.predictor._bind("sample", {"steps": 3, "guidance": 4.0}, i)[0] for i in range(4)
    ]
    sizes = [program._cache_size() for program in programs]
    whole.predictor.sample(whole.nets, THREE, watch=watch, **OPTIONS | {"seed": 2})
    assert [program._cache_size() for program in programs] == sizes


def test_what_has_no_previews_says_what_to_give(whole, small, tmp_path):
    with pytest.raises(errors.ConfigError, match=r"no small autoencoder.*hf:madebyollin/taesd"):
        whole(folders.PROMPTS, callback=print, **OPTIONS)
    widths = dict(encoder_block_out_channels=(6, 6), decoder_block_out_channels=(6, 6))
    depths = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    other = folders.diffusers.AutoencoderTiny(**widths, **depths, latent_channels=16)
    other.save_pretrained(tmp_path)
    with pytest.raises(errors.ConfigError, match=r"decodes 16 channels.*draws latents of 4"):
        pipeline.Pipeline.load(str(folder.TINY), preview=str(tmp_path))
    with pytest.raises(errors.ConfigError, match="draws no latents"):
        pipeline.Pipeline.load("builtin:shapes", preview=small[1])
    with pytest.raises(errors.ConfigError, match="of a pretrained pipeline alone"):
        pipeline.Pipeline.load("builtin:shapes", low_memory=True)
    pixels = pipeline.Pipeline.load("builtin:shapes")
    with pytest.raises(errors.ConfigError, match="one program, without stages"):
        pixels.predictor.sample(pixels.nets, ["a ring"], watch=print)


@pytest.mark.parametrize("tile", [3, 2, 1, 9])
@pytest.mark.parametrize("name", ["sample", "img2img"])
def test_a_tile_of_no_even_size_is_refused(whole, frugal, name, tile):
    examples = {"caption": folders.PROMPTS}
    examples |= {"image": photos(whole, 2)} if name == "img2img" else {}
    for pipe in (whole, frugal):
        with pytest.raises(errors.ConfigError, match=f"tile is {tile}, no multiple of 2"):
            pipe.draw(name, examples, tile=tile)


def test_slices_and_tiles_are_the_pictures(whole):
    """One after another to 1e-5; in tiles nearly, as norms see a tile alone."""
    family, res = whole.predictor.objective.predict["sample"].__self__, whole.config.res
    rng, key = np.random.default_rng(0), jax.random.key(0)
    z_BhwC = rng.normal(size=(3, res // 2, res // 2, 4)).astype(np.float32)
    image_BHWC = np.float32(rng.uniform(-1, 1, (3, res, res, 3)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def both(tile, sliced):
        how, index = dict(tile=tile, sliced=sliced), np.arange(3)
        seen = family.see(whole.nets, {"image": image_BHWC, "index": index}, key, **how)
        return family.show(whole.nets, {"state": (z_BhwC,)}, key, **how), seen["latents"]

    plain, tiled = both(0, False), both(8, False)
    far = lambda a, b: [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(a, b, strict=True)]
    assert max(far(both(0, True), plain)) < 1e-5
    assert max(far(both(8, True), tiled)) < 1e-5
    assert max(far(both(res, False), plain)) < 1e-5  # one tile
    assert min(far(tiled, plain)) > 0
    for by_tiles, wanted in zip(tiled, plain, strict=True):
        other = np.abs(wanted[0] - wanted[1]).mean()  # of another picture
        assert np.abs(by_tiles - wanted).mean() < 0.5 * other


@pytest.mark.slow
def test_a_picture_is_drawn_in_slices_and_tiles(whole):
    examples = {"caption": folders.PROMPTS, "image": photos(whole, 2)}
    draw = lambda **how: whole.draw("img2img", examples, strength=0.5, **OPTIONS | how)
    plain, tiled = draw(), draw(tile=8)
    assert apart(draw(sliced=True), plain) <= 1
    assert apart(draw(tile=8, sliced=True), tiled) <= 1
    assert apart(tiled, plain) > 1  # of 4 × 4 places, whose norms are others


@pytest.mark.slow
def test_the_command_draws_with_little_memory_and_shows_steps(small, tmp_path):
    command = [sys.executable, "sample.py", f"--checkpoint={folder.TINY}", "--prompt=a ring"]
    command += ["--low_memory", f"--preview={small[1]}", f"--output_dir={tmp_path}", "--steps=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000_preview.png", "00001_s0.png"]


@pytest.mark.parametrize("change", [dict(block_out_channels=None), dict(down_block_types=7)])
def test_a_senseless_config_of_a_network_is_one_error(change, tmp_path):
    source = shutil.copytree(folder.TINY, tmp_path / "source")
    path = source / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(errors.Error) as caught:
        pipeline.Pipeline.load(str(source))
    assert caught.value.exit_code in (65, 78)
