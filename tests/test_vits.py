"""Image transformers against what transformers and torch compute; pictures on their way to them.

Stored results need no torch; where it is importable, it computes them again, and with
--update-golden stores them.
"""

import functools
import io
import json
import math

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from t2i_jax import errors
from t2i_jax.models import clip as clip_models
from t2i_jax.models.types import Features
from t2i_jax.pretrained import clip, dino, opener, text_encoder, vit
from t2i_jax.quality import captions, resize, retrieval
from tests import test_text_families as families

GOLDEN = families.GOLDEN / "vits.json"
KIND = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, patch_size=4)
CLIP = KIND | dict(image_size=14, intermediate_size=40, projection_dim=10)
DINO = KIND | dict(image_size=12, mlp_ratio=2)
SIDES = ((12, 12), (8, 20))  # learned by DINO, and 2 × 5 patches in place of 3 × 3
CASES = {  # name -> torch's class, its config, sides of pictures
    "clip": ("CLIPVisionModel", CLIP | dict(hidden_act="gelu"), [(14, 14)]),
    "clip, projected": ("CLIPVisionModelWithProjection", CLIP, [(14, 14)]),
    "clip, both towers": ("CLIPModel", CLIP, [(14, 14)]),
    "dino": ("Dinov2Model", DINO, SIDES),
    "dino, gated": ("Dinov2Model", DINO | dict(use_swiglu_ffn=True), SIDES[:1]),
    "dino with a head": ("Dinov2ForImageClassification", DINO, SIDES[:1]),
    "dino, registers": ("Dinov2WithRegistersModel", DINO | dict(num_register_tokens=3), SIDES),
}
CLOSE = 1e-5  # of the largest number


def picture(height, width):
    """Two pictures in [-1, 1]."""
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def torch_model(case):
    transformers = pytest.importorskip("transformers")
    name, options, _ = CASES[case]
    if name == "CLIPModel":
        text, projected = families.CLIP, dict(projection_dim=options["projection_dim"])
        config = transformers.CLIPConfig(text_config=text, vision_config=options, **projected)
    else:
        config = getattr(transformers, name).config_class(**options)
    return getattr(transformers, name)(config)


def by_torch(case, folder):
    """Saves a network as transformers does, gives it our numbers; what it then computes."""
    torch = pytest.importorskip("torch")
    model = torch_model(case)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    shapes = {name: x.shape for name, x in saved.items()}
    families.write(folder, config, shapes)
    model = type(model).from_pretrained(folder).eval()
    family, want = clip if "clip" in case else dino, {}
    inner = getattr(model, "vision_model", getattr(model, "dinov2", model))
    project = getattr(model, "visual_projection", lambda x: x)
    more = {} if family is dino else {"interpolate_pos_encoding": False}
    for height, width in CASES[case][2]:
        pixels = ((picture(height, width) + 1) / 2 - family.MEAN) / family.STD
        pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
        with torch.inference_mode():
            out = inner(pixels, output_hidden_states=True, **more)
            states = [x.numpy() for x in out.hidden_states]
            if family is dino:
                states.append(out.last_hidden_state.numpy())
            want |= {f"{height}x{width}_state_{i}": x for i, x in enumerate(states)}
            want[f"{height}x{width}_pooled"] = project(out.pooler_output).numpy()
    return config, shapes, want


def by_golden(case, folder):
    stored = json.loads(GOLDEN.read_text())[case]
    families.write(folder, stored["config"], stored["shapes"])
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        return {k.split("/")[1]: v for k, v in arrays.items() if k.split("/")[0] == case}


def update(case, config, shapes, want):
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps(stored | {case: {"config": config, "shapes": shapes}}, indent=1))
    path = GOLDEN.with_suffix(".npz")
    arrays = dict(np.load(path)) if path.exists() else {}
    np.savez_compressed(path, **arrays | {f"{case}/{k}": v for k, v in want.items()})


@pytest.fixture(scope="module", params=CASES)
def stored(request, tmp_path_factory):
    """A case, its folder, and what torch computed with it, as it was stored."""
    folder = tmp_path_factory.mktemp("vit")
    return request.param, folder, by_golden(request.param, folder)


@pytest.fixture(scope="module", params=CASES)
def computed(request, tmp_path_factory, update_golden):
    """A case, its folder, and what torch computes with it now."""
    folder = tmp_path_factory.mktemp("vit")
    config, shapes, want = by_torch(request.param, folder)
    if update_golden:
        update(request.param, config, shapes, want)
    return request.param, folder, want


@functools.cache
def network(source, *, scaled=False, **changes):
    net = opener.open(source).module(Features).clone(**changes)
    image = jax.ShapeDtypeStruct((1, net.res, net.res, 3), "float32")
    net = clip_models.Image(net) if scaled else net
    return net, opener.load(source, jax.eval_shape(net.init, jax.random.key(0), image))


def compute(source, image_BHWC, **changes):
    """States and Features."""
    net, variables = network(str(source), **changes)
    both = lambda v, x: (net.apply(v, x, method="states"), net.apply(v, x))
    return jax.jit(both)(variables, image_BHWC)


def check(case, folder, want):
    for height, width in CASES[case][2]:
        states, got = compute(folder, picture(height, width))
        theirs = [want[f"{height}x{width}_state_{i}"] for i in range(len(states))]
        pairs = [
            *zip(states, theirs, strict=True),
            (got.pooled_BD, want[f"{height}x{width}_pooled"]),
        ]
        for ours, other in pairs:
            assert ours.shape == other.shape
            np.testing.assert_allclose(ours, other, atol=CLOSE * np.abs(other).max(), rtol=0)
        rows, columns = height // 4, width // 4
        patches = np.asarray(theirs[-1])[:, -rows * columns :].reshape(2, rows, columns, -1)
        scale = CLOSE * np.abs(patches).max()
        np.testing.assert_allclose(got.maps[0], patches, atol=scale, rtol=0)


def test_every_layer_is_what_torch_computed(stored):
    check(*stored)


def test_every_layer_is_what_torch_computes(computed):
    check(*computed)


@pytest.mark.parametrize("case", ["clip", "dino, gated"])
def test_bfloat16_is_near(tmp_path, case):
    want = by_golden(case, tmp_path)
    height, width = CASES[case][2][0]
    _, got = compute(tmp_path, picture(height, width), dtype="bfloat16")
    exact = want[f"{height}x{width}_pooled"]
    assert got.pooled_BD.dtype == "bfloat16"
    assert np.abs(got.pooled_BD.astype("float32") - exact).mean() <= 3e-2 * np.abs(exact).mean()


def test_both_towers_of_one_checkpoint_give_torchs_logits(tmp_path):
    torch = pytest.importorskip("torch")
    by_torch("clip, both towers", tmp_path)
    model = type(torch_model("clip, both towers")).from_pretrained(tmp_path).eval()
    text_BL, mask_BL = families.batch()
    image_BHWC = picture(14, 14)
    pixels = ((image_BHWC + 1) / 2 - clip.MEAN) / clip.STD
    with torch.inference_mode():
        want = model(
            input_ids=torch.tensor(np.where(mask_BL, text_BL, 0)).long(),
            attention_mask=torch.tensor(mask_BL).long(),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        ).logits_per_image.numpy()
    net = text_encoder.make(str(tmp_path))
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    text = net.apply(opener.load(str(tmp_path), shapes), text_BL, mask_BL)
    _, image = compute(tmp_path, image_BHWC)
    with_scale, variables = network(str(tmp_path), scaled=True)
    scale, _ = with_scale.apply(variables, method="temper")
    got = scale * captions.cosines(image.pooled_BD, text.pooled_BD)
    np.testing.assert_allclose(got, want, atol=CLOSE, rtol=0)


def test_a_checkpoint_of_one_tower_has_no_logit_scale(tmp_path):
    by_golden("clip", tmp_path)
    with pytest.raises(errors.DataError, match=r"logit_scale: want \(1,\), found none"):
        network(str(tmp_path), scaled=True)


@pytest.mark.parametrize(("case", "family"), [("clip", clip), ("dino", dino)])
def test_the_preprocessors_mean_and_std_are_used(tmp_path, case, family):
    by_golden(case, tmp_path)
    size = CASES[case][1]["image_size"]
    image_BHWC = picture(size, size)
    _, want = compute(tmp_path, image_BHWC)
    other = tmp_path / "other"
    other.mkdir()
    by_golden(case, other)
    half = dict(image_mean=[0.5] * 3, image_std=[0.5, 0.5, 0.25])
    (other / vit.PREPROCESSOR).write_text(json.dumps(half))
    pixels = ((image_BHWC + 1) / 2 - family.MEAN) / family.STD * [1, 1, 0.5]
    _, got = compute(other, pixels.astype(np.float32))
    np.testing.assert_allclose(got.pooled_BD, want.pooled_BD, atol=1e-5, rtol=1e-5)


def test_dino_is_made_for_the_preprocessors_crop(tmp_path):
    by_golden("dino", tmp_path)
    assert opener.open(str(tmp_path)).module().res == 12
    for crop in ({"height": 8, "width": 8}, 8):
        (tmp_path / vit.PREPROCESSOR).write_text(json.dumps({"crop_size": crop}))
        assert opener.open(str(tmp_path)).module().res == 8


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        (clip, dict(num_channels=4), "num_channels 4 is not implemented"),
        (clip, dict(hidden_size="24"), "hidden_size is '24'"),
        (clip, dict(image_size=[14, 14]), "image_size is"),
        (clip, dict(hidden_act="swish"), "activation 'swish' is not implemented"),
        (clip, dict(num_attention_heads=5), "no multiple of its 5 heads"),
        (clip, dict(patch_size=16), "shorter than a patch"),
        (clip, dict(preprocessor=dict(image_mean=[0.5])), r"image_mean is \[0.5\]"),
        (clip, dict(preprocessor=dict(image_std=[1, 0, 1])), "image_std is"),
        (dino, dict(qkv_bias=False), "qkv_bias False is not implemented"),
        (dino, dict(mlp_ratio=0), "mlp_ratio is 0"),
        (dino, dict(use_swiglu_ffn="no"), "use_swiglu_ffn is 'no'"),
        (dino, dict(preprocessor=dict(crop_size=13)), "res is 13"),
        (dino, dict(preprocessor=dict(crop_size={"shortest_edge": 8})), "res is None"),
    ],
)
def test_configs_that_ask_for_something_else_are_errors(family, change, match):
    kind = CLIP if family is clip else DINO
    config = dict(model_type=family.KINDS[-1]) | kind | change
    with pytest.raises(errors.ConfigError, match=match):
        family.from_config(config)


@pytest.mark.parametrize(("case", "sides"), [("clip", (12, 12)), ("dino", (12, 14))])
def test_pictures_of_another_side_are_errors(tmp_path, case, sides):
    by_golden(case, tmp_path)
    with pytest.raises(errors.ConfigError, match=f"{sides[0]} × {sides[1]} × 3"):
        compute(tmp_path, picture(*sides))


def test_weights_that_the_config_does_not_describe_are_errors(tmp_path):
    by_golden("clip, projected", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["CLIPVisionModel"]})
    )
    with pytest.raises(errors.DataError, match=r"visual_projection\.weight: want none"):
        compute(tmp_path, picture(14, 14))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("n", "out"), [(37, 16), (16, 37), (16, 17), (3, 2), (1, 4), (5, 1)])
def test_cubic_weights_are_torchs(n, out, antialias):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.tensor(x)[None, None], (out, out), mode="bicubic", antialias=antialias
    )[0, 0]
    weight = vit.cubic(out, n, antialias=antialias)
    np.testing.assert_allclose(weight @ x @ weight.T, want, atol=2e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_cubic_weights_keep_constants_and_sides(antialias):
    np.testing.assert_allclose(vit.cubic(7, 7, antialias=antialias), np.eye(7), atol=1e-7)
    np.testing.assert_allclose(vit.cubic(5, 9, antialias=antialias).sum(1), 1, atol=1e-6)


def noise(h, w):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)


SHAPES = [(16, 16), (33, 57), (300, 20), (1, 1), (5, 400)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorchs_rule_is_torchs_interpolation(shape):
    torch = pytest.importorskip("torch")
    image_HWC = noise(*shape)
    want = torch.nn.functional.interpolate(
        torch.tensor(image_HWC.transpose(2, 0, 1)[None]).float(),
        (29, 29),
        mode="bilinear",
        align_corners=False,
    )[0].numpy()
    got = resize.resize(image_HWC, 29, "legacy_pytorch")
    np.testing.assert_allclose(got, want.transpose(1, 2, 0), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_clean_rule_is_clean_fids(shape):
    cleanfid = pytest.importorskip("cleanfid.resize")
    image_HWC = noise(*shape)
    want = cleanfid.make_resizer("PIL", False, "bicubic", (29, 29))(image_HWC)
    np.testing.assert_array_equal(resize.resize(image_HWC, 29), want)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("legacy_tensorflow", [0, 50, 100, 100]),  # each at its upper left corner
        ("legacy_pytorch", [0, 25, 75, 100]),
    ],
)
def test_bilinear_rules_by_hand(rule, wanted):
    across_HWC = np.array([[0, 100], [0, 100]], np.uint8)[..., None]
    across_HW = np.broadcast_to(wanted, (4, 4))
    got = resize.resize(across_HWC, 4, rule)[..., 0]
    np.testing.assert_array_equal(got, across_HW)
    got = resize.resize(across_HWC.swapaxes(0, 1), 4, rule)[..., 0]
    np.testing.assert_array_equal(got, across_HW.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_clean_rule_is_antialiased_cubic_convolution(shape):
    image_HWC = noise(*shape)
    rows, columns = (vit.cubic(29, n, antialias=True) for n in shape)
    want = np.einsum("oi,pj,ijc->opc", rows, columns, image_HWC.astype(np.float64))
    np.testing.assert_allclose(resize.resize(image_HWC, 29), want.clip(0, 255), atol=1e-3)


def test_bilinear_rules_skip_pixels_and_the_clean_one_does_not():
    image_HWC = np.zeros((64, 64, 3), np.uint8)
    image_HWC[::2] = 255
    assert np.ptp(resize.resize(image_HWC, 8, "legacy_tensorflow")) == 0
    assert resize.resize(image_HWC, 8, "legacy_tensorflow").mean() == 255
    assert abs(resize.resize(image_HWC, 8).mean() - 127.5) < 3


def test_the_clean_rule_is_neither_rounded_nor_beyond_its_range():
    image_HWC = np.zeros((4, 4, 3), np.uint8)
    image_HWC[:, 2:] = 255
    got = resize.resize(image_HWC, 31)
    assert (got.shape, got.dtype) == ((31, 31, 3), np.float32)
    assert (got.min(), got.max()) == (0, 255)
    assert (got % 1).any()


@pytest.mark.parametrize("rule", resize.RULES)
def test_rules_keep_constants_and_channels(rule):
    image_HWC = np.broadcast_to(np.array([7, 100, 255], np.uint8), (13, 40, 3))
    np.testing.assert_allclose(
        resize.resize(image_HWC, 9, rule), np.broadcast_to([7, 100, 255], (9, 9, 3)), atol=1e-4
    )


def test_what_cannot_be_resized_is_an_error():
    with pytest.raises(errors.ConfigError, match="did you mean 'clean'"):
        resize.resize(noise(2, 2), 2, "cleen")
    for image in (noise(2, 2)[..., 0], noise(2, 2) / 255, noise(2, 2)[:0]):
        with pytest.raises(errors.DataError, match="a picture is"):
            resize.resize(image, 2)


def animation():
    frames = [Image.new("RGB", (1, 1), colour) for colour in ("red", "lime")]
    data = io.BytesIO()
    frames[0].save(data, "PNG", save_all=True, append_images=frames[1:])
    return data.getvalue()


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (encoded(Image.new("L", (1, 1), 64)), (64, 64, 64)),
        (encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((1, 1), 255, np.uint16))), (1, 1, 1)),
        (encoded(Image.fromarray(np.full((1, 1), 65535, np.uint16))), (255, 255, 255)),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        (encoded(Image.new("RGB", (1, 1), "blue").convert("P")), (0, 0, 255)),
        (animation(), (255, 0, 0)),
    ],
)
def test_odd_files_become_the_documented_rgb(tmp_path, data, wanted):
    (tmp_path / "x.png").write_bytes(data)
    image_HWC = resize.load(tmp_path / "x.png")
    assert image_HWC.dtype == np.uint8
    assert image_HWC.tolist() == [[list(wanted)]]


def test_files_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(2, 5)).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(resize.load(tmp_path / "x.png"), np.rot90(noise(2, 5), -1))


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "gif", "large", "none"])
def test_broken_files_are_errors_with_their_names(tmp_path, kind):
    path = tmp_path / "x.png"
    data = {
        "cut": encoded(Image.fromarray(noise(40, 40)))[:-900],
        "empty": b"",
        "text": b"no picture",
        "gif": encoded(Image.new("L", (1, 1)), "GIF"),
        "large": encoded(Image.new("1", (20_001, 1))),
    }
    if kind in data:
        path.write_bytes(data[kind])
    with pytest.raises(errors.DataError, match="no picture can be read") as caught:
        resize.load(path)
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_clip_score_of_known_angles():
    image_ND = np.array([[3.0, 0], [0, 2], [1, 0], [1, 1]])
    text_ND = np.array([[5.0, 0], [0, -1], [0, 1], [1, 0]])
    want = 100 * (1 + 0 + 0 + math.sqrt(0.5)) / 4  # an opposite counts as none
    assert captions.clip_score(image_ND, text_ND) == pytest.approx(want)


def test_cosines_feed_retrieval():
    text_ND = np.random.default_rng(0).normal(size=(20, 8))
    similarity_NN = captions.cosines(3 * text_ND, text_ND)
    np.testing.assert_allclose(np.diag(similarity_NN), 1)
    assert retrieval.r_precision(similarity_NN, candidates=10) == 1
    assert captions.clip_score(3 * text_ND, text_ND) == pytest.approx(100)


def test_clip_score_wants_pairs_with_a_direction():
    x_ND = np.ones((3, 2))
    with pytest.raises(errors.DataError, match="3 pictures and 2 captions"):
        captions.clip_score(x_ND, x_ND[:2])
    with pytest.raises(errors.DataError, match="text features have length 0, first in row 1"):
        captions.clip_score(x_ND, x_ND * [[1], [0], [1]])
    with pytest.raises(errors.DataError, match="unequal widths"):
        captions.cosines(x_ND, x_ND[:, :1])
