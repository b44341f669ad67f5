"""A whole training step against the same network in PyTorch.   python -m benchmarks.train_step

Forward, backward, gradient norm and AdamW on one batch of 64 pictures of 32 px with captions of 24
tokens; the text encoder is left out on both sides. Parity: three losses in a row.
"""

import pathlib
import sys
import tempfile

import numpy as np

from benchmarks import cases, harness

BATCH, STEPS_A_ROUND = 64, 4
RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0


def ours(case: str, folder: pathlib.Path) -> None:
    import jax

    from t2i_jax import losses, optim, step
    from t2i_jax.objective import Aux, Loss, Objective

    module, data = cases.backbone(case), cases.inputs(BATCH)

    def loss(nets, batch, key, n):
        out = module.apply(nets["model"], batch["z"], batch["t"], cases.cond(batch))
        return losses.squared_error(out, batch["target"]).mean(), Aux()

    family = Objective(
        lambda key, batch: {"model": cases.variables(case)}, (Loss(("model",), loss),), {}
    )
    spec = dict(
        name="adamw", learning_rate=RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=0.0, clip=CLIP
    )
    optimisers = {"model": optim.make(spec, steps=1000, where="benchmark")}
    state = step.init(family, optimisers, {}, None, None)
    update = jax.jit(step.make_update(family, optimisers, ema={}), donate_argnums=0)
    data = jax.device_put(data | {"weight": np.ones(BATCH, np.float32)})
    update = update.lower(state, {}, data).compile()

    found = []
    for _ in range(3):
        state, metrics = update(state, {}, data)
        found.append(float(metrics["model/loss"]))
    np.savez(folder / "ours.npz", losses=found)

    def run():
        nonlocal state
        for _ in range(STEPS_A_ROUND):
            state, _ = update(state, {}, data)
        jax.block_until_ready(state)

    run()
    harness.serve({"versions": {"jax": jax.__version__}}, run)


def peer(case: str, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    torch.set_num_threads(harness.THREADS)
    net = cases.peer(case, folder / "weights.npz")
    forward = torch.compile(net) if compiled else net
    adam = torch.optim.AdamW(net.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)
    data = {name: torch.from_numpy(value) for name, value in cases.inputs(BATCH).items()}

    def update():
        out = forward(data["z"], data["t"], data["seq"], data["mask"], data["pooled"])
        loss = torch.nn.functional.mse_loss(out, data["target"])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        return loss.detach()

    np.savez(folder / "peer.npz", losses=[float(update()) for _ in range(3)])

    def run():
        for _ in range(STEPS_A_ROUND):
            update()

    run()
    harness.serve({"versions": {"torch": torch.__version__}}, run)


def main() -> None:
    if len(sys.argv) > 1:
        arm, case, folder = sys.argv[1:]
        folder = pathlib.Path(folder)
        ours(case, folder) if arm == "ours" else peer(case, folder, arm == "compiled")
        return
    for case in cases.CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            harness.call("benchmarks.cases", case, str(folder / "weights.npz"))
            for kind in ("eager", "compiled"):
                a = harness.Arm("benchmarks.train_step", "ours", case, name)
                b = harness.Arm("benchmarks.train_step", kind, case, name)
                same = harness.parity(folder / "ours.npz", folder / "peer.npz")
                images = BATCH * STEPS_A_ROUND
                harness.compare(f"train_step/{case}/{kind}", a, b, same, amount=images)
                a.close()
                b.close()


if __name__ == "__main__":
    main()
