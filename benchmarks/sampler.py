"""A guided 25-step Euler sampler at batch 1 and 16 against PyTorch.

python -m benchmarks.sampler [unet] [transformer] [--check]

Both compute the text's keys and values once and run conditioned and null halves as one batch; the
peer runs under inference_mode, eager and compiled. Parity: the pictures.
"""

import functools
import itertools
import pathlib

import numpy as np

from benchmarks import cases, harness

STEPS, SCALE, BATCHES = 25, 3.0, (1, 16)


def inputs(batch: int):
    """Conditioned and null captions one behind the other, noise for half as many pictures."""
    data = cases.inputs(batch)
    both = {name: np.concatenate([data[name], data[name]]) for name in ("seq", "mask", "pooled")}
    both["mask"][batch:] = False
    both["pooled"][batch:] = 0
    return data["z"], both


def ours(case: str, batch: str, folder: pathlib.Path) -> None:
    import jax
    import jax.numpy as jnp

    from t2i_jax.commands import plan
    from t2i_jax.sampling import guidance, ode

    module, variables = cases.backbone(case), jax.device_put(cases.variables(case, folder))
    noise, both = jax.device_put(inputs(int(batch)))

    @jax.jit
    def sample(variables, noise, both, scale):
        cond = jax.tree.map(lambda x: guidance.interleave(*jnp.split(x, 2)), cases.cond(both))
        text_kv = module.apply(variables, cond, method="prepare")

        def velocity(z, t):
            return module.apply(variables, z, t, cond, text_kv)

        field = guidance.cfg(velocity, None, scale, guidance.ALWAYS)
        return ode.euler(field, noise, jnp.linspace(1.0, 0.0, STEPS + 1))

    arguments = variables, noise, both, jax.device_put(np.float32(SCALE))
    run = lambda: sample(*arguments)
    np.savez(folder / "ours.npz", pictures=run())
    harness.serve(run, "jax", flops=plan.flops(jax.make_jaxpr(sample)(*arguments)))


def peer(case: str, batch: str, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    batch = int(batch)
    torch.set_num_threads(harness.THREADS)
    net = cases.peer(case, folder).eval()
    forward = torch.compile(net) if compiled else net
    noise, both = inputs(batch)
    noise = torch.from_numpy(noise)
    both = {name: torch.from_numpy(value) for name, value in both.items()}
    times = torch.linspace(1.0, 0.0, STEPS + 1)

    @torch.inference_mode()
    def run():
        text_kv, z = net.text_kv(both["seq"], both["mask"]), noise
        for t, following in itertools.pairwise(times):
            t_2B = t.expand(2 * batch)
            v = forward(torch.cat([z, z]), t_2B, None, None, both["pooled"], text_kv)
            conditioned, null = v.chunk(2)
            z = z + (following - t) * (null + SCALE * (conditioned - null))
        return z

    np.savez(folder / "peer.npz", pictures=run().numpy())
    harness.serve(run, "torch")


def against(case: str):
    for batch, kind in itertools.product(BATCHES, ("eager", "compiled")):
        name, arguments = f"sampler/{case}/batch{batch}/{kind}", (case, str(batch))
        arms = ("ours", *arguments), (kind, *arguments)
        yield harness.Case(name, *arms, batch)


ARMS = {
    "ours": ours,
    "eager": functools.partial(peer, compiled=False),
    "compiled": functools.partial(peer, compiled=True),
}
PARTS = {case: functools.partial(against, case) for case in cases.CASES}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
