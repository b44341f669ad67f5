"""Image networks against torch, pictures a core-second: batches of 16, channels last.

python -m benchmarks.extractors [inception] [efficientnet_lite0] [clip] [dino] [--check]

inception          pytorch-fid's, which needs torchvision: T2I_BENCH_PEER names the Python of an
                   environment with torch, torchvision and pytorch-fid, such as that of
                   tests/make_vision_goldens.py
efficientnet_lite0 of the PyPI package efficientnet-lite-pytorch (pip install --no-deps)
clip, dino         transformers' ViT-B/32 and DINOv2 ViT-S/14, with fused attention (SDPA)

Parity: pooled features.
"""

import functools
import json
import os
import pathlib
import sys

import numpy as np

from benchmarks import harness
from tests import make_vision_goldens as rule

BATCH = 2 if harness.CHECK else 16
SIZES = {"num_hidden_layers": 1} if harness.CHECK else {}
SIDES = {"inception": 299, "efficientnet_lite0": 224, "clip": 224, "dino": 224}
TYPES = {"inception": "inception_v3_fid", "efficientnet_lite0": "efficientnet_lite0"}
MEAN = {"clip": (0.48145466, 0.4578275, 0.40821073), "dino": (0.485, 0.456, 0.406)}
NEEDS = {"inception": "torchvision", "efficientnet_lite0": "efficientnet_lite_pytorch"}
STD = {"clip": (0.26862954, 0.26130258, 0.27577711), "dino": (0.229, 0.224, 0.225)}


def pictures(case: str) -> np.ndarray:
    """In [-1, 1]."""
    side = SIDES[case]
    noise = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3))
    return (noise / 127.5 - 1).astype(np.float32)


def network(case: str):
    """torch's network, and a function of it and its input that gives pooled features."""
    if case == "inception":
        from pytorch_fid import inception

        net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        return net, lambda net, x: net(x)[0].flatten(1)
    if case == "efficientnet_lite0":
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        return net, lambda net, x: net._avg_pooling(net.extract_features(x)).flatten(1)
    import transformers

    if case == "clip":
        config = transformers.CLIPVisionConfig(patch_size=32, **SIZES)
        net = transformers.CLIPVisionModelWithProjection._from_config(
            config, attn_implementation="sdpa"
        )
        return net, lambda net, x: net(x).image_embeds
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, **SIZES
    )
    net = transformers.Dinov2Model._from_config(config, attn_implementation="sdpa")
    return net, lambda net, x: net(x).pooler_output


def inputs(case: str) -> np.ndarray:
    """What the peer reads, as its network normalises it."""
    x = pictures(case) * 127.5 + 127.5
    if case in MEAN:
        return (x / 255 - MEAN[case]) / STD[case]
    return (x - (128 if case == "inception" else 127)) / 128


def weights(case: str, folder: pathlib.Path) -> None:
    """The network's files as its library saves them."""
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    net, _ = network(case)
    if case in TYPES:
        shapes = {name: list(x.shape) for name, x in net.state_dict().items()}
        state = {name: torch.from_numpy(np.array(x)) for name, x in rule.weights(shapes).items()}
        safetensors.torch.save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": TYPES[case]}))
    else:
        net.save_pretrained(folder)
        preprocessor = {"image_mean": MEAN[case], "image_std": STD[case]}
        crop = {"crop_size": {"height": SIDES[case], "width": SIDES[case]}}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | crop))


def peer(case: str, folder: pathlib.Path) -> None:
    import safetensors.torch
    import torch

    torch.set_num_threads(harness.THREADS)
    net, pooled = network(case)
    if case in TYPES:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        net.load_state_dict(state)
    else:
        net = type(net).from_pretrained(folder, attn_implementation="sdpa")
    if case == "inception":
        from pytorch_fid import inception

        inception.load_state_dict_from_url = lambda *_, **__: state
        net = inception.InceptionV3([3], resize_input=False, normalize_input=False)
    net.eval().to(memory_format=torch.channels_last)
    x = torch.from_numpy(inputs(case).transpose(0, 3, 1, 2).astype(np.float32))
    x = x.to(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            return pooled(net, x)

    np.savez(folder / "peer.npz", pooled=run().numpy())
    harness.serve(run, "torch")


def ours(case: str, folder: pathlib.Path) -> None:
    import jax

    from t2i_jax.commands import plan
    from t2i_jax.pretrained import opener

    net = opener.open(str(folder)).module()
    image_BHWC = jax.device_put(pictures(case))
    shapes = jax.eval_shape(net.init, jax.random.key(0), image_BHWC[:1])
    variables = jax.device_put(opener.load(str(folder), shapes))
    pooled = jax.jit(lambda v, x: net.apply(v, x).pooled_BD)
    np.savez(folder / "ours.npz", pooled=pooled(variables, image_BHWC))
    products = plan.flops(jax.make_jaxpr(pooled)(variables, image_BHWC))
    harness.serve(lambda: pooled(variables, image_BHWC), "jax", flops=products)


def against(case: str):
    name, python = f"extractors/{case}", sys.executable
    if case == "inception":
        python = os.environ.get("T2I_BENCH_PEER", python)
    if python == sys.executable and case in NEEDS and harness.lacks(NEEDS[case], name):
        return
    arms = ("ours", case), ("peer", case)
    yield harness.Case(name, *arms, BATCH, ("weights", case), python=python)


ARMS = {"weights": weights, "ours": ours, "peer": peer}
PARTS = {case: functools.partial(against, case) for case in SIDES}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
