"""Pretrained pipelines of true size, and what opening, drawing and compiling them takes.

python -m benchmarks.true_sizes write FOLDER [NAME …]   folders of configs alone, for --dry_run
python -m benchmarks.true_sizes load draw               Stable Diffusion 1.5 with random weights in
    half precision (2 GB below the folder for temporary files, removed afterwards): memory that
    frozen nets take, time and memory of one step at 256 px
python -m benchmarks.true_sizes --check                 the same of the tiny pipeline

Sizes are those that the published config.json files give; the numbers of parameters below are
published, too. Weights are random, and so are the words of the tokenizers.
"""

import json
import math
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np

from benchmarks import harness

CLIP = dict(
    architectures=["CLIPTextModel"],
    model_type="clip_text_model",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    vocab_size=49408,
    hidden_act="quick_gelu",
    eos_token_id=2,
)
PROJECTED = CLIP | dict(architectures=["CLIPTextModelWithProjection"])
BIG_G = PROJECTED | dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
T5_XXL = dict(
    architectures=["T5EncoderModel"],
    model_type="t5",
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
)
VAE = dict(
    _class_name="AutoencoderKL",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
    scaling_factor=0.18215,
)
SDXL_VAE = VAE | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True)
VAE_16 = VAE | dict(latent_channels=16, sample_size=1024)
VAE_16 |= dict(use_quant_conv=False, use_post_quant_conv=False)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
PIPELINES = {  # name -> class of the pipeline, scheduler, part -> config.json
    "sd15": (
        "StableDiffusionPipeline",
        BETAS | dict(_class_name="PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
        {
            "text_encoder": CLIP,
            "vae": VAE,
            "unet": dict(
                _class_name="UNet2DConditionModel",
                sample_size=64,
                block_out_channels=[320, 640, 1280, 1280],
                down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
                cross_attention_dim=768,
                attention_head_dim=8,
            ),
        },
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        BETAS | dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading"),
        {
            "text_encoder": CLIP,
            "text_encoder_2": BIG_G,
            "vae": SDXL_VAE,
            "unet": dict(
                _class_name="UNet2DConditionModel",
                sample_size=128,
                block_out_channels=[320, 640, 1280],
                down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
                cross_attention_dim=2048,
                attention_head_dim=[5, 10, 20],
                transformer_layers_per_block=[1, 2, 10],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        },
    ),
    "pixart": (
        "PixArtSigmaPipeline",
        dict(_class_name="DPMSolverMultistepScheduler", beta_start=0.0001, beta_end=0.02),
        {
            "text_encoder": T5_XXL,
            "vae": SDXL_VAE,
            "transformer": dict(
                _class_name="PixArtTransformer2DModel",
                sample_size=128,
                patch_size=2,
                num_layers=28,
                num_attention_heads=16,
                attention_head_dim=72,
                in_channels=4,
                out_channels=8,
                cross_attention_dim=1152,
                caption_channels=4096,
                interpolation_scale=2,
                use_additional_conditions=False,
            ),
        },
    ),
    "sd35m": (
        "StableDiffusion3Pipeline",
        dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0),
        {
            "text_encoder": PROJECTED,
            "text_encoder_2": BIG_G,
            "text_encoder_3": T5_XXL,
            "vae": VAE_16 | dict(scaling_factor=1.5305, shift_factor=0.0609),
            "transformer": dict(
                _class_name="SD3Transformer2DModel",
                sample_size=128,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=24,
                num_attention_heads=24,
                attention_head_dim=64,
                joint_attention_dim=4096,
                caption_projection_dim=1536,
                pooled_projection_dim=2048,
                pos_embed_max_size=384,
                qk_norm="rms_norm",
                dual_attention_layers=list(range(13)),
            ),
        },
    ),
    "flux": (
        "FluxPipeline",
        dict(
            _class_name="FlowMatchEulerDiscreteScheduler",
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        {
            "text_encoder": CLIP,
            "text_encoder_2": T5_XXL,
            "vae": VAE_16 | dict(scaling_factor=0.3611, shift_factor=0.1159),
            "transformer": dict(
                _class_name="FluxTransformer2DModel",
                patch_size=1,
                in_channels=64,
                num_layers=19,
                num_single_layers=38,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=4096,
                pooled_projection_dim=768,
                guidance_embeds=True,
                axes_dims_rope=[16, 56, 56],
            ),
        },
    ),
}
STORED = "float16"  # what the frozen nets' files hold
RES = 64 if harness.CHECK else 256
TIGHT = 1.15  # memory of a frozen net over the bytes of its file, at most


def write(name: str, folder: pathlib.Path, dtype: str = STORED) -> pathlib.Path:
    """The folder of a pipeline, without weights, which would be of that type."""
    import transformers

    from t2i_jax.pretrained import folder as folders

    kind, scheduler, parts = PIPELINES[name]
    # What wrote the parts does not matter to us; diffusers wants two names for each.
    index = {"_class_name": kind} | {part: ["diffusers", "network"] for part in parts}
    for part, config in parts.items():
        _json(folder / part / "config.json", config | {"torch_dtype": dtype})
        if not part.startswith("text_encoder"):
            continue
        tokens = folder / part.replace("text_encoder", "tokenizer")
        if config["model_type"] == "t5":
            pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0)]
            pieces += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
            transformers.T5Tokenizer(vocab=pieces).save_pretrained(tokens)
        else:
            shutil.copytree(folders.TINY / "tokenizer", tokens)
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _json(folder / "model_index.json", index)
    return folder


def _json(path: pathlib.Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def networks(folder: pathlib.Path) -> dict:
    """Part -> the tensors that its file should hold, name -> shape."""
    from t2i_jax import objective, weights
    from t2i_jax.pretrained import folder as folders
    from t2i_jax.pretrained import hf, opener, tensors

    with hf.configs_alone():
        config = weights.config_of(folders.described(str(folder)))
        shapes = weights.abstract_nets(objective.make(config), config)
        opened, found = folders.open(str(folder)), {}
        params = {name: net["params"] for name, net in shapes.items()}
        for part, tree in (opened.by_part(params) | {"vae": params["vae"]}).items():
            checkpoint = opener.open(opened.part(part))
            (config,) = checkpoint.towers().values()
            sources = tensors.wanted(tree, checkpoint.family.names(config)).values()
            found[part] = {name: s.tensor_shape for s in sources for name in s.tensors}
    return found


def fill(folder: pathlib.Path) -> None:
    """Gives every network of a folder random weights. No file is ever whole in memory."""
    rng, dtype = np.random.default_rng(0), np.dtype(STORED)
    for part, shapes in networks(folder).items():
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        with (folder / part / f"{stem}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                file.write(_values(rng, name, shape).astype(dtype).tobytes())


def _values(rng, name: str, shape):
    """As networks begin: kernels keep the variance, scales are 1, biases 0."""
    if len(shape) > 1:
        x = rng.standard_normal(shape, np.float32)
        return np.multiply(x, math.prod(shape[1:]) ** -0.5, out=x)
    return np.full(shape, float(name.endswith("weight")), np.float32)


def pipeline_folder(folder: pathlib.Path) -> str:
    """Stable Diffusion 1.5 with weights; in a check the tiny pipeline."""
    from t2i_jax.pretrained import folder as folders

    if harness.CHECK:
        return str(folders.TINY)
    if not (folder / "model_index.json").exists():
        fill(write("sd15", folder))
    return str(folder)


def arm_load(net: str, folder: pathlib.Path) -> None:
    """Prints the bytes that a frozen net takes, now and at most, and those of its file."""
    import jax

    from t2i_jax import objective, weights
    from t2i_jax.pretrained import folder as folders
    from t2i_jax.pretrained import opener, tensors

    source = pipeline_folder(folder)
    config = weights.config_of(folders.described(source))
    target = weights.abstract_nets(objective.make(config), config)
    origin = weights.sources(config)[net]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
        opener.check(origin, target[net]),
    )
    jax.block_until_ready(jax.numpy.zeros(8))  # what JAX itself takes is there before
    files = tensors.files_of(opener.open(origin).folder)
    size = sum(path.stat().st_size for path in files)
    before, started = _memory("VmRSS"), time.perf_counter()
    loaded = jax.block_until_ready(opener.load(origin, target))
    seconds = time.perf_counter() - started
    now, most = _memory("VmRSS") - before, _memory("VmHWM") - before
    held = sum(x.nbytes for x in jax.tree.leaves(loaded))
    print(json.dumps(dict(file=size, arrays=held, after=now, most=most, seconds=seconds)))


def arm_draw(folder: pathlib.Path) -> None:
    """Prints what one picture by one step takes: the first draw, which compiles, and the next."""
    from t2i_jax import pipeline

    started = time.perf_counter()
    pipe = pipeline.Pipeline.load(pipeline_folder(folder))
    found = {"load": time.perf_counter() - started, "loaded_bytes": _memory("VmRSS")}
    for name in ("first", "second"):
        started = time.perf_counter()
        (picture,) = pipe(["a"], width=RES, height=RES, steps=1, guidance=5.0)
        found[name] = time.perf_counter() - started
    if picture.shape != (RES, RES, 3) or not np.ptp(picture):
        raise SystemExit(f"no picture: {picture.shape}, of one colour")
    print(json.dumps(found | {"peak_bytes": _memory("VmHWM")}))


def _memory(kind: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--check"]
    match arguments:
        case ["arm", "load", net, folder]:
            return arm_load(net, pathlib.Path(folder))
        case ["arm", "draw", folder]:
            return arm_draw(pathlib.Path(folder))
        case ["write", folder, *names]:
            for name in names or PIPELINES:
                print(write(name, pathlib.Path(folder) / name))
            return None
    if wrong := set(arguments) - {"load", "draw"}:
        raise SystemExit(f"unknown parts {sorted(wrong)}: there are load, draw and write")
    arms = [("load", "model"), ("load", "text"), ("draw",)]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "pipeline"
        pipeline_folder(folder)
        for arm in (a for a in arms if not arguments or a[0] in arguments):
            row = json.loads(harness.call(arm, folder))
            harness.report({"name": "/".join(arm)} | row)
            if "most" in row and row["most"] > TIGHT * row["file"] and not harness.CHECK:
                raise SystemExit(f"{arm[-1]} takes more than {TIGHT} times its file")
    harness.done()


if __name__ == "__main__":
    main()
