"""What pytorch-fid, torch-fidelity, lpips and efficientnet_lite_pytorch say, to test without them.

python -m tests.make_vision_goldens      (rewrites tests/goldens/vision.npz)

in an environment of its own, as torchvision does not import beside the CPU build of torch:

pip install torch==2.14.1 torchvision==0.29.1 pytorch-fid==0.3.0 torch-fidelity==0.4.0 lpips==0.1.4
pip install --no-deps efficientnet-lite-pytorch==0.1.0

Weights and pictures are drawn by name, so only what the networks make of them is stored.
"""

import json
import pathlib
import zlib

import numpy as np

PATH = pathlib.Path(__file__).parent / "goldens/vision.npz"
SIDES = {"inception": 299, "efficientnet": 96, "lpips": 32}
STRIDE = {"inception": 61, "efficientnet": 7, "lpips": 17}  # of the values of maps that are stored


def weights(shapes: dict) -> dict:
    """Name and shape of every tensor of a state dict -> values that make each of them count."""
    return {name: _draw(name, tuple(shape)) for name, shape in shapes.items()}


def pictures(name: str) -> np.ndarray:
    """Two that differ, of coarse and of fine structure: uint8 (2, side, side, 3)."""
    side, rng = SIDES[name], np.random.default_rng(1)
    coarse = np.repeat(np.repeat(rng.uniform(0, 255, (2, 5, 5, 3)), 64, 1), 64, 2)
    fine = rng.uniform(0, 255, (2, side, side, 3))
    return (0.6 * coarse[:, :side, :side] + 0.4 * fine).astype(np.uint8)


def thinned(kind: str, values):
    """Those of a map's values that are stored."""
    return values[:: STRIDE[kind] * max(1, len(values) // 500_000)]


def _draw(name, shape):
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("running_var"):
        return np.exp(0.5 * noise)
    if name.startswith("lin"):  # of LPIPS: at least 0
        return np.abs(noise)
    if len(shape) > 1:
        return noise * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return 0.2 * noise + (1 if name.endswith("weight") else 0)


def _load(torch, net, state):
    net.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state.items()})
    return net.eval()


def _inception(torch):
    import tempfile

    from pytorch_fid import inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    shapes = {name: list(x.shape) for name, x in net.state_dict().items()}
    state = {name: torch.from_numpy(np.array(x)) for name, x in weights(shapes).items()}
    inception.load_state_dict_from_url = lambda *_, **__: state
    net = inception.InceptionV3(range(4), resize_input=False, normalize_input=False).eval()
    uint8 = torch.from_numpy(pictures("inception").transpose(0, 3, 1, 2).copy())
    found = {}
    net.blocks[2][6].register_forward_hook(lambda *a: found.update(spatial=a[2][:, :7]))  # Mixed_6d
    net.blocks[3][2].register_forward_hook(lambda *a: found.update(last=a[2]))  # Mixed_7c
    *maps, pooled = net((uint8.float() - 128) / 128)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        asked = ["2048", "logits_unbiased"]
        peer = FeatureExtractorInceptionV3("peer", asked, feature_extractor_weights_path=file.name)
    pooled_of_peer, logits = peer(uint8)
    torch.testing.assert_close(pooled[..., 0, 0], pooled_of_peer)
    spatial = found["spatial"].permute(0, 2, 3, 1).flatten(1)
    given = dict(pooled=pooled[..., 0, 0], logits=logits, spatial=spatial)
    return shapes, given, [*maps, found["last"]]


def _efficientnet(torch):
    from efficientnet_lite_pytorch import EfficientNet

    side = SIDES["efficientnet"]
    net = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    shapes = {name: list(x.shape) for name, x in net.state_dict().items()}
    _load(torch, net, weights(shapes))
    maps = []
    for i in (2, 4, 10, 15):  # the last blocks at strides 4, 8, 16 and 32
        net._blocks[i].register_forward_hook(lambda *a: maps.append(a[2]))
    pooled = []
    net._avg_pooling.register_forward_hook(lambda *a: pooled.append(a[2][..., 0, 0]))
    uint8 = pictures("efficientnet").transpose(0, 3, 1, 2)
    logits = net(torch.from_numpy((uint8.astype(np.float32) - 127) / 128))
    return shapes, dict(pooled=pooled[0], logits=logits), maps


def _lpips(torch):
    import lpips

    net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs = {}  # name of ours -> name within LPIPS, which cuts the features into slices
    for name in net.state_dict():
        if name.startswith("net."):
            theirs["features." + name.split(".", 2)[2]] = name
        elif name[3].isdigit():  # not of `lins`, the same again
            theirs[name] = name
    shapes = {ours: list(net.state_dict()[name].shape) for ours, name in theirs.items()}
    state = {theirs[name]: torch.from_numpy(x) for name, x in weights(shapes).items()}
    assert not net.load_state_dict(state, strict=False).unexpected_keys
    image = torch.from_numpy(pictures("lpips").transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    maps = list(net.net(net.scaling_layer(image)))
    distance = net(image, image.flip(0) * 0.5)[:, 0, 0, 0]
    pair = net(image[:1], image[1:])[0, 0, 0, 0]
    return shapes, dict(distance=distance, pair=pair), maps


if __name__ == "__main__":
    import torch

    torch.set_grad_enabled(False)
    out = {}
    for kind, oracle in (
        ("inception", _inception),
        ("efficientnet", _efficientnet),
        ("lpips", _lpips),
    ):
        shapes, given, maps = oracle(torch)
        out[f"{kind}_shapes"] = np.array(json.dumps(shapes))
        out |= {f"{kind}_{name}": x.numpy() for name, x in given.items()}
        for i, x in enumerate(maps):
            values = x.permute(0, 2, 3, 1).flatten()
            out[f"{kind}_map{i}_size"] = np.array(len(values))
            out[f"{kind}_map{i}"] = thinned(kind, values.numpy())
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **out)
    for name, x in out.items():
        if x.dtype.kind == "f":
            print(name, x.shape, f"|x| {np.abs(x).mean():.3g} … {np.abs(x).max():.3g}")
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
