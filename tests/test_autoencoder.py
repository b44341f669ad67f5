"""Autoencoders against diffusers; tiles against whole pictures; what configs may not ask for."""

import functools
import inspect
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors, sharding
from t2i_jax.models import convolution
from t2i_jax.models.types import Moments
from t2i_jax.pretrained import autoencoder, opener
from t2i_jax.sampling import tiles

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def levels(*widths):
    blocks = dict(down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D")
    blocks = {name: len(widths) * [kind] for name, kind in blocks.items()}
    return blocks | dict(block_out_channels=widths, norm_num_groups=3)


KL = dict(latent_channels=5, sample_size=32, scaling_factor=0.3, force_upcast=False)
KL |= levels(6, 9, 15)
BARE = dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
SMALL = dict(encoder_block_out_channels=(7, 7, 7), decoder_block_out_channels=(5, 5, 5))
CASES = {  # name -> diffusers' class, its config
    "kl": ("AutoencoderKL", KL),
    "kl, bare": (
        "AutoencoderKL",
        KL | levels(9, 6) | BARE | dict(layers_per_block=2, shift_factor=0.1),
    ),
    "vq": (
        "VQModel",
        levels(9, 15) | dict(latent_channels=4, vq_embed_dim=5, num_vq_embeddings=11),
    ),
    "tiny": (
        "AutoencoderTiny",
        SMALL | dict(num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(2, 1, 1), latent_channels=5),
    ),
}
CLOSE = 1e-4  # of the largest number


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Case -> its folder and network, made once."""

    @functools.cache
    def make(case):
        name, config = CASES[case]
        torch.manual_seed(0)
        net = getattr(diffusers, name)(**config).eval()
        for parameter in net.parameters():
            if parameter.ndim == 1:  # of norms: they start at 1 and 0, which would hide mistakes
                torch.nn.init.normal_(parameter, mean=parameter[0].item() == 1, std=0.3)
        if case == "kl":  # some beyond what is kept
            torch.nn.init.uniform_(net.quant_conv.bias[5:], -50, 50)
        folder = tmp_path_factory.mktemp("autoencoder")
        net.save_pretrained(folder)
        return folder, net

    return make


def network(folder, **options):
    """Our module and its variables."""
    checkpoint = opener.open(str(folder))
    net = checkpoint.module(Moments, **options)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    checkpoint.check(shapes)
    return net, checkpoint.load(shapes)


def noise(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def by_torch(fn, x_BHWC):
    """fn of NCHW tensors, on NHWC arrays."""
    with torch.inference_mode():
        out = fn(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2))
    return out.permute(0, 2, 3, 1).numpy()


def distance(got, want):
    assert got.shape == want.shape
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("case", CASES)
def test_encodes_and_decodes_as_diffusers(saved, case):
    folder, theirs = saved(case)
    net, variables = network(folder)
    image, latent = noise(2, 26, 44, 3), 2 * noise(2, 5, 7, 5)  # 26 is no multiple of the factor

    @jax.jit
    def ours(variables, image, latent):
        return net.apply(variables, image), net.apply(variables, latent, method="decode")

    moments, decoded = ours(variables, image, latent)
    if case.startswith("kl"):
        encode = lambda x: theirs.encode(x).latent_dist.mean
        logvar = by_torch(lambda x: theirs.encode(x).latent_dist.logvar, image)
        assert distance(moments.logvar_BHWC, logvar) < CLOSE
        assert case != "kl" or (logvar.min(), logvar.max()) == (-30, 20)
    else:
        encode = lambda x: theirs.encode(x).latents
        assert moments.logvar_BHWC is None
    assert distance(moments.mean_BHWC, by_torch(encode, image)) < CLOSE
    assert distance(decoded, by_torch(lambda x: theirs.decode(x).sample, latent)) < CLOSE
    config = theirs.config
    halved = round(image.shape[1] / moments.mean_BHWC.shape[1])
    assert (net.factor, net.latent_channels) == (halved, 5)
    assert net.scaling_factor == config.scaling_factor
    assert net.shift_factor == (config.get("shift_factor") or 0)


def test_half_precision_is_near_and_forbidden_by_force_upcast(saved, tmp_path):
    folder, _ = saved("kl")
    image = noise(1, 16, 16, 3)
    net, variables = network(folder)
    half, _ = network(folder, dtype="bfloat16")
    want = jax.jit(net.apply)(variables, image).mean_BHWC
    got = jax.jit(half.apply)(variables, image).mean_BHWC
    assert got.dtype == jnp.float32
    assert 1e-5 < distance(got, want) < 0.1

    config = json.loads((folder / "config.json").read_text())
    for said in ({"force_upcast": True}, {"force_upcast": False}, {}):
        changed = {k: v for k, v in config.items() if k != "force_upcast"} | said
        changed["model_type"] = changed["_class_name"]
        wanted = "float32" if said.get("force_upcast") else "bfloat16"
        assert autoencoder.from_config(changed, dtype="bfloat16").dtype == wanted


@pytest.mark.parametrize("convolutions", [False, True])
def test_reads_old_names_of_attention(saved, tmp_path, convolutions):
    folder, _ = saved("kl")
    stored = safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name, x):
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                wide = convolutions and x.ndim == 2
                return name.replace(new, before), x[..., None, None] if wide else x
        return name, x

    renamed = dict(rename(*item) for item in stored.items())
    assert len(renamed.keys() - stored.keys()) == 16
    safetensors.numpy.save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    same = jax.tree.map(np.array_equal, network(folder)[1], network(tmp_path)[1])
    assert all(jax.tree.leaves(same))


HARMLESS = {  # fields that change nothing of what is computed here
    "VQModel": {"lookup_from_codebook"},
    "AutoencoderTiny": {"latent_magnitude", "latent_shift", "force_upcast"},
}


@pytest.mark.parametrize("case", ["kl", "vq", "tiny"])
def test_every_field_of_a_config_is_read_or_harmless(saved, tmp_path, case):
    config = json.loads((saved(case)[0] / "config.json").read_text())
    kind = config["model_type"] = config["_class_name"]
    family = opener.families()[kind]
    for field in set(inspect.signature(getattr(diffusers, kind)).parameters):
        if field in HARMLESS.get(kind, ()):
            family.from_config(config | {field: "strange"})
            continue
        with pytest.raises(errors.ConfigError, match=field):
            family.from_config(config | {field: "strange"})


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("kl", {"latents_mean": [0.1] * 5}, "latents_mean"),
        ("kl", {"block_out_channels": [6, 10, 15]}, "divide by norm_num_groups 3"),
        ("kl", {"block_out_channels": [6, 9, 0]}, r"like \[64\]"),
        ("kl", {"block_out_channels": []}, r"like \[64\]"),
        ("kl", {"block_out_channels": 64 * [6]}, "at most"),
        ("kl", {"block_out_channels": [6, 9, 2**30]}, "at most"),
        ("kl", {"up_block_types": 3 * ["AttnUpDecoderBlock2D"]}, "UpDecoderBlock2D"),
        ("kl", {"shift_factor": float("nan")}, "shift_factor"),
        ("vq", {"norm_type": "spatial"}, "norm_type"),
        ("tiny", {"upsampling_scaling_factor": 3}, "upsampling_scaling_factor"),
        ("tiny", {"num_decoder_blocks": [1, 1]}, "levels"),
    ],
)
def test_refuses_what_is_not_implemented(saved, case, change, message):
    config = json.loads((saved(case)[0] / "config.json").read_text())
    config["model_type"] = config["_class_name"]
    with pytest.raises(errors.ConfigError, match=message):
        opener.families()[config["model_type"]].from_config(config | change)


def test_refuses_weights_of_another_config(saved, tmp_path):
    folder, _ = saved("kl")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": 6}))
    with pytest.raises(errors.DataError, match=r"quant_conv.weight: want \(12, 12, 1, 1\)"):
        network(tmp_path)


def test_convolution_of_a_doubled_map_computes_nothing_twice():
    x, kernel, weight = noise(2, 5, 3, 4), noise(3, 3, 4, 6), noise(2, 10, 6, 6)

    def theirs(x, kernel):
        doubled = torch.nn.functional.interpolate(x, scale_factor=2)
        return torch.nn.functional.conv2d(doubled, kernel.permute(3, 2, 0, 1), padding=1)

    x_torch = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    kernel_torch = torch.from_numpy(kernel).requires_grad_()
    want = theirs(x_torch, kernel_torch).permute(0, 2, 3, 1)
    (want * torch.from_numpy(weight)).sum().backward()
    got = convolution.of_doubled(x, kernel)
    assert distance(got, want.detach().numpy()) < 1e-5
    loss = lambda *args: (convolution.of_doubled(*args) * weight).sum()
    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    assert distance(dx, x_torch.grad.permute(0, 2, 3, 1).numpy()) < 1e-5
    assert distance(dkernel, kernel_torch.grad.numpy()) < 1e-5
    flops = jax.jit(convolution.of_doubled).lower(x, kernel).cost_analysis()["flops"]
    assert flops < 0.7 * 2 * 9 * 4 * 6 * (2 * 10 * 6)


def test_gradient_goes_past_the_codebook(saved):
    net, variables = network(saved("vq")[0])
    latent = noise(1, 2, 2, 5)
    loss = lambda x: jnp.square(net.apply(variables, x, method="decode")).sum()
    assert (jnp.abs(jax.jit(jax.grad(loss))(latent)) > 0).all()


def test_a_codebook_in_half_precision_is_compared_in_full(saved):
    """The rounded distances of float16 would choose other entries."""
    net, variables = network(saved("vq")[0])
    entries = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float16)
    variables["params"]["codebook"]["embedding"] = jnp.array(entries)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    a, b = np.moveaxis(entries[list(itertools.combinations(range(11), 2))].astype(np.float32), 1, 0)
    latent = ((a + b) / 2 + 1e-4 * (a - b)).reshape(1, 5, 11, 5)  # a little nearer to the first
    decode = jax.jit(lambda v: net.apply(v, latent, method="decode"))
    np.testing.assert_array_equal(decode(variables), decode(full))


@pytest.fixture(scope="module")
def large(saved):
    """A decoder, and latents of 20 × 26 places decoded in tiles of 8 and as a whole."""
    net, variables = network(saved("kl")[0])
    decode = lambda z: net.apply(variables, z, method="decode")
    latent = 2 * noise(2, 20, 26, 5)
    tiled = jax.jit(lambda z: tiles.tiled(decode, z, tile=net.tile, factor=net.factor))
    return decode, latent, tiled(latent), jax.jit(decode)(latent)


def test_tiles_are_those_of_diffusers(saved, large):
    _, theirs = saved("kl")
    theirs.enable_tiling()
    want = by_torch(lambda z: theirs.decode(z).sample, large[1])
    theirs.disable_tiling()
    # Tiles of 32 pixels begin every 24. Where four of them meet, diffusers blends in two steps,
    # and its last tiles are narrower.
    blends = lambda n: (np.arange(n) >= 24) & (np.arange(n) % 24 < 8)
    same = ~(blends(72)[:, None] & blends(96))
    got = np.asarray(large[2])[:, :72, :96]
    assert distance(got[:, same], want[:, :72, :96][:, same]) < CLOSE


def test_tiles_make_nearly_the_whole_picture(large):
    _, _, tiled, whole = large
    assert distance(tiled, np.asarray(whole)) < 1
    # Without norms and attention over a whole tile the middle of a tile is that of the picture.
    conv = lambda z: convolution.of_doubled(z[..., :3], noise(3, 3, 3, 3))
    for height, width in ((20, 26), (9, 31), (8, 9), (5, 23)):
        z = noise(1, height, width, 5)
        got = tiles.tiled(conv, z, tile=8, factor=2)
        assert distance(got[:, 1:3, 1:3], np.asarray(conv(z))[:, 1:3, 1:3]) < 1e-6
        same = tiles.tiled(
            lambda z: jnp.repeat(jnp.repeat(z[..., :3], 2, 1), 2, 2), z, tile=8, factor=2
        )
        assert distance(same, np.repeat(np.repeat(z[..., :3], 2, 1), 2, 2)) < 1e-6


def test_tiles_encode_as_those_of_diffusers(saved):
    folder, theirs = saved("kl")
    net, variables = network(folder)
    encode = lambda x: jnp.concatenate(net.apply(variables, x), -1)
    image = noise(2, 80, 104, 3)
    theirs.enable_tiling()
    want = by_torch(lambda x: theirs.encode(x).latent_dist.parameters, image)
    theirs.disable_tiling()
    ours = lambda x: tiles.tiled(encode, x, tile=net.tile, factor=1, unit=net.factor)
    blends = lambda n: (np.arange(n) >= 6) & (np.arange(n) % 6 < 2)  # as above, in places
    same = ~(blends(18)[:, None] & blends(24))
    mean = lambda x: np.asarray(x)[:, :18, :24, : net.latent_channels][:, same]  # logvar is cut off
    got = jax.jit(ours)(image)
    assert got.shape == (2, 20, 26, 10)
    assert distance(mean(got), mean(want)) < CLOSE
    halves = lambda x: x.reshape(2, x.shape[1] // 4, 4, x.shape[2] // 4, 4, 3).mean((2, 4))
    assert distance(tiles.tiled(halves, image, tile=8, factor=1, unit=4), halves(image)) < 1e-6


@pytest.mark.parametrize(("factor", "unit", "blended"), [(4, 1, 8), (1, 4, 2)])
def test_tiles_leave_no_seam(factor, unit, blended):
    """What differs from tile to tile, as norms do, goes over within the overlap, in even steps."""
    x = noise(1, 20 * unit, 26 * unit, 1)
    ones = lambda x: np.ones((1, x.shape[1] // unit * factor, x.shape[2] // unit * factor, 1))
    tile = lambda x: ones(x) * x.mean((1, 2, 3), keepdims=True)
    got = np.asarray(tiles.tiled(tile, x, tile=8, factor=factor, unit=unit))
    assert got.shape == (1, 20 * factor, 26 * factor, 1)
    for axis in (1, 2):
        assert 0 < np.abs(np.diff(got, axis=axis)).max() <= np.ptp(got) / blended * (1 + 1e-4)


def test_a_picture_within_a_tile_is_decoded_as_a_whole(large):
    decode, latent, _, _ = large
    part = latent[:, :8, :6]
    got = tiles.tiled(decode, part, tile=8, factor=4)
    assert np.array_equal(got, decode(part))


def test_slices_are_the_batch(large, monkeypatch):
    decode, latent, _, whole = large
    got = jax.jit(lambda z: tiles.sliced(decode, z))(latent)
    assert distance(got, np.asarray(whole)) < 1e-5
    rows = np.arange(12.0).reshape(6, 1, 2)
    # Three parts of a batch have a picture each at a time. Four do not divide six pictures.
    with sharding.Layout({"data": 3, "tensor": 2}, devices=6).context():
        assert sharding.free_parts() == 3
    for parts, at_once in ((3, 3), (4, 1)):
        monkeypatch.setattr(sharding, "free_parts", lambda n=parts: n)
        seen = []
        several = tiles.sliced(lambda x, seen=seen: seen.append(len(x)) or 2 * x, rows)
        np.testing.assert_array_equal(several, 2 * rows)
        assert {*seen} == {at_once}
