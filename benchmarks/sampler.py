"""A guided 25-step Euler sampler at batch 1 and 16 against PyTorch.   python -m benchmarks.sampler

Both compute the text's keys and values once and run conditioned and null halves as one batch; the
peer runs under inference_mode, eager and compiled. Parity: the pictures.
"""

import itertools
import pathlib
import sys
import tempfile

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


def ours(case: str, batch: int, folder: pathlib.Path) -> None:
    import jax
    import jax.numpy as jnp

    from t2i_jax.sampling import guidance, ode

    module, variables = cases.backbone(case), cases.variables(case)
    noise, both = jax.device_put(inputs(batch))

    @jax.jit
    def sample(variables, noise, both, scale):
        cond = jax.tree.map(lambda x: guidance.interleave(*jnp.split(x, 2)), cases.cond(both))
        text_kv = module.apply(variables, cond, method="text_kv")

        def velocity(z, t):
            return module.apply(variables, z, t, cond, text_kv)

        field = guidance.cfg(velocity, None, scale, guidance.ALWAYS)
        return ode.euler(field, noise, jnp.linspace(1.0, 0.0, STEPS + 1))

    scale = jax.device_put(np.float32(SCALE))

    def run():
        return jax.block_until_ready(sample(variables, noise, both, scale))

    np.savez(folder / "ours.npz", pictures=run())
    run()
    harness.serve({"versions": {"jax": jax.__version__}}, run)


def peer(case: str, batch: int, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    torch.set_num_threads(harness.THREADS)
    net = cases.peer(case, folder / "weights.npz").eval()
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
    run()
    harness.serve({"versions": {"torch": torch.__version__}}, run)


def main() -> None:
    if len(sys.argv) > 1:
        arm, case, batch, folder = sys.argv[1:]
        folder = pathlib.Path(folder)
        if arm == "ours":
            ours(case, int(batch), folder)
        else:
            peer(case, int(batch), folder, arm == "compiled")
        return
    for case in cases.CASES:
        for batch in BATCHES:
            with tempfile.TemporaryDirectory() as name:
                folder = pathlib.Path(name)
                harness.call("benchmarks.cases", case, str(folder / "weights.npz"))
                for kind in ("eager", "compiled"):
                    a = harness.Arm("benchmarks.sampler", "ours", case, str(batch), name)
                    b = harness.Arm("benchmarks.sampler", kind, case, str(batch), name)
                    same = harness.parity(folder / "ours.npz", folder / "peer.npz")
                    harness.compare(f"sampler/{case}/batch{batch}/{kind}", a, b, same, amount=batch)
                    a.close()
                    b.close()


if __name__ == "__main__":
    main()
