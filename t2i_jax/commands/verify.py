"""Says what each network of a pretrained pipeline computes, to be compared with diffusers.

python -m t2i_jax verify DIR [--with=diffusers] [--width=512] [--height=512]

First come hashes of the weights' files. Then come the networks' results for one prompt and fixed
noise: shape, mean, standard deviation, first numbers. --with=diffusers, which needs torch, computes
them there, too. It adds the largest difference, relative to the largest number. In float32 on a CPU
that should be less than 1e-3.
"""

import inspect

from absl import flags

from t2i_jax.commands import cli

PROMPT = flags.DEFINE_string("prompt", "a photograph of a red bicycle", "What is encoded.")
WITH = flags.DEFINE_enum("with", None, ["diffusers"], "Compute it with another library, too.")
WIDTH = flags.DEFINE_integer(
    "width", 0, "Of the noise, in pixels; 0: the model's own.", lower_bound=0
)
HEIGHT = flags.DEFINE_integer("height", 0, "As --width.", lower_bound=0)
SHOWN = 4  # numbers of each result


def main(source):
    from t2i_jax import errors

    if len(source) != 1:
        raise errors.misused(f"{len(source)} folders", "name one: verify DIR")
    import numpy as np

    from t2i_jax import pipeline
    from t2i_jax.pretrained import folder

    opened = folder.open(source[0])
    pipe = pipeline.Pipeline.load(source[0])
    family = pipe.predictor.objective.predict["parts"].__self__
    sides = [side // family.vae.factor for side in family.size(HEIGHT.value, WIDTH.value)]
    # The noise is numpy's, as JAX and torch draw other numbers from one seed.
    noise = np.random.default_rng(0).standard_normal((1, *sides, family.space.shape[-1]))
    batch = pipe.predictor.batch(caption=[PROMPT.value], noise=noise)
    options = dict(width=WIDTH.value, height=HEIGHT.value)
    ours = pipe.predictor.run("parts", pipe.nets, batch, **options)
    theirs = diffusers_parts(opened, batch["noise"], family) if WITH.value else {}
    for part, digest in digests(opened).items():
        print(f"{part:16} weights {digest}")
    for name, value in ours.items():
        value = np.asarray(value, np.float32)
        print(f"{name:16} {said(value)}")
        if name in theirs:
            far = np.abs(value - theirs[name]).max() / np.abs(theirs[name]).max()
            print(f"{'  ' + WITH.value:16} {said(theirs[name])} difference {far:.1e}")


def said(value) -> str:
    """A result's shape, mean, standard deviation and first numbers."""
    first = " ".join(f"{x:.5f}" for x in value.reshape(-1)[:SHOWN])
    shape = "×".join(map(str, value.shape))
    return f"{shape} mean {value.mean():.5f} std {value.std():.5f} first {first}"


def digests(opened) -> dict[str, str]:
    """Part -> the first digits of the SHA-256 of its weights' files."""
    from t2i_jax.pretrained import tensors

    return {name: tensors.digest(path)[:16] for name, path in _folders(opened).items()}


def _folders(opened) -> dict:
    """Part -> the folder of its network."""
    from t2i_jax.pretrained import opener

    names = (opened.recipe.denoiser, "vae", *(e.part for e in opened.encoders))
    return {name: opener.open(opened.part(name)).folder for name in names}


def _variant(opened) -> str | None:
    """What diffusers calls the files of weights that are there, such as "fp16"."""
    from t2i_jax.pretrained import hf

    files = [hf.weights(path).name for path in _folders(opened).values()]
    return next((v[1:] for v in hf.VARIANTS if any(f"{v}." in name for name in files)), None)


def diffusers_parts(opened, noise_BhwC, family) -> dict:
    """The same results by diffusers, seen where they pass between its networks."""
    from t2i_jax import errors

    what, fix = "it is not installed", "pip install diffusers transformers torch"
    with errors.explained(errors.ConfigError, what, where="--with", fix=fix, of=ImportError):
        import diffusers
        import torch
    import numpy as np

    path, revision = opened.source, None
    if path.startswith("hf:"):
        path, _, revision = path.removeprefix("hf:").partition("@")
    # It tries neither names nor kinds of files by itself, and pickles can run code.
    which = dict(revision=revision or None, variant=_variant(opened), use_safetensors=True)
    theirs = diffusers.DiffusionPipeline.from_pretrained(path, **which)
    theirs.to("cpu", torch.float32)
    theirs.set_progress_bar_config(disable=True)
    net, seen = getattr(theirs, opened.recipe.denoiser), {}

    def watch(module, args, kwargs, out):
        text = kwargs.get("encoder_hidden_states")
        pooled = kwargs.get("pooled_projections")
        if pooled is None:
            pooled = (kwargs.get("added_cond_kwargs") or {}).get("text_embeds")
        seen.update(text=text, pooled=pooled, denoiser=out[0])
        raise StopIteration  # one call is enough

    net.register_forward_hook(watch, with_kwargs=True)
    z = torch.from_numpy(np.ascontiguousarray(noise_BhwC.transpose(0, 3, 1, 2)))
    b, c, h, w = z.shape
    # Pipelines of packed tokens, such as Flux, want latents that are packed already.
    given = theirs._pack_latents(z, b, c, h, w) if hasattr(theirs, "_pack_latents") else z
    factor, more = family.vae.factor, {}
    if "use_resolution_binning" in inspect.signature(theirs.__call__).parameters:
        more["use_resolution_binning"] = False  # PixArt's would change the size
    try:
        with torch.no_grad():
            theirs(
                PROMPT.value,
                # The first of 20 steps is what our prediction "parts" computes.
                num_inference_steps=20,
                # Above 1 the batch would also hold the empty prompt.
                guidance_scale=1.0,
                latents=given,
                height=h * factor,
                width=w * factor,
                **more,
            )
    except StopIteration:
        pass
    with torch.no_grad():
        # The inverse of how latents are made: (x − shift) · scale.
        latent = z / family.vae.scaling_factor + family.vae.shift_factor
        seen["autoencoder"] = theirs.vae.decode(latent, return_dict=False)[0]
    if seen["denoiser"].ndim == 3:  # packed tokens
        sides = (h * factor, w * factor, theirs.vae_scale_factor)
        seen["denoiser"] = theirs._unpack_latents(seen["denoiser"], *sides)
    # PixArt's network gives twice the channels. The second half is a variance, which is not used.
    seen["denoiser"] = seen["denoiser"][:, :c]
    last = lambda x: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
    return {k: last(x.detach().numpy()[-1:]) for k, x in seen.items() if x is not None}


if __name__ == "__main__":
    cli.run(main, arguments="DIR")
