"""Stable Diffusion's own layout: all networks of a pipeline in one file, and otherwise named.

It is that of github.com/CompVis/stable-diffusion (1.x, 2.x) and of generative-models by
Stability-AI (XL). Such a file says neither sizes nor the scheduler, and has no vocabulary. They
come from a folder of diffusers, which `write` fills with the file's tensors.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy

from t2i_jax import errors, images
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf, tensors, writer

UNET = "model.diffusion_model."
_RESNET = {
    **{"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"},
    **{"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"},
}
_AROUND = {
    **{"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"},
    **{"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"},
    **{"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"},
}
_MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
_ATTENTION = {
    **{"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
}
_OPEN_CLIP = {
    **{"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"},
    **{"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
}
MOST_BLOCKS = 32  # on one way; Stable Diffusion has 12
_UNUSED = (".position_ids", ".logit_scale")  # counted anew, and of CLIP's loss alone


def of_unet(module: str, config: Mapping) -> str:
    """The name in diffusers' U-net of a module of the original one.

    Blocks of one size are counted through there, with the change of size as the last of them.
    """
    if module in _AROUND:
        return _AROUND[module]
    if match := re.fullmatch(r"middle_block\.([012])\.(.*)", module):
        return f"{_MIDDLE[int(match[1])]}.{_RESNET.get(match[2], match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", module)
    if not match:
        return module
    way, at, slot, rest = match.groups()
    down = way == "input"  # whose first block is the convolution at the entrance
    block, number = divmod(int(at) - down, config.get("layers_per_block", 2) + 1)
    path = f"{'down' if down else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{path}.downsamplers.0.conv"
    if rest == "conv":
        return f"{path}.upsamplers.0.conv"
    if slot == "0":
        return f"{path}.resnets.{number}.{_RESNET.get(rest, rest)}"
    return f"{path}.attentions.{number}.{rest}"


def in_unet(modules) -> dict[str, str]:
    """Original name -> the one in diffusers' U-net, of its modules; some have two of the first."""
    resnets = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", module) for module in modules]
    config = {"layers_per_block": max((int(m[1]) + 1 for m in resnets if m), default=2)}
    heads = [f"{way}_blocks.{at}" for way in ("input", "output") for at in range(MOST_BLOCKS)]
    rests = ["0.op", "1.conv", "2.conv", *(f"0.{rest}" for rest in _RESNET)]
    names = [*_AROUND, *(f"{head}.{rest}" for head in heads for rest in rests)]
    names += [f"middle_block.{at}.{rest}" for at in (0, 2) for rest in _RESNET]
    found = {name: of_unet(name, config) for name in names}
    # Within attentions all names are the same.
    begins = {of_unet(f"{head}.1.", config): f"{head}.1." for head in (*heads, "middle_block")}
    for module in modules:
        begin = re.match(r".*?attentions\.\d+\.|", module)[0]
        if begin in begins:
            found[begins[begin] + module.removeprefix(begin)] = module
    return {name: module for name, module in found.items() if module in modules}


def of_autoencoder(module: str, config: Mapping) -> str:
    """The name in diffusers' AutoencoderKL of a module of the original one, which counts the sizes
    of the decoder from the largest.
    """
    blocks = len(config.get("block_out_channels", (64,)))
    resnet = lambda rest: rest.replace("nin_shortcut", "conv_shortcut")
    if match := re.fullmatch(r"(\w+)\.(?:down|up)\.(\d+)\.(block\.(\d+)|\w+)\.(.+)", module):
        half, size, kind, number, rest = match.groups()
        side = "down" if half == "encoder" else "up"
        path = f"{half}.{side}_blocks.{size if side == 'down' else blocks - 1 - int(size)}"
        if number is None:
            return f"{path}.{kind}rs.0.{rest}"  # downsample, upsample
        return f"{path}.resnets.{number}.{resnet(rest)}"
    if match := re.fullmatch(r"(\w+)\.mid\.block_([12])\.(.+)", module):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{resnet(match[3])}"
    if match := re.fullmatch(r"(\w+)\.mid\.attn_1\.(.+)", module):
        return f"{match[1]}.mid_block.attentions.0.{_ATTENTION[match[2]]}"
    return module.replace(".norm_out", ".conv_norm_out")


def _of_clip(name: str, value: np.ndarray, config: Mapping):
    yield name, value


def _of_open_clip(name: str, value: np.ndarray, config: Mapping):
    """CLIP of the library open_clip, with queries, keys and values in one tensor."""
    if name == "text_projection":  # which multiplies from the right there
        if "CLIPTextModelWithProjection" in config.get("architectures", ()):
            yield "text_projection.weight", np.ascontiguousarray(value.T)
        return
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if not match:
        name = name.replace("positional_embedding", "embeddings.position_embedding.weight")
        name = name.replace("token_embedding", "embeddings.token_embedding")
        yield f"text_model.{name.replace('ln_final', 'final_layer_norm')}", value
        return
    if int(match[1]) >= config.get("num_hidden_layers", 12):
        return  # Stable Diffusion 2 reads the states before the last layer, and lacks that one
    layer = f"text_model.encoder.layers.{match[1]}"
    module, _, leaf = match[2].rpartition(".")
    if joined := re.fullmatch(r"in_proj_(\w+)", leaf):
        for part, third in zip("qkv", np.split(value, 3), strict=True):
            yield f"{layer}.self_attn.{part}_proj.{joined[1]}", third
    else:
        yield f"{layer}.{_OPEN_CLIP[module]}.{leaf}", value


def _renaming(rename: Callable):
    def renamed(name: str, value: np.ndarray, config: Mapping):
        module, _, leaf = name.rpartition(".")
        module = rename(module, config)
        # What were 1 × 1 convolutions in the autoencoder's attention are products by now.
        flat = value.ndim == 4 and rename is of_autoencoder and "attentions" in module
        yield f"{module}.{leaf}", value[:, :, 0, 0] if flat else value

    return renamed


PARTS = {  # prefix in the file -> part of the pipeline, (name, tensor, config) -> pairs of these
    UNET: ("unet", _renaming(of_unet)),
    "first_stage_model.": ("vae", _renaming(of_autoencoder)),
    "cond_stage_model.transformer.": ("text_encoder", _of_clip),
    "cond_stage_model.model.": ("text_encoder", _of_open_clip),
    "conditioner.embedders.0.transformer.": ("text_encoder", _of_clip),
    "conditioner.embedders.1.model.": ("text_encoder_2", _of_open_clip),
}


def write(file: pathlib.Path, like: str, output: pathlib.Path) -> None:
    """Writes a file in the original layout as a folder of diffusers.

    Args:
      like: a pipeline of the same sizes, as `folder.open` takes it. Of its networks only the
        configs are read, and of its tokenizers and scheduler all.
      output: a new folder.
    Raises:
      DataError: no such file, or no checkpoint in this layout. Whether the tensors are those that
        the configs ask for is known once the folder is opened.
    """
    found, _ = tensors.header(file)
    if not any(name.startswith(UNET) for name in found):
        raise errors.DataError(
            f"no tensor is called {UNET}…, but {next(iter(found), 'none')[:80]}",
            where=str(file),
            fix="give a whole checkpoint in Stable Diffusion's own layout, not a part or a LoRA",
        )
    opened = folders.open(like)
    base = hf.without_weights(like)
    index = {}
    output.mkdir(parents=True, exist_ok=True)
    for part, kind in opened.index.items():
        index[part] = kind
        if opened.has(part):
            if part in writer.LEFT:
                index[part] = [None, None]
            else:
                writer.copied(base / part, output / part, weights=False)
    for part in dict.fromkeys(part for part, _ in PARTS.values()):
        if opened.has(part):
            arrays = _arrays(found, part, hf.read_json(base / part / hf.CONFIG))
            name = hf.WEIGHTS if part.startswith("text") else hf.DIFFUSION
            images.write_whole(
                output / part / name, safetensors.numpy.save(arrays, {"format": "pt"})
            )
    images.write_whole(output / hf.PIPELINE, json.dumps(index, indent=2).encode())


def _arrays(found, part: str, config: Mapping) -> dict[str, np.ndarray]:
    """The tensors of one part, under their names in diffusers."""
    arrays = {}
    for prefix, (of, renamed) in PARTS.items():
        for name, tensor in found.items() if of == part else ():
            kept = name.startswith(prefix) and tensor.kind in hf.FLOATS
            if kept and not name.endswith(_UNUSED):
                arrays |= renamed(name.removeprefix(prefix), tensor.whole(), config)
    return arrays
