"""A whole training step against the same network in PyTorch.

python -m benchmarks.train_step [unet] [transformer] [--check]

Forward, backward, gradient norm and AdamW on one batch of 64 pictures of 32 px with captions of 24
tokens; the text encoder is left out on both sides. Parity: three losses in a row. The work is three
times the products of a forward pass, as a backward pass has two for each of them.
"""

import functools
import pathlib

import numpy as np

from benchmarks import cases, harness

BATCH, STEPS_A_ROUND = (8, 1) if harness.CHECK else (64, 4)
RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
SPEC = dict(learning_rate=RATE, b1=BETAS[0], b2=BETAS[1], clip=CLIP)


def ours(case: str, folder: pathlib.Path) -> None:
    import jax

    module, variables = cases.backbone(case), jax.device_put(cases.variables(case, folder))
    forward = lambda net, batch: module.apply(net, batch["z"], batch["t"], cases.cond(batch))
    harness.serve_steps(folder, forward, variables, cases.inputs(BATCH), SPEC, STEPS_A_ROUND)


def peer(case: str, folder: pathlib.Path, compiled: bool) -> None:
    import torch

    torch.set_num_threads(harness.THREADS)
    net = cases.peer(case, folder)
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

    harness.serve(run, "torch")


def against(case: str):
    images = BATCH * STEPS_A_ROUND
    for kind in ("eager", "compiled"):
        yield harness.Case(f"train_step/{case}/{kind}", ("ours", case), (kind, case), images)


ARMS = {
    "ours": ours,
    "eager": functools.partial(peer, compiled=False),
    "compiled": functools.partial(peer, compiled=True),
}
PARTS = {case: functools.partial(against, case) for case in cases.CASES}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
