"""The Fréchet distance of 2048 features against torchmetrics' formula.   python -m benchmarks.fid

Both get means and covariances in float64; the peer takes the trace of the covariances' product's
root from its eigenvalues, as torchmetrics 1.9 does. The sets: spectra that fall as 1/i and to 1e-6,
fewer pictures than features, and two halves of one source, whose small distance takes ours the
careful route. Parity: the distance, to what the peer keeps: eigenvalues of a singular product are
right to the root of rounding only.
"""

import pathlib
import sys
import tempfile

import numpy as np

from benchmarks import harness

WIDTH = 2048
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


def ours(folder: pathlib.Path) -> None:
    import scipy

    from t2i_jax.quality import statistics

    a, b = read(folder)

    def run():
        return statistics.frechet(a, b)

    np.savez(folder / "ours.npz", distance=[run()])
    harness.serve({"versions": {"scipy": scipy.__version__}}, lambda: run() and None)


def peer(folder: pathlib.Path) -> None:
    import torch

    torch.set_num_threads(harness.THREADS)
    mean_a, mean_b = (torch.from_numpy(s.mean_D) for s in read(folder))
    cov_a, cov_b = (torch.from_numpy(s.scatter_DD / (s.count - 1)) for s in read(folder))

    def run():
        shared = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
        apart = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
        return (apart - 2 * shared).item()

    np.savez(folder / "peer.npz", distance=[run()])
    harness.serve({"versions": {"torch": torch.__version__}}, lambda: run() and None)


def main() -> None:
    if len(sys.argv) > 1:
        what, case, folder = sys.argv[1:]
        folder = pathlib.Path(folder)
        if what == "make":
            make(case, folder)
        else:
            {"ours": ours, "peer": peer}[what](folder)
        return
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            harness.call("benchmarks.fid", "make", case, name)
            a, b = (harness.Arm("benchmarks.fid", arm, case, name) for arm in ("ours", "peer"))
            same = harness.parity(folder / "ours.npz", folder / "peer.npz", 1e-5)
            harness.compare(f"fid/{case}", a, b, same, amount=1)
            a.close()
            b.close()


if __name__ == "__main__":
    main()
