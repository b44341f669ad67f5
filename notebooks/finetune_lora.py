# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach a pretrained pipeline your pictures
#
# First by adapters (LoRA), which are meant for one chip of 16 GB, then whole, split over eight
# devices. By default this notebook takes the tiny pipeline of the package, with random weights,
# and pictures of shapes: minutes on a CPU.
#
# - `SOURCE` is a folder with a `model_index.json`, or `hf:org/name@revision`.
# - `PICTURES` is a folder of pictures with captions: a `metadata.jsonl`, or a `.txt` file beside
#   each picture.
# - `PACKAGE` is what pip installs where `t2i_jax` is missing: a clone of the repository, or its
#   address.

# %%
SOURCE, PICTURES = "", ""
PACKAGE = ".."
PROMPTS = ["a red circle on a white background", "a blue square above a green ring"]

# %% [markdown]
# Colab and Kaggle come with a JAX that fits their accelerators. The constraint keeps it as it is:
# where it is too old for the package, pip says so and changes nothing. On a machine without
# accelerators eight devices are simulated.

# %%
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if importlib.util.find_spec("t2i_jax") is None:
    there = importlib.metadata.distributions()
    kept = {d.name: d.version for d in there if d.name.lower().startswith(("jax", "libtpu"))}
    constraint = pathlib.Path(tempfile.mkdtemp()) / "kept.txt"
    constraint.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraint]
    subprocess.run([*pip, PACKAGE], check=True)

# %%
import jax
import PIL.Image

import t2i_jax
from t2i_jax import images, loop, pipeline
from t2i_jax.commands import cli, plan
from t2i_jax.pretrained import folder

cli.import_configs()
from configs import finetune, finetune_lora

print(f"t2i_jax {t2i_jax.__version__}, JAX {jax.__version__}, Python {sys.version.split()[0]}")
print(jax.devices())

WORK = pathlib.Path(tempfile.mkdtemp())  # a folder that stays lets a run go on where it stopped
source = SOURCE or str(folder.TINY)
options = f"source={source},path={PICTURES}" if PICTURES else f"source={source},debug"


def shown(pictures, columns):
    """Pictures as a grid, tiny ones enlarged."""
    return PIL.Image.fromarray(images.enlarged(images.grid(pictures, columns)))


# %% [markdown]
# ## Adapters
#
# Low-rank adapters of the projections of attention. All other weights stay as they are, in the
# type of their files.

# %%
config = finetune_lora.get_config(options)
config.batch_size = len(jax.devices())
print(config.optim, config.lora, sep="\n")
loop.train(config, WORK / "lora")

# %% [markdown]
# The same noise before, in the first row, and after.

# %%
before, after = pipeline.Pipeline.load(source), pipeline.Pipeline.load(WORK / "lora")
drawn = [pipe(PROMPTS, num_images=2, seed=0) for pipe in (before, after)]
shown([picture for pictures in drawn for picture in pictures], 4)

# %% [markdown]
# Export writes a file of adapters that diffusers' `load_lora_weights` reads, too. Here it is added
# to the pipeline with half of its weight.

# %%
export = [sys.executable, "-m", "t2i_jax", "export", "--format=diffusers"]
subprocess.run([*export, f"--workdir={WORK / 'lora'}", f"--output={WORK / 'adapters'}"], check=True)
half = pipeline.Pipeline.load(source, lora={str(WORK / "adapters"): 0.5})
shown(half(PROMPTS, num_images=2, seed=0), 4)

# %% [markdown]
# ## The whole denoiser
#
# `fsdp` splits weights, moments and averages over all devices: eight hold an eighth each. What a
# step needs is known before it runs; of a TPU slice, too, which is not at hand: `python train.py
# --config=configs/finetune.py:source=DIR --workdir=runs/tuned --dry_run --topology=v5e:2x4`.

# %%
config = finetune.get_config(options)
config.batch_size = len(jax.devices())
needs = plan.show(config, WORK / "whole")

# %%
loop.train(config, WORK / "whole")
after = pipeline.Pipeline.load(WORK / "whole")
drawn = [pipe(PROMPTS, num_images=2, seed=0) for pipe in (before, after)]
shown([picture for pictures in drawn for picture in pictures], 4)
