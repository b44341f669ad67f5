"""The U-net of latent diffusion equals diffusers', on random networks that it saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import errors
from t2i_jax.models.types import Cond, Output
from t2i_jax.pretrained import opener, unet_condition

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
folders = pytest.importorskip("tests.folders")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

CLOSE = 1e-4  # of the largest number
LENGTH, WIDTH, POOLED, SINUSOIDS = 5, 10, 6, 8
THREE = dict(
    block_out_channels=(8, 12, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
)
SDXL = THREE | dict(
    attention_head_dim=(2, 3, 5),
    transformer_layers_per_block=(1, 1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=SINUSOIDS,
    projection_class_embeddings_input_dim=POOLED + 6 * SINUSOIDS,
)
CASES = {  # name -> diffusers' sizes, height and width of the latents
    "SD 1": (dict(layers_per_block=2), (6, 8)),
    "SD 2": (dict(use_linear_projection=True, attention_head_dim=(2, 3)), (8, 6)),
    "SDXL": (SDXL, (8, 12)),
    "SDXL, layers as a loop": (SDXL, (8, 12)),
    "inpainting, odd sides": (THREE | dict(in_channels=9), (7, 10)),
    "two pictures, one pixel high, other times": (
        dict(in_channels=8, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-3),
        (1, 6),
    ),
}
# SDXL's has the heads and the projections of the second version.
PARAMS = [pytest.param(x, marks=[pytest.mark.slow] * (x == "SD 2")) for x in CASES]


def save(folder, **sizes):
    """A random network of diffusers in `folder`, whose parameters are all different."""
    torch.manual_seed(0)
    net = folders.unet(WIDTH, **sizes)
    with torch.no_grad():
        for parameter in net.parameters():  # norms would else be 1 and 0, which hides mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    net.save_pretrained(folder)
    return net


def inputs(channels, sides, numbers=False):
    """Latents, times and conditions of two examples."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    cond = Cond(normal(2, LENGTH, WIDTH), np.ones((2, LENGTH), bool), normal(2, POOLED))
    if numbers:
        cond = cond._replace(numbers_BK=rng.integers(0, 1024, (2, 6)).astype(np.float32))
    return normal(2, *sides, channels), np.float32([3, 801]), cond


def by_torch(net, z_BHWC, t_B, cond):
    """What diffusers computes: BCHW, with a graph for its gradients."""
    added = None
    if cond.numbers_BK is not None:
        added = {"text_embeds": cond.pooled_BD, "time_ids": cond.numbers_BK}
        added = {name: torch.from_numpy(x) for name, x in added.items()}
    z_BCHW = torch.from_numpy(z_BHWC.transpose(0, 3, 1, 2).copy())
    text_BSD = torch.from_numpy(cond.seq_BLD)
    return net(z_BCHW, torch.from_numpy(t_B), text_BSD, added_cond_kwargs=added).sample


def opened(folder, data, **options):
    """Our module of a folder, and its variables."""
    checkpoint = opener.open(str(folder))
    module = checkpoint.module(Output, **options)
    return module, checkpoint.load(jax.eval_shape(module.init, jax.random.key(0), *data))


def near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=CLOSE * np.abs(theirs).max(), rtol=0)


@pytest.fixture(scope="module", params=PARAMS)
def case(request, tmp_path_factory):
    """Diffusers' network, its inputs, our module, variables and output."""
    sizes, sides = CASES[request.param]
    folder = tmp_path_factory.mktemp("unet")
    net = save(folder, **sizes)
    data = inputs(net.config.in_channels, sides, "addition_embed_type" in sizes)
    module, variables = opened(folder, data, scan="loop" in request.param)
    return net, data, module, variables, jax.jit(module.apply)(variables, *data)


def test_outputs_are_the_same(case):
    net, data, module, variables, out_BHWC = case
    assert out_BHWC.shape == (*data[0].shape[:3], 4)
    assert out_BHWC.dtype == jnp.float32
    assert (module.channels, module.unit) == (net.config.in_channels, 1)
    assert ("transformer_blocks_0to1" in str(jax.tree.structure(variables))) == module.scan
    with torch.inference_mode():
        near(out_BHWC, by_torch(net, *data).numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_linear_projection": "false"}, "use_linear_projection is 'false'"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos is 1"),
        ({"freq_shift": "0"}, "freq_shift is '0'"),
        ({"freq_shift": -1}, "freq_shift is -1"),
        ({"addition_embed_type": "text_time"}, "without addition_time_embed_dim"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"down_block_types": ["DownBlock2D"]}, "1 down_block_types of 4 blocks"),
        ({"attention_head_dim": 7}, "320 channels for 7 heads"),
    ],
)
def test_senseless_configs_are_refused(change, message):
    with pytest.raises(errors.ConfigError, match=message):
        unet_condition.from_config(change)


def test_null_is_the_default():
    fields = ("freq_shift", "use_linear_projection", "flip_sin_to_cos", "up_block_types")
    assert unet_condition.from_config(dict.fromkeys(fields)) == unet_condition.from_config({})
