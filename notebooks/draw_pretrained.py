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
# # Draw with a pretrained pipeline
#
# Stable Diffusion 1 and 2, SDXL, PixArt, Stable Diffusion 3 and FLUX.1 are opened as folders of
# diffusers. Neither torch nor diffusers is needed. By default this notebook takes the tiny
# pipeline of the package. Its weights are random, so that it draws noise, within seconds. Stable
# Diffusion 1.5 and PixArt-Σ are meant for one chip of 16 GB.
#
# `SOURCE` is a folder with a `model_index.json`, or `hf:org/name@revision`. For gated names run
# `hf auth login` first. `PACKAGE` is what pip installs where `t2i_jax` is missing: a clone of the
# repository, or its address.

# %%
SOURCE = ""
PACKAGE = ".."
PROMPTS = ["a red circle on a white background", "a blue square above a green ring"]

# %% [markdown]
# Colab and Kaggle come with a JAX that fits their accelerators. The constraint keeps it as it is:
# where it is too old for the package, pip says so and changes nothing.

# %%
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

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
from t2i_jax import images, pipeline
from t2i_jax.pretrained import folder

print(f"t2i_jax {t2i_jax.__version__}, JAX {jax.__version__}, Python {sys.version.split()[0]}")
print(jax.devices())

# %%
pipe = pipeline.Pipeline.load(SOURCE or str(folder.TINY))
res, steps = pipe.config.res, pipe.config.sample.steps
print(f"{res} pixels a side, {steps} steps, guidance {pipe.config.sample.guidance}")


def shown(pictures, columns):
    """Pictures as a grid, tiny ones enlarged."""
    return PIL.Image.fromarray(images.enlarged(images.grid(pictures, columns)))


# %% [markdown]
# The first call compiles. A row for each prompt: its pictures differ by their noise. The same seed
# gives the same pictures.

# %%
pictures = pipe(PROMPTS, num_images=4, seed=0)
shown(pictures, 4)

# %% [markdown]
# Guidance from left to right, from none to much, with the same noise.

# %%
pictures = [pipe(PROMPTS[0], guidance=scale, seed=1)[0] for scale in (1.0, 3.0, 6.0, 12.0)]
shown(pictures, 4)

# %% [markdown]
# Another solver than the folder's own with half of the steps, a negative prompt, and another
# shape. Stable Diffusion 3 and FLUX.1 take the solvers `euler` and `heun`; FLUX.1-dev reads no
# negative prompt.

# %%
SOLVER, NEGATIVE = "dpmpp_2m", "blurred"
half = max(steps // 2, 1)
pictures = pipe(
    PROMPTS, width=2 * res, height=res, seed=2, sampler=SOLVER, steps=half, negative_prompt=NEGATIVE
)
shown(pictures, 1)

# %% [markdown]
# Pictures that begin with others: `strength` is the share of the steps that are done.

# %%
first = pipe(PROMPTS[0], seed=3)
examples = {"image": list(first), "caption": [PROMPTS[1]]}
again = [pipe.draw("img2img", examples, strength=x)[0] for x in (0.2, 0.5, 0.8)]
shown([first[0], *again], 4)
