"""Pretrained diffusion transformers equal diffusers' own at tiny odd sizes, and so do gradients."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from t2i_jax import errors
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import opener

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

CLOSE = 1e-4  # of the largest number
LENGTH, TEXT, POOLED = 7, 10, 9
PIXART = dict(
    sample_size=10,
    num_layers=2,
    patch_size=2,
    num_attention_heads=3,
    attention_head_dim=4,
    in_channels=3,
    out_channels=6,
    cross_attention_dim=12,
    caption_channels=TEXT,
    use_additional_conditions=False,
)
SD3 = dict(
    sample_size=10,
    patch_size=2,
    in_channels=3,
    out_channels=3,
    num_layers=3,
    attention_head_dim=4,
    num_attention_heads=3,
    joint_attention_dim=TEXT,
    caption_projection_dim=12,
    pooled_projection_dim=POOLED,
    pos_embed_max_size=7,
)
FLUX = dict(
    in_channels=12,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=3,
    joint_attention_dim=TEXT,
    pooled_projection_dim=POOLED,
    axes_dims_rope=(2, 6, 4),
)
CASES = {
    "pixart α": ("PixArtTransformer2DModel", PIXART | dict(use_additional_conditions=True)),
    "pixart σ": ("PixArtTransformer2DModel", PIXART | dict(interpolation_scale=2, patch_size=1)),
    "sd 3": ("SD3Transformer2DModel", SD3),
    "sd 3.5": (
        "SD3Transformer2DModel",
        SD3 | dict(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    ),
    "flux schnell": ("FluxTransformer2DModel", FLUX),
    "flux dev": ("FluxTransformer2DModel", FLUX | dict(guidance_embeds=True)),
}
HEIGHT, WIDTH, CHANNELS = 6, 10, 3


class Case(NamedTuple):
    """Torch's network in a folder, what both are given, and what torch makes of it.

    grads: a folder with the gradients of sum(weight · out) in place of the weights.
    """

    folder: str
    grads: str
    inputs: tuple
    weight_BHWC: np.ndarray
    out_BHWC: np.ndarray


def inputs(kind):
    """A batch of two with captions of two lengths; numbers as the kind of network reads them."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    numbers = [[512.0, 768, 512 / 768], [96, 64, 1.5]]
    cond = Cond(
        normal(2, LENGTH, TEXT),
        np.arange(LENGTH) < np.array([[4], [LENGTH]]),
        normal(2, POOLED),
        np.float32([[3.5], [1.25]] if kind.startswith("Flux") else numbers),
    )
    return normal(2, HEIGHT, WIDTH, CHANNELS), np.float32([831.0, 17.0]), cond


def of_torch(net, z_BHWC, t_B, cond):
    """Torch's output as BCHW, of the first channels."""
    tensor = torch.from_numpy
    z_BCHW, t_B = tensor(z_BHWC.transpose(0, 3, 1, 2).copy()), tensor(t_B)
    seq_BLD, pooled_BD = tensor(cond.seq_BLD), tensor(cond.pooled_BD)
    kind = type(net).__name__
    if kind.startswith("PixArt"):
        numbers_BK = tensor(cond.numbers_BK)
        sizes = {"resolution": numbers_BK[:, :2], "aspect_ratio": numbers_BK[:, 2:]}
        out = net(
            z_BCHW,
            encoder_hidden_states=seq_BLD,
            timestep=t_B,
            added_cond_kwargs=sizes,
            encoder_attention_mask=tensor(cond.mask_BL),
        ).sample
        return out[:, :CHANNELS]
    if kind.startswith("SD3"):
        return net(z_BCHW, seq_BLD, pooled_BD, t_B).sample
    pipe = diffusers.FluxPipeline
    packed = pipe._pack_latents(z_BCHW, 2, CHANNELS, HEIGHT, WIDTH)
    ids = pipe._prepare_latent_image_ids(2, HEIGHT // 2, WIDTH // 2, "cpu", torch.float32)
    out = net(
        packed,
        seq_BLD,
        pooled_BD,
        timestep=t_B / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(LENGTH, 3),
        guidance=tensor(cond.numbers_BK[:, 0]) if net.config.guidance_embeds else None,
    ).sample
    return pipe._unpack_latents(out, HEIGHT * 8, WIDTH * 8, 8)


def made(name, path) -> Case:
    kind, config = CASES[name]
    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**config).eval()
    with torch.no_grad():  # so that norms and tables are not what they start as
        for tensor in net.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    net.save_pretrained(path / "net")
    given = inputs(kind)
    weight_BHWC = np.random.default_rng(1).standard_normal(given[0].shape).astype(np.float32)
    out_BCHW = of_torch(net, *given)
    (out_BCHW * torch.from_numpy(weight_BHWC).permute(0, 3, 1, 2)).sum().backward()
    known = dict(net.named_parameters())
    grad = lambda name, x: known[name].grad if name in known else None
    grads = {
        n: torch.zeros_like(x) if grad(n, x) is None else grad(n, x)
        for n, x in net.state_dict().items()
    }
    (path / "grads").mkdir()
    (path / "grads/config.json").write_text((path / "net/config.json").read_text())
    safetensors_torch.save_file(grads, path / "grads/diffusion_pytorch_model.safetensors")
    out_BHWC = out_BCHW.detach().numpy().transpose(0, 2, 3, 1)
    return Case(str(path / "net"), str(path / "grads"), given, weight_BHWC, out_BHWC)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A function name -> Case, each made once."""
    return functools.cache(lambda name: made(name, tmp_path_factory.mktemp("case")))


def network(case, **options):
    net = opener.open(case.folder).module(**options)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *case.inputs)
    return net, shapes


def run(net, variables, case):
    """The output, as a sampler asks for it, and the gradients of sum(weight · out)."""

    def loss(params, z_BHWC, t_B, cond):
        variables = {"params": params}
        ready = net.apply(variables, cond, method="prepare")
        out_BHWC = net.apply(variables, z_BHWC, t_B, cond, ready)
        return (out_BHWC * case.weight_BHWC).sum(), out_BHWC

    grads, out_BHWC = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], *case.inputs)
    return out_BHWC, grads


def far(a, b):
    """The largest difference, as a share of the largest number of a."""
    return float(np.abs(a - b).max() / np.abs(a).max())


LOOPS = {  # blocks that are one, in all of which those of a kind are neighbours
    "pixart α": {"transformer_blocks_0to1"},
    "sd 3.5": {"transformer_blocks_0to1", "transformer_blocks_2to3", "transformer_blocks_4"},
    "flux dev": {"transformer_blocks_0to1", "single_transformer_blocks_0to1"},
}
# Of FLUX.1's two the one that reads more.
LONG = [pytest.param(x, {}, marks=[pytest.mark.slow] * (x == "flux schnell")) for x in CASES]


@pytest.mark.parametrize(
    ("name", "options"), [*LONG, *((name, dict(scan=True, remat="full")) for name in LOOPS)]
)
def test_outputs_and_gradients_are_torchs(case, name, options):
    """A rectangle, captions of two lengths, keys and values made before the steps."""
    case = case(name)
    net, shapes = network(case, **options)
    assert net.channels == CHANNELS
    if options:
        assert {p for p in shapes["params"] if "transformer_blocks" in p} == LOOPS[name]
    out_BHWC, grads = run(net, opener.load(case.folder, shapes), case)
    assert far(case.out_BHWC, out_BHWC) <= CLOSE
    wanted = opener.load(case.grads, shapes)["params"]
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max() / largest, wanted, grads)
    assert max(jax.tree.leaves(apart)) <= CLOSE


@pytest.mark.parametrize("name", LOOPS)
def test_stacked_blocks_are_written_as_they_were_read(case, name):
    case = case(name)
    shapes = network(case, scan=True)[1]
    variables = opener.load(case.folder, shapes)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    for path, source in opener.open(case.folder).plan(shapes).items():
        for tensor, value in zip(source.tensors, source.apart(flat[path]), strict=True):
            np.testing.assert_array_equal(value, tensor.whole())


@pytest.mark.parametrize("name", LOOPS)
def test_bfloat16_is_near_and_keeps_its_stream_in_float32(case, name):
    case = case(name)
    net, shapes = network(case, dtype="bfloat16")
    variables = opener.load(case.folder, shapes)
    out_BHWC = jax.jit(net.apply)(variables, *case.inputs)
    assert out_BHWC.dtype == jnp.float32
    assert 0 < far(case.out_BHWC, out_BHWC) <= 0.02


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pixart σ", {"norm_type": "layer_norm"}),
        ("pixart σ", {"activation_fn": "geglu"}),
        ("pixart σ", {"attention_bias": False}),
        ("pixart σ", {"patch_size": 0}),
        ("pixart σ", {"out_channels": -6}),
        ("pixart σ", {"interpolation_scale": -1}),
        ("sd 3", {"qk_norm": "layer_norm"}),
        ("sd 3", {"caption_projection_dim": 16}),
        ("sd 3", {"pos_embed_max_size": None}),
        ("sd 3", {"dual_attention_layers": "all"}),
        ("sd 3", {"dual_attention_layers": 2}),
        ("sd 3", {"out_channels": 2.5}),
        ("flux dev", {"patch_size": 2}),
        ("flux dev", {"out_channels": 4}),
        ("flux dev", {"axes_dims_rope": [4, 4, 6]}),
        ("flux dev", {"axes_dims_rope": [3, 5, 4]}),
        ("flux dev", {"in_channels": 10}),
    ],
)
def test_what_is_not_implemented_is_refused(case, tmp_path, name, change):
    kind, config = CASES[name]
    config = {"_class_name": kind} | config | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(errors.ConfigError) as e:
        opener.open(str(tmp_path)).module()
    assert "config.json" in e.value.where


def test_a_picture_beyond_the_stored_places_is_refused(case):
    """Stable Diffusion 3's table has 7 × 7 places here."""
    case = case("sd 3")
    net, shapes = network(case)
    _, t_B, cond = case.inputs
    z_BHWC = jax.ShapeDtypeStruct((2, 16, 4, CHANNELS), "float32")
    with pytest.raises(errors.ConfigError, match="8 × 2 patches"):
        jax.eval_shape(net.apply, shapes, z_BHWC, t_B, cond)
