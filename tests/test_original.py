"""Single files in Stable Diffusion's own layout: read as diffusers reads them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax import errors, objective, pipeline, weights
from t2i_jax.commands import convert
from t2i_jax.pretrained import folder, lora_files, opener, original

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
folders = pytest.importorskip("tests.folders")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
OURS_OF = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}


def in_original(kind, pipe):
    """The tensors of a pipeline as its first authors' file has them: names by hand, not by rule."""
    found = {}
    for prefix, net in (("model.diffusion_model.", pipe.unet), ("first_stage_model.", pipe.vae)):
        table = NAMES[kind] if net is pipe.unet else NAMES["vae"]
        for name, x in net.state_dict().items():
            module, _, leaf = name.rpartition(".")
            head = max((k for k in table if module == k or module.startswith(k + ".")), key=len)
            rest = module[len(head) :]
            resnet = RESNET if net is pipe.unet else {"conv_shortcut": "nin_shortcut"}
            rest = "".join(f".{resnet.get(r, r)}" for r in [rest[1:]] if r)
            x = x[:, :, None, None] if "attn_1" in table[head] and x.ndim == 2 else x
            found[f"{prefix}{table[head]}{rest}.{leaf}"] = x
    for name, x in pipe.text_encoder.state_dict().items():
        plain = name.removeprefix("text_model.")
        found[f"{OURS_OF[kind]}text_model.{plain}"] = x
    if kind == "sdxl":
        found |= in_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    found[f"{OURS_OF[kind]}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    found["alphas_cumprod"] = torch.ones(1000)
    return {name: x.contiguous().numpy() for name, x in found.items()}


def in_open_clip(net, prefix):
    state = {k.removeprefix("text_model."): v for k, v in net.state_dict().items()}
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.ones(()),
    }
    named = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    named |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for n in range(net.config.num_hidden_layers):
        for leaf in ("weight", "bias"):
            at = f"encoder.layers.{n}."
            joined = [state[f"{at}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            found[f"transformer.resblocks.{n}.attn.in_proj_{leaf}"] = torch.cat(joined)
            for theirs, ours in named.items():
                found[f"transformer.resblocks.{n}.{ours}.{leaf}"] = state[f"{at}{theirs}.{leaf}"]
    return {prefix + name: x for name, x in found.items()}


RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
UNET = {  # of two sizes with one block on the way down and two up; the second attends
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "decoder.up_blocks.0.resnets.0": "decoder.up.1.block.0",
    "decoder.up_blocks.0.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "decoder.up_blocks.1.resnets.0": "decoder.up.0.block.0",
    "decoder.up_blocks.1.resnets.1": "decoder.up.0.block.1",
}
for half in ("encoder", "decoder"):
    VAE |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
    VAE[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    VAE |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    attention["to_out.0"] = "proj_out"
    for theirs, ours in attention.items():
        VAE[f"{half}.mid_block.attentions.0.{theirs}"] = f"{half}.mid.attn_1.{ours}"
NAMES = {"sd1": UNET, "sdxl": UNET, "vae": VAE}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def single(request, tmp_path_factory):
    """A kind, its folder and its single file; the folder has no weights, as `--like` needs none."""
    path = tmp_path_factory.mktemp(request.param)
    pipe = folders.save(folders.PIPELINES[request.param], path / "whole")
    tensors = in_original(request.param, pipe)
    safetensors.numpy.save_file(tensors, path / "one.safetensors")
    return path, tensors


def nets_of(folder):
    return pipeline.Pipeline.load(str(folder)).nets


def test_a_single_file_is_the_folder_it_was_made_of(single, tmp_path):
    path, _ = single
    like = tmp_path / "like"
    for file in (path / "whole").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (like / file.relative_to(path / "whole")).parent.mkdir(parents=True, exist_ok=True)
            (like / file.relative_to(path / "whole")).write_bytes(file.read_bytes())
    made = convert.single(str(path / "one.safetensors"), str(like), str(tmp_path / "made"))
    got, want = nets_of(made), nets_of(path / "whole")
    assert got.keys() == want.keys()
    for name in want:
        for a, b in zip(*(np_leaves(nets[name]) for nets in (got, want)), strict=True):
            np.testing.assert_array_equal(a, b)


def np_leaves(net):
    return [np.asarray(x) for x in jax.tree.leaves(net)]


def test_the_names_are_those_that_diffusers_reads(single):
    """Its own reader of single files opens the U-net of ours."""
    path, tensors = single
    unet = {k: torch.from_numpy(v) for k, v in tensors.items() if k.startswith(original.UNET)}
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        unet, config=str(path / "whole"), subfolder="unet", local_files_only=True
    )
    config = json.loads((path / "whole" / "unet" / "config.json").read_text())
    state = theirs.state_dict()
    renamed = {}
    for name, x in tensors.items():
        if name.startswith(original.UNET):
            module, _, leaf = name.removeprefix(original.UNET).rpartition(".")
            renamed[f"{original.of_unet(module, config)}.{leaf}"] = x
    assert renamed.keys() == state.keys()
    for name, x in renamed.items():
        np.testing.assert_array_equal(x, state[name].numpy())


def test_a_file_of_another_kind_is_refused_and_nothing_is_left(single, tmp_path):
    path, tensors = single
    lacking = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.decoder")}
    bad, whole = tmp_path / "bad.safetensors", str(path / "whole")
    safetensors.numpy.save_file(lacking, bad)
    with pytest.raises(errors.DataError, match="not the networks that"):
        convert.single(str(bad), whole, str(tmp_path / "made"))
    safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, bad)
    with pytest.raises(errors.DataError, match=r"no tensor is called model\.diffusion_model"):
        convert.single(str(bad), whole, str(tmp_path / "made"))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.safetensors"]
    with pytest.raises(errors.ConfigError, match="convert single"):
        weights.locate(str(bad))


def test_a_users_folder_is_left_alone(single, tmp_path):
    path, _ = single
    (tmp_path / "made.part").mkdir()
    with pytest.raises(errors.DataError):
        convert.single(str(tmp_path / "none.safetensors"), str(path / "whole"), tmp_path / "made")
    assert [p.name for p in tmp_path.iterdir()] == ["made.part"]


def test_adapters_with_the_original_names_are_those_with_diffusers(single, tmp_path):
    """kohya's files for SDXL call the U-net's modules so."""
    path, tensors = single
    opened = folder.open(str(path / "whole"))
    config = weights.config_at(str(path / "whole"))
    shapes = weights.abstract_nets(objective.make(config), config)["model"]
    plans = {"unet": opener.open(opened.part("unet")).plan(shapes)}
    unet = {k.removeprefix(original.UNET): v for k, v in tensors.items()}
    rng = np.random.default_rng(0)
    kinds = ("attn1.to_q", "attn2.to_k", "ff.net.0.proj", "proj_in", "emb_layers.1", "in_layers.2")
    chosen = [n for n, x in unet.items() if n.endswith(".weight") and any(k in n for k in kinds)]
    found = {}
    for name in chosen:
        out, width = unet[name].shape[0], np.prod(unet[name].shape[1:])
        down = rng.normal(size=(2, *unet[name].shape[1:])).astype(np.float32)
        up = rng.normal(size=(out, 2, *(1,) * (unet[name].ndim - 2))).astype(np.float32)
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        assert width == np.prod(down.shape[1:])
    safetensors.numpy.save_file(found, tmp_path / "a.safetensors")
    pairs = lora_files._pairs(lora_files.read(tmp_path / "a.safetensors", plans)["unet"])
    got = {path.rpartition("/")[0].partition("transformer_blocks")[0] for path in pairs}
    for place in ("down_blocks_1/attentions_0", "mid_block/attentions_0", "up_blocks_0/resnets_1"):
        assert any(one.startswith(place) for one in got), place
    assert len(chosen) > 20


def test_the_command_says_what_it_needs():
    command = [sys.executable, "-m", "t2i_jax", "convert", "single", "--input=a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 78
    assert "--input=FILE --like=DIR --output_dir=NEW" in done.stderr
