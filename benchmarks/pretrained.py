"""Networks of pretrained pipelines against diffusers in PyTorch, at middle sizes.

python -m benchmarks.pretrained [unet] [dit] [draw] [attention] [decode] [encode] [--check]

unet, dit  a training step of a U-net of 30 million parameters, and of a PixArt of as many, on four
           pictures of 32 × 32 latents: forward, backward, gradient norm and AdamW
attention  of 1,024 tokens with its gradient, four examples of 8 heads of 12, as that U-net's outer
           blocks have it
draw       20 guided Euler steps of the U-net for one caption, eager and compiled
decode, encode  one picture of 256 px with the autoencoder of Stable Diffusion 1.5

The peer makes networks with random weights and saves them; both open the same files. Parity: three
losses, the latents in the end, the picture, the moments.
"""

import functools
import pathlib

import numpy as np

from benchmarks import harness

CHECK = harness.CHECK
BATCH, SIDE, STEPS, SCALE = (1, 8, 3, 5.0) if CHECK else (4, 32, 20, 5.0)
LENGTH, WIDTH, RES = 77, 256, 64 if CHECK else 256
RATE, BETAS, CLIP = 1e-4, (0.9, 0.999), 1.0
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE |= dict(timestep_spacing="leading", steps_offset=1)
UNET = dict(
    sample_size=SIDE,
    block_out_channels=(96, 160, 320) if not CHECK else (32, 64),
    down_block_types=("CrossAttnDownBlock2D",) * (1 if CHECK else 2) + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (1 if CHECK else 2),
    layers_per_block=2,
    cross_attention_dim=WIDTH,
    attention_head_dim=8,
)
DIT = dict(
    sample_size=SIDE,
    num_layers=2 if CHECK else 12,
    num_attention_heads=6,
    attention_head_dim=64,
    in_channels=4,
    out_channels=8,
    cross_attention_dim=384,
    caption_channels=WIDTH,
    use_additional_conditions=False,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
)
PARTS_OF = {"unet": ("UNet2DConditionModel", UNET), "dit": ("PixArtTransformer2DModel", DIT)}
PARTS_OF |= {"vae": ("AutoencoderKL", VAE)}


def inputs() -> dict:
    """Latents, times and text of a batch, of zeros' mean and unit variance."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    return {
        "z": normal(BATCH, SIDE, SIDE, 4),
        "t": rng.integers(0, 1000, BATCH).astype(np.float32),
        "seq": normal(BATCH, LENGTH, WIDTH),
        "target": normal(BATCH, SIDE, SIDE, 4),
        "image": rng.uniform(-1, 1, (1, RES, RES, 3)).astype(np.float32),
        "latent": normal(1, RES // 8, RES // 8, 4),
    }


def prepare(name: str, folder: pathlib.Path) -> None:
    import diffusers
    import torch

    torch.manual_seed(0)
    kind, sizes = PARTS_OF[name]
    net = getattr(diffusers, kind)(**sizes)
    with torch.no_grad():
        for parameter in net.parameters():  # what starts at zero would hide half of the work
            parameter += 0.02 * torch.randn_like(parameter)
    net.save_pretrained(folder / name)


def opened(name: str, folder: pathlib.Path, wanted, *data):
    """Our module and its variables on the device."""
    import jax

    from t2i_jax.pretrained import opener

    checkpoint = opener.open(str(folder / name))
    module = checkpoint.module(wanted)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *data)
    return module, jax.device_put(checkpoint.load(shapes))


def condition(data):
    from t2i_jax.models.types import Cond

    mask = np.ones(data["seq"].shape[:2], bool)
    return Cond(data["seq"], mask, np.zeros((len(mask), 1), np.float32))


def ours_step(name: str, folder: pathlib.Path) -> None:
    from t2i_jax.models.types import Output

    data = inputs()
    module, variables = opened(name, folder, Output, data["z"], data["t"], condition(data))
    forward = lambda net, batch: module.apply(net, batch["z"], batch["t"], condition(batch))
    spec = dict(learning_rate=RATE, b1=BETAS[0], b2=BETAS[1], clip=CLIP)
    used = {name: data[name] for name in ("z", "t", "seq", "target")}
    harness.serve_steps(folder, forward, variables, used, spec)


def peer_step(name: str, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    net, data = by_diffusers(name, folder), tensors(inputs())
    forward = torch.compile(net) if compiled else net
    adam = torch.optim.AdamW(net.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)

    def update():
        out = predicted(name, forward, data)
        loss = torch.nn.functional.mse_loss(out, data["target"])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        return loss.detach()

    np.savez(folder / "peer.npz", losses=[float(update()) for _ in range(3)])
    harness.serve(update, "torch")


def predicted(name: str, net, data):
    """What a denoiser of diffusers says of the noise: PixArt's also has a variance behind it."""
    if name == "dit":
        added = {"resolution": None, "aspect_ratio": None}
        return net(data["z"], data["seq"], data["t"], added_cond_kwargs=added).sample[:, :4]
    return net(data["z"], data["t"], data["seq"]).sample


def by_diffusers(name: str, folder: pathlib.Path):
    import diffusers
    import torch

    torch.set_num_threads(harness.THREADS)
    return getattr(diffusers, PARTS_OF[name][0]).from_pretrained(folder / name)


def tensors(data) -> dict:
    """The same for torch: pictures and latents with their channels first."""
    import torch

    first = lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x
    return {name: torch.from_numpy(first(x)) for name, x in data.items()}


def ours_draw(folder: pathlib.Path) -> None:
    import jax
    import jax.numpy as jnp

    from t2i_jax.commands import plan
    from t2i_jax.models.types import Output
    from t2i_jax.sampling import guidance, scheduler, solvers

    data = inputs()
    z, cond = data["z"][:1], condition({"seq": data["seq"][:1]})
    null = cond._replace(seq_BLD=np.zeros_like(cond.seq_BLD))
    module, variables = opened("unet", folder, Output, z, data["t"][:1], cond)
    saved = {"_class_name": "EulerDiscreteScheduler"} | SCHEDULE
    grid = scheduler.from_config(saved).grid(STEPS)

    @jax.jit
    def draw(variables, z, cond, null):
        both = jax.tree.map(guidance.interleave, cond, null)
        text = module.apply(variables, both, method="prepare")
        output = lambda z, t: module.apply(variables, z, t, both, text)
        field = guidance.cfg(output, None, jnp.float32(SCALE), guidance.ALWAYS)
        return solvers.linear(field, grid.start * z, grid, None)

    arguments = jax.device_put((variables, z, cond, null))
    run = lambda: draw(*arguments)
    np.savez(folder / "ours.npz", latents=run())
    harness.serve(run, "jax", flops=plan.flops(jax.make_jaxpr(draw)(*arguments)))


def peer_draw(folder: pathlib.Path, compiled: bool) -> None:
    import diffusers
    import torch

    net, data = by_diffusers("unet", folder).eval(), tensors(inputs())
    forward = torch.compile(net) if compiled else net
    made = diffusers.EulerDiscreteScheduler(**SCHEDULE)
    text = torch.cat([torch.zeros_like(data["seq"][:1]), data["seq"][:1]])

    @torch.inference_mode()
    def run():
        made.set_timesteps(STEPS)
        z = data["z"][:1] * made.init_noise_sigma
        for t in made.timesteps:
            scaled = made.scale_model_input(torch.cat([z, z]), t)
            null, out = forward(scaled, t, text).sample.chunk(2)
            z = made.step(null + SCALE * (out - null), t, z).prev_sample
        return z

    np.savez(folder / "peer.npz", latents=run().numpy().transpose(0, 2, 3, 1))
    harness.serve(run, "torch")


def ours_vae(way: str, folder: pathlib.Path) -> None:
    import jax

    from t2i_jax.commands import plan
    from t2i_jax.models.types import Moments

    data = inputs()
    module, variables = opened("vae", folder, Moments, data["image"])
    given = jax.device_put(data["image" if way == "encode" else "latent"])
    method = "__call__" if way == "encode" else "decode"
    apply = jax.jit(functools.partial(module.apply, method=method))
    run = lambda: apply(variables, given)
    np.savez(folder / "ours.npz", out=jax.tree.leaves(run())[0])
    harness.serve(run, "jax", flops=plan.flops(jax.make_jaxpr(apply)(variables, given)))


def peer_vae(way: str, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    net, data = by_diffusers("vae", folder).eval(), tensors(inputs())
    if way == "encode":
        apply = lambda x: net.encode(x).latent_dist.mean
    else:
        apply = lambda x: net.decode(x).sample
    apply = torch.compile(apply) if compiled else apply
    given = data["image" if way == "encode" else "latent"]

    @torch.inference_mode()
    def run():
        return apply(given)

    np.savez(folder / "peer.npz", out=run().numpy().transpose(0, 2, 3, 1))
    harness.serve(run, "torch")


def ours_attention(folder: pathlib.Path) -> None:
    import jax

    from t2i_jax.models import attention

    *given, out = heads()
    apply = jax.jit(lambda *x: jax.vjp(attention.attention, *x[:3])[1](x[3]))
    arguments = jax.device_put((*given, out))
    np.savez(folder / "ours.npz", *(np.asarray(x) for x in apply(*arguments)))
    harness.serve(lambda: apply(*arguments), "jax")


def peer_attention(folder: pathlib.Path, compiled: bool) -> None:
    import torch

    torch.set_num_threads(harness.THREADS)
    *given, out = (torch.from_numpy(x.transpose(0, 2, 1, 3).copy()) for x in heads())
    attend = torch.nn.functional.scaled_dot_product_attention
    attend = torch.compile(attend) if compiled else attend
    given = [x.requires_grad_() for x in given]
    run = lambda: torch.autograd.grad(attend(*given), given, out)
    np.savez(folder / "peer.npz", *(x.numpy().transpose(0, 2, 1, 3) for x in run()))
    harness.serve(run, "torch")


def heads():
    """Queries, keys, values and the output's gradient of a U-net's outer attention, BTNH."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((BATCH, SIDE**2, 8, 12), np.float32) for _ in range(4)]


KINDS = ("eager", "compiled")


def steps(name: str):
    if harness.lacks("diffusers", f"pretrained/{name}"):
        return
    for kind in KINDS:
        arms = ("ours_step", name), (f"step_{kind}", name)
        yield harness.Case(f"pretrained/{name}/{kind}", *arms, BATCH, prepare=("prepare", name))


def draws():
    if harness.lacks("diffusers", "pretrained/draw"):
        return
    for kind in KINDS:
        arms, made = (("ours_draw",), (f"draw_{kind}",)), ("prepare", "unet")
        yield harness.Case(f"pretrained/draw/{kind}", *arms, 1, prepare=made, tolerance=1e-3)


def attentions():
    for kind in KINDS:
        arms = ("ours_attention",), (f"attention_{kind}",)
        yield harness.Case(f"pretrained/attention/{kind}", *arms, BATCH)


def vaes(way: str):
    if harness.lacks("diffusers", f"pretrained/{way}"):
        return
    for kind in KINDS:
        arms, made = (("ours_vae", way), (f"vae_{kind}", way)), ("prepare", "vae")
        yield harness.Case(f"pretrained/{way}/{kind}", *arms, 1, prepare=made)


ARMS = {
    "ours_attention": ours_attention,
    "prepare": prepare,
    "ours_step": ours_step,
    "ours_draw": ours_draw,
    "ours_vae": ours_vae,
}
for kind in KINDS:
    ARMS |= {
        f"{name}_{kind}": functools.partial(fn, compiled=kind == "compiled")
        for name, fn in (
            ("step", peer_step),
            ("draw", peer_draw),
            ("vae", peer_vae),
            ("attention", peer_attention),
        )
    }
PARTS = {name: functools.partial(steps, name) for name in ("unet", "dit")} | {
    "draw": draws,
    "attention": attentions,
}
PARTS |= {way: functools.partial(vaes, way) for way in ("decode", "encode")}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
