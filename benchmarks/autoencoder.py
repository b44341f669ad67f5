"""A training step of an autoencoder against diffusers in PyTorch.

python -m benchmarks.autoencoder [shapes] [emoji] [--check]

shapes  32 pictures of 32 px, the sizes of configs/shapes_tokenizer.py:kl
emoji   16 pictures of 64 px, the sizes of configs/emoji_autoencoder.py

Encoding, latents drawn with given noise, decoding, the squared error, backward, gradient norm and
AdamW. Critic, other errors and the latents' divergence are left out on both sides. The peer makes a
network with random weights and saves it; both open the same file. Parity: three losses in a row.

There is no compiled peer: what torch.compile makes of this step (PyTorch 2.13, CPU) has other
gradients than the step itself, in some blocks of the decoder.
"""

import functools
import importlib
import pathlib

import numpy as np

from benchmarks import harness, pretrained

CASES = {"shapes": ("shapes_tokenizer", "kl", 32), "emoji": ("emoji_autoencoder", "", 16)}
RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0


def sizes(case: str):
    """The autoencoder's sizes in a config, the pictures' side, and how many there are."""
    name, arg, batch = CASES[case]
    config = importlib.import_module(f"configs.{name}").get_config(arg or None)
    return config.model.autoencoder, config.res, 2 if harness.CHECK else batch


def inputs(case: str) -> dict:
    own, res, batch = sizes(case)
    rng, side = np.random.default_rng(0), res // 2 ** (len(own.widths) - 1)
    image = rng.uniform(-1, 1, (batch, res, res, 3)).astype(np.float32)
    noise = rng.standard_normal((batch, side, side, own.channels), np.float32)
    return {"image": image, "noise": noise, "target": image}


def prepare(case: str, folder: pathlib.Path) -> None:
    import diffusers
    import torch

    torch.manual_seed(0)
    own, res, _ = sizes(case)
    diffusers.AutoencoderKL(
        block_out_channels=tuple(own.widths),
        down_block_types=("DownEncoderBlock2D",) * len(own.widths),
        up_block_types=("UpDecoderBlock2D",) * len(own.widths),
        layers_per_block=own.depth,
        latent_channels=own.channels,
        norm_num_groups=own.groups,
        mid_block_add_attention=own.attends,
        sample_size=res,
    ).save_pretrained(folder / case)


def ours(case: str, folder: pathlib.Path) -> None:
    import jax
    import jax.numpy as jnp

    from t2i_jax.models.types import Moments
    from t2i_jax.pretrained import opener

    data, checkpoint = inputs(case), opener.open(str(folder / case))
    module = checkpoint.module(Moments)
    shapes = jax.eval_shape(module.init, jax.random.key(0), data["image"])
    variables = jax.device_put(checkpoint.load(shapes))

    def forward(variables, batch):
        mean_BhwC, logvar_BhwC = module.apply(variables, batch["image"])
        latent_BhwC = mean_BhwC + jnp.exp(0.5 * logvar_BhwC) * batch["noise"]
        return module.apply(variables, latent_BhwC, method="decode")

    spec = dict(learning_rate=RATE, b1=BETAS[0], b2=BETAS[1], clip=CLIP)
    harness.serve_steps(folder, forward, variables, data, spec)


def peer(case: str, folder: pathlib.Path) -> None:
    import diffusers
    import torch

    torch.set_num_threads(harness.THREADS)
    net = diffusers.AutoencoderKL.from_pretrained(folder / case).train()
    data = pretrained.tensors(inputs(case))
    adam = torch.optim.AdamW(net.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)

    def forward(image, noise):
        normal = net.encode(image).latent_dist
        return net.decode(normal.mean + normal.std * noise).sample

    def update():
        loss = torch.nn.functional.mse_loss(forward(data["image"], data["noise"]), data["target"])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        return loss.detach()

    np.savez(folder / "peer.npz", losses=[float(update()) for _ in range(3)])
    harness.serve(update, "torch")


def against(case: str):
    if harness.lacks("diffusers", f"autoencoder/{case}"):
        return
    amount = len(inputs(case)["image"])
    arms = ("ours", case), ("peer", case)
    yield harness.Case(f"autoencoder/{case}", *arms, amount, ("prepare", case))


ARMS = {"prepare": prepare, "ours": ours, "peer": peer}
PARTS = {case: functools.partial(against, case) for case in CASES}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
