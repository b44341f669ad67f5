"""The Fréchet distance of 2048 features against torchmetrics' formula.

python -m benchmarks.fid [--check]

Both get means and covariances in float64; the peer takes the trace of the covariances' product's
root from its eigenvalues, as torchmetrics 1.9 does. The sets: spectra that fall as 1/i and to 1e-6,
fewer pictures than features, and two halves of one source, whose small distance takes ours the
careful route. Parity: the distance, to what the peer keeps: eigenvalues of a singular product are
right to the root of rounding only. The work is the least that is known, as ours does it where
rounding allows: a root of one covariance (Cholesky, N³/3), its two products with the other (3 N³)
and the eigenvalues of what results (4/3 N³).
"""

import pathlib

import numpy as np

from benchmarks import harness

WIDTH = 256 if harness.CHECK else 2048
WORK = (1 / 3 + 3 + 4 / 3) * WIDTH**3
SPECTRA = {"slow": np.arange(1.0, WIDTH + 1) ** -1, "steep": np.logspace(0, -6, WIDTH)}
CASES = {  # spectrum, pictures, how much the second set's features are stretched
    "slow": ("slow", 5000, 1.1),
    "steep": ("steep", 5000, 1.1),
    "few": ("slow", 1000, 1.1),
    "near": ("steep", 50_000, 1.0),
}
SETS = ("real", "fake")


def make(case: str, folder: pathlib.Path) -> None:
    from t2i_jax.quality import statistics

    spectrum, count, stretch = CASES[case]
    rng = np.random.default_rng(0)
    turn_DD = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    root_DD = np.sqrt(SPECTRA[spectrum])[:, None] * turn_DD
    for name, scale in zip(SETS, (1.0, stretch), strict=True):
        parts = (rng.standard_normal((1000, WIDTH)) @ root_DD * scale for _ in range(count // 1000))
        statistics.save(folder / f"{name}.npz", statistics.gather(parts), source={})


def read(folder: pathlib.Path):
    from t2i_jax.quality import statistics

    return [statistics.load(folder / f"{name}.npz", expected={}) for name in SETS]


def ours(case: str, folder: pathlib.Path) -> None:
    from t2i_jax.quality import statistics

    a, b = read(folder)
    run = lambda: statistics.frechet(a, b)
    np.savez(folder / "ours.npz", distance=[run()])
    harness.serve(run, "scipy", flops=WORK, dtype="float64")


def peer(case: str, folder: pathlib.Path) -> None:
    import torch

    torch.set_num_threads(harness.THREADS)
    mean_a, mean_b = (torch.from_numpy(s.mean_D) for s in read(folder))
    cov_a, cov_b = (torch.from_numpy(s.scatter_DD / (s.count - 1)) for s in read(folder))

    def run():
        shared = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
        apart = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
        return (apart - 2 * shared).item()

    np.savez(folder / "peer.npz", distance=[run()])
    harness.serve(run, "torch", dtype="float64")


def against():
    for case in CASES:
        arms = ("ours", case), ("peer", case)
        yield harness.Case(f"fid/{case}", *arms, 1, ("sets", case), tolerance=1e-5)


if __name__ == "__main__":
    harness.main({"distance": against}, {"sets": make, "ours": ours, "peer": peer})
