"""The GAN's pictures and training steps against PyTorch, and its pictures against the flow model's.

python -m benchmarks.gan [draw] [train] [flow] [--check]

draw: one pass of the convolutional generator of configs/shapes_gan.py and of a U-net as it ships,
against the same networks in PyTorch (channels_last), eager and compiled, under inference_mode.
Parity: the pictures.
train: a step of configs/shapes_gan.py (64 pictures of 32 px, exact penalties, all contrastive
losses, averages) with Adam for both nets, captions' states ready on both sides. Parity: both losses
and both gradients' norms of the first step, to 1e-3: the discriminator's agree to 1e-6, but with
β₁ = 0 Adam's first update is a sign, which rounding decides where a gradient cancels, and the
generator's come after it. The work is what ours computes in a step as it is written.
flow: builtin:shapes-gan against builtin:shapes as they are sampled, 64 pictures, captions' states
ready, then with MiniLM in both. Each is held against the work of its own.
"""

import functools
import itertools
import pathlib

import numpy as np

from benchmarks import cases, harness

NETS, BATCHES = ("generator", "unet"), (1, 16, 64)
BATCH, STEPS_A_ROUND = (8, 1) if harness.CHECK else (64, 2)
PICTURES_A_ROUND = 4 if harness.CHECK else 512
FLOW, GAN = "builtin:shapes", "builtin:shapes-gan"


def generator(net: str):
    """(module, inputs -> z)"""
    from t2i_jax.models import gan

    if net == "unet":
        return gan.OneStep(cases.backbone("unet"), cases.RES), lambda data: data["z"]
    module = gan.Generator(**_sizes())
    return module, lambda data: data["z"].reshape(len(data["z"]), -1)[:, : module.noise]


def _sizes() -> dict:
    return train_config().model.gen.to_dict()


def passes(batch: int) -> int:
    return PICTURES_A_ROUND // batch


# --- one pass -------------------------------------------------------------------------------------


def draw_ours(net: str, size: str, folder: pathlib.Path) -> None:
    import jax

    from t2i_jax.commands import plan

    batch, (module, noise) = int(size), generator(net)
    data = cases.inputs(batch)
    if net == "unet":
        variables = cases.variables("unet", folder)
    else:
        variables = jax.jit(module.init)(jax.random.key(0), noise(data), cases.cond(data))
        variables = cases.moved(variables)
        cases.write(folder / "weights.npz", variables)
    variables, z, cond = jax.device_put((variables, noise(data), cases.cond(data)))
    apply = jax.jit(module.apply).lower(variables, z, cond).compile()
    np.savez(folder / "ours.npz", pictures=apply(variables, z, cond))

    products = plan.flops(jax.make_jaxpr(module.apply)(variables, z, cond))

    def run():
        for _ in range(passes(batch)):
            jax.block_until_ready(apply(variables, z, cond))

    harness.serve(run, "jax", flops=products * passes(batch))


def draw_peer(net: str, size: str, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    from benchmarks import peers

    torch.set_num_threads(harness.THREADS)
    batch, (_, noise) = int(size), generator(net)
    data = cases.inputs(batch)
    z = torch.from_numpy(noise(data))
    text = [torch.from_numpy(data[name]) for name in ("seq", "mask", "pooled")]
    if net == "unet":
        model, ones = cases.peer("unet", folder).eval(), torch.ones(batch)
        forward = torch.compile(model) if compiled else model
        one_pass = lambda: z - forward(z, ones, *text)
    else:
        flat = dict(np.load(folder / "weights.npz"))
        model = peers.Generator(flat, depth=1, heads=_sizes()["heads"]).eval()
        forward = torch.compile(model) if compiled else model
        one_pass = lambda: forward(z, *text)

    @torch.inference_mode()
    def run():
        for _ in range(passes(batch)):
            found = one_pass()
        return found

    np.savez(folder / "peer.npz", pictures=run().numpy())
    harness.serve(run, "torch")


# --- a training step ------------------------------------------------------------------------------


def train_config():
    from configs import shapes_gan

    config = shapes_gan.get_config()
    config.batch_size = BATCH
    for net in ("gen", "disc") if harness.CHECK else ():
        config.model[net].width = 32
    adam = dict(name="adam", learning_rate=4e-4, b1=0.0, b2=0.95, decay="cosine", final=0.25)
    config.optim = dict(disc=adam, gen=dict(adam))
    return config


def batch() -> dict[str, np.ndarray]:
    data = cases.inputs(BATCH)
    return {
        "image": np.tanh(data["target"]),
        "text": np.arange(BATCH * cases.LENGTH, dtype=np.int32).reshape(BATCH, -1),
        "mask": data["mask"],
        "cond_seq": data["seq"],
        "cond_pooled": data["pooled"],
        "index": np.arange(BATCH, dtype=np.int32),
        "weight": np.ones(BATCH, np.float32),
    }


def train_ours(folder: pathlib.Path) -> None:
    import jax

    from t2i_jax import objective, optim, randomness, step
    from t2i_jax.commands import plan
    from t2i_jax.models.types import Tokens

    arrays = batch()
    tokens = Tokens(arrays.pop("text"), arrays.pop("mask"))
    config, data = train_config(), jax.device_put(arrays | {"text": tokens})
    family = objective.make(config)
    made = jax.jit(family.init)(jax.random.key(0), data)
    nets = jax.device_put({name: cases.moved(made[name]) for name in family.trained})
    for name, net in nets.items():
        cases.write(folder / f"{name}.npz", net)
    z = np.zeros((2, BATCH, 64), np.float32)  # what the first step's two losses draw from
    for i in range(2):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 0), i)
        key_noise, *_ = jax.random.split(key, 3)
        keys_B = randomness.per_example(key_noise, data["index"])
        z[i] = randomness.normal_each(keys_B, z.shape[2:])
    np.savez(folder / "noise.npz", z=z)
    optimisers = {
        name: optim.make(spec, steps=config.steps, where="benchmark")
        for name, spec in config.optim.items()
    }
    state = step.start(optimisers, dict(config.ema), nets)
    update = step.make_update(family, optimisers, ema=dict(config.ema), seed=config.seed)
    frozen = {"text": made["text"]}
    products = plan.flops(jax.make_jaxpr(update)(state, frozen, data))
    update = jax.jit(update, donate_argnums=0).lower(state, frozen, data).compile()
    state, metrics = update(state, frozen, data)
    names = [f"{net}/{what}" for net in ("disc", "gen") for what in ("loss", "grad_norm")]
    np.savez(folder / "ours.npz", **{name: metrics[name] for name in names})

    def run():
        nonlocal state
        for _ in range(STEPS_A_ROUND):
            state, _ = update(state, frozen, data)
        return state

    harness.serve(run, "jax", flops=products * STEPS_A_ROUND)


def train_peer(folder: pathlib.Path, compiled: bool) -> None:
    """The same in PyTorch: softplus games, R1 and R2 of every fourth example, InfoNCE, Adam."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks import peers
    from t2i_jax.objectives import gan

    torch.set_num_threads(harness.THREADS)
    config = train_config()
    loss, sizes = gan.Options(**config.loss), config.model.gen
    load = lambda kind, name: kind(
        dict(np.load(folder / f"{name}.npz")), depth=1, heads=sizes.heads
    )
    nets = {"gen": load(peers.Generator, "gen"), "disc": load(peers.Discriminator, "disc")}
    gen, disc = nets["gen"], nets["disc"]
    # compiled but for the pass whose second derivatives are wanted
    draw, judge = (torch.compile(net) if compiled else net for net in (gen, disc))
    average = [p.detach().clone() for p in gen.parameters()]
    adams = {}
    for name, net in nets.items():
        betas = config.optim[name].b1, config.optim[name].b2
        adams[name] = torch.optim.Adam(net.parameters(), betas=betas, fused=True)
    data = batch()
    other = torch.from_numpy(np.roll(np.arange(BATCH), -1))  # all captions differ
    image = torch.from_numpy(data["image"])
    text = [torch.from_numpy(data[name]) for name in ("cond_seq", "mask", "cond_pooled")]
    some = lambda x: x[:: loss.penalty_stride]
    own = torch.arange(BATCH)
    steps = 0

    def info_nce(scores):
        scores = scores / loss.temperature
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    def contrast(seen):
        _, image_BD, regions, text_BD, words = seen
        scores = peers.word_scores(regions[:, None], words[None], text[1][None])
        return loss.sentence * info_nce(image_BD @ text_BD.T) + loss.word * info_nce(scores)

    def slope(pictures):
        pictures = pictures.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivatives
            logits = disc(pictures, [some(x) for x in text])[0][0]
        return torch.autograd.grad(logits.sum(), pictures, create_graph=True)[0].square().sum()

    def apply(name, value):
        spec, adam = config.optim[name], adams[name]
        cosine = 0.5 * (1 + np.cos(np.pi * steps / config.steps))
        adam.param_groups[0]["lr"] = spec.learning_rate * (spec.final + (1 - spec.final) * cosine)
        adam.zero_grad(set_to_none=True)
        value.backward(inputs=list(nets[name].parameters()))
        adam.step()
        return value.detach()

    def update(z_disc, z_gen):
        nonlocal steps
        with torch.no_grad():
            fake = draw(z_disc, *text)
        seen, (wrong, *_) = judge(image, text, [x[other] for x in text])
        ((drawn, *_),) = judge(fake, text)
        value = F.softplus(drawn - seen[0]).mean() + contrast(seen)
        value = value + loss.mismatch * F.softplus(wrong - seen[0]).mean()
        start, end = loss.gamma
        gamma = end + (start - end) * 0.5 * (1 + np.cos(np.pi * steps / config.steps))
        slopes = (slope(some(image)) + slope(some(fake))) / len(some(image))
        found = [apply("disc", value + 0.5 * gamma * slopes)]
        with torch.no_grad():
            real = judge(image, text)[0][0]
        (seen,) = judge(draw(z_gen, *text), text)
        found.append(apply("gen", F.softplus(real - seen[0]).mean() + contrast(seen)))
        decay = min(config.ema.gen, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(average, [p.detach() for p in gen.parameters()], 1 - decay)
        steps += 1
        return [float(value) for value in found]

    z = torch.from_numpy(np.load(folder / "noise.npz")["z"])
    found = dict(zip(("disc/loss", "gen/loss"), update(*z), strict=True))
    for name, net in nets.items():
        grads = [p.grad for p in net.parameters()]
        found[f"{name}/grad_norm"] = float(torch.nn.utils.get_total_norm(grads))
    np.savez(folder / "peer.npz", **found)

    def run():
        for _ in range(STEPS_A_ROUND):
            update(*torch.randn(z.shape))

    harness.serve(run, "torch")


# --- against the flow model -----------------------------------------------------------------------


def sample(source: str, text: str, _: pathlib.Path) -> None:
    """Draws pictures for captions by the model's own options."""
    import jax

    from t2i_jax import pipeline
    from t2i_jax.commands import plan
    from t2i_jax.data import shapes

    pipe = pipeline.Pipeline.load(source)
    captions = shapes.make(split="test", size=BATCH).captions()
    objective, config = pipe.predictor.objective, pipe.config
    data = pipe.predictor.batch([np.zeros((config.res, config.res, 3), np.uint8)] * BATCH, captions)
    nets, data = jax.device_put((pipe.nets, data))
    if text == "states":
        cond = jax.jit(objective.predict["encode"])(nets, data)
        data = data | {"cond_seq": cond.seq_BLD, "cond_pooled": cond.pooled_BD}
    options = config.sample.to_dict() | ({"steps": 2} if harness.CHECK and source == FLOW else {})
    draw = functools.partial(objective.predict["sample"], **options)
    arguments = nets, data, jax.random.key(0)
    draw, products = jax.jit(draw), plan.flops(jax.make_jaxpr(draw)(*arguments))
    harness.serve(lambda: draw(*arguments), "jax", flops=products)


def draw():
    for net, size, kind in itertools.product(NETS, BATCHES, ("eager", "compiled")):
        arms = ("draw", net, str(size)), (f"draw/{kind}", net, str(size))
        yield harness.Case(f"gan/draw/{net}/batch{size}/{kind}", *arms, passes(size) * size)


def train():
    for kind in ("eager", "compiled"):
        arms, images = (("train",), (f"train/{kind}",)), BATCH * STEPS_A_ROUND
        yield harness.Case(f"gan/train/{kind}", *arms, images, tolerance=1e-3)


def flow():
    for text in ("states", "text"):
        arms = ("sample", GAN, text), ("sample", FLOW, text)
        yield harness.Case(f"gan/flow/{text}", *arms, BATCH, tolerance=None)


ARMS = {
    "draw": draw_ours,
    "draw/eager": functools.partial(draw_peer, compiled=False),
    "draw/compiled": functools.partial(draw_peer, compiled=True),
    "train": train_ours,
    "train/eager": functools.partial(train_peer, compiled=False),
    "train/compiled": functools.partial(train_peer, compiled=True),
    "sample": sample,
}

if __name__ == "__main__":
    harness.main({"draw": draw, "train": train, "flow": flow}, ARMS)
