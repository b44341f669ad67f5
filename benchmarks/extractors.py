"""Image networks against torch, pictures a core-second: batches of 16, channels last.

python -m benchmarks.extractors [--peer_python=PATH] [inception efficientnet_lite0 clip dino]

inception          pytorch-fid's, which needs torchvision: give the Python of an environment with
                   torch, torchvision and pytorch-fid, such as that of tests/make_vision_goldens.py
efficientnet_lite0 of the PyPI package efficientnet-lite-pytorch (pip install --no-deps)
clip, dino         transformers' ViT-B/32 and DINOv2 ViT-S/14, with fused attention (SDPA)

Parity: pooled features.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

from benchmarks import harness
from tests import make_vision_goldens as rule

BATCH = 16
SIDES = {"inception": 299, "efficientnet_lite0": 224, "clip": 224, "dino": 224}
TYPES = {"inception": "inception_v3_fid", "efficientnet_lite0": "efficientnet_lite0"}
MEAN = {"clip": (0.48145466, 0.4578275, 0.40821073), "dino": (0.485, 0.456, 0.406)}
STD = {"clip": (0.26862954, 0.26130258, 0.27577711), "dino": (0.229, 0.224, 0.225)}


def pictures(case: str) -> np.ndarray:
    """In [-1, 1]."""
    side = SIDES[case]
    noise = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3))
    return (noise / 127.5 - 1).astype(np.float32)


def network(case: str):
    """torch's network, and a function of its input that gives pooled features."""
    if case == "inception":
        from pytorch_fid import inception

        net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        return net, None
    if case == "efficientnet_lite0":
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        return net, lambda x: net._avg_pooling(net.extract_features(x)).flatten(1)
    import transformers

    if case == "clip":
        config = transformers.CLIPVisionConfig(patch_size=32)
        net = transformers.CLIPVisionModelWithProjection._from_config(
            config, attn_implementation="sdpa"
        )
        return net, lambda x: net(x).image_embeds
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    net = transformers.Dinov2Model._from_config(config, attn_implementation="sdpa")
    return net, lambda x: net(x).pooler_output


def inputs(case: str) -> np.ndarray:
    """What the peer reads, as its network normalises it."""
    x = pictures(case) * 127.5 + 127.5
    if case in MEAN:
        return (x / 255 - MEAN[case]) / STD[case]
    return (x - (128 if case == "inception" else 127)) / 128


def peer(case: str, folder: pathlib.Path) -> None:
    import safetensors.torch
    import torch

    torch.set_num_threads(harness.THREADS)
    torch.manual_seed(0)
    net, pooled = network(case)
    if case in TYPES:
        shapes = {name: list(x.shape) for name, x in net.state_dict().items()}
        state = {name: torch.from_numpy(np.array(x)) for name, x in rule.weights(shapes).items()}
        net.load_state_dict(state)
        safetensors.torch.save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": TYPES[case]}))
    else:
        net.save_pretrained(folder)
        preprocessor = {"image_mean": MEAN[case], "image_std": STD[case]}
        crop = {"crop_size": {"height": SIDES[case], "width": SIDES[case]}}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | crop))
    if case == "inception":
        from pytorch_fid import inception

        inception.load_state_dict_from_url = lambda *_, **__: state
        net = inception.InceptionV3([3], resize_input=False, normalize_input=False)
        pooled = lambda x: net(x)[0].flatten(1)
    net.eval().to(memory_format=torch.channels_last)
    x = torch.from_numpy(inputs(case).transpose(0, 3, 1, 2).astype(np.float32))
    x = x.to(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            return pooled(x)

    np.savez(folder / "peer.npz", pooled=run().numpy())
    harness.serve({"versions": {"torch": torch.__version__}}, lambda: run() is None or None)


def ours(case: str, folder: pathlib.Path) -> None:
    import jax

    from t2i_jax.vision import encoder

    net = encoder.make(str(folder))
    image_BHWC = jax.device_put(pictures(case))
    shapes = jax.eval_shape(net.init, jax.random.key(0), image_BHWC[:1])
    variables = jax.device_put(encoder.load(str(folder), shapes))
    pooled = jax.jit(lambda v, x: net.apply(v, x).pooled_BD)
    np.savez(folder / "ours.npz", pooled=pooled(variables, image_BHWC))
    run = lambda: jax.block_until_ready(pooled(variables, image_BHWC)) is None or None
    harness.serve({"versions": {"jax": jax.__version__}}, run)


def main() -> None:
    if sys.argv[1:2] in (["ours"], ["peer"]):
        what, case, folder = sys.argv[1:]
        {"ours": ours, "peer": peer}[what](case, pathlib.Path(folder))
        return
    given = [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--peer_python=")]
    python = given[0] if given else sys.executable
    cases = [a for a in sys.argv[1:] if a in SIDES] or [*SIDES]
    for case in cases:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            module = "benchmarks.extractors"
            theirs = python if case == "inception" else sys.executable
            b = harness.Arm(module, "peer", case, name, python=theirs)  # makes the weights
            a = harness.Arm(module, "ours", case, name)
            same = harness.parity(folder / "ours.npz", folder / "peer.npz")
            harness.compare(f"extractors/{case}", a, b, same, amount=BATCH)
            a.close()
            b.close()


if __name__ == "__main__":
    main()
