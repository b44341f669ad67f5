"""Metrics of quality: what must hold of each, and parity with code no one here wrote.

Features are pixels of the shapes' pictures, 8 × 8 × 3, unless a test needs others.
"""

import ast
import functools
import itertools
import pathlib
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from t2i_jax import errors
from t2i_jax.data import shapes
from t2i_jax.quality import classes, features, kernel, manifold, pixels, retrieval, statistics

COUNT = 300
CELLS = (9, 7, 5, 3, 1)  # left at each level of dropped classes
LEVELS = range(len(CELLS))


@functools.cache
def pictures(seed, cells=9):
    """Pictures of one object in the first so many cells.   -> uint8 (COUNT, 32, 32, 3)"""
    source = shapes.make(res=32, seed=seed)
    things = ((i, shapes.scene("train", seed, i).objects) for i in range(len(source)))
    chosen = (i for i, thing in things if len(thing) == 1 and thing[0].cell < cells)
    return np.stack([source[i]["image"] for i in itertools.islice(chosen, COUNT)])


def small(x_BHWC):
    """-> float64 (B, 192), of mean 0 and variance 1 for pictures of another seed"""
    mean_D, std_D = _moments()
    return (_pooled(x_BHWC) - mean_D) / std_D


def _pooled(x_BHWC):
    return x_BHWC.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(x_BHWC), -1)


@functools.cache
def _moments():
    x = _pooled(pictures(2))
    return x.mean(0), x.std(0)


def noisy(level, seed=0):
    noise = np.random.default_rng(0).standard_normal((COUNT, 32, 32, 3))
    return small((pictures(seed) + 40 * level * noise).clip(0, 255))


def blurred(level, seed=0):
    x = pictures(seed).astype(float)
    for _ in range(5 * level):
        for axis in (1, 2):
            x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 4
    return small(x)


def dropped(level, seed=0):
    return small(pictures(seed, CELLS[level]))


def gaussian(n, d, seed=0, *, condition=1.0, shift=0.0):
    """Features whose covariance has about that condition number in directions of its own."""
    rng = np.random.default_rng(seed)
    turn_DD = np.linalg.qr(rng.standard_normal((d, d)))[0]
    scale_D = np.logspace(0, -np.log10(condition) / 2, d)
    return rng.standard_normal((n, d)) * scale_D @ turn_DD + shift


def fid(x_ND, y_MD):
    return statistics.frechet(statistics.of(x_ND), statistics.of(y_MD))


def embedded(x_ND):
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


DISTANCES = {
    "fid": fid,
    "kid": lambda x, y: kernel.kid(x, y, subsets=1, subset_size=COUNT).mean,
    "cmmd": lambda x, y: kernel.cmmd(embedded(x), embedded(y)),
}


@pytest.mark.parametrize("distort", [noisy, blurred, dropped])
@pytest.mark.parametrize("name", DISTANCES)
def test_distances_grow_with_every_level_of_harm(name, distort):
    real = small(pictures(0))
    values = [DISTANCES[name](real, distort(level)) for level in LEVELS]
    assert np.all(np.diff(values) > 0), values


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_symmetric_and_blind_to_order(name):
    x, y = small(pictures(0)), noisy(2)
    value = DISTANCES[name](x, y)
    assert DISTANCES[name](y, x) == pytest.approx(value, rel=1e-9)
    rng = np.random.default_rng(0)
    assert DISTANCES[name](rng.permutation(x), rng.permutation(y)) == pytest.approx(value, rel=1e-9)


def test_shares_fall_with_what_they_measure():
    """Noise costs fidelity; dropped classes cost diversity, and no fidelity."""
    real = small(pictures(0))
    noise = [manifold.compare(real, noisy(level, 1)) for level in LEVELS]
    fewer = [manifold.compare(real, dropped(level, 1)) for level in LEVELS]
    for name in ("precision", "density"):
        assert np.all(np.diff([getattr(m, name) for m in noise]) <= 0), noise
    for name in ("recall", "coverage"):
        assert np.all(np.diff([getattr(m, name) for m in fewer]) < 0), fewer
    assert noise[-1].precision < 0.1 < 0.6 < noise[0].precision
    assert fewer[-1].recall < 0.5 * fewer[0].recall
    assert fewer[-1].precision > 0.9 * fewer[0].precision


# --- Fréchet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 20, 65, 500])
@pytest.mark.parametrize("condition", [1.0, 1e8, 1e15])
def test_a_set_is_at_distance_zero_from_itself_and_its_order(n, condition):
    x = gaussian(n, 64, condition=condition, shift=3.0)
    assert fid(x, x) == 0
    assert fid(x, x[::-1].copy()) == 0


def test_frechet_of_known_gaussians():
    """Equal covariances leave the means; commuting ones the difference of deviations."""
    x = gaussian(500, 16)
    assert fid(x, x + 0.5) == pytest.approx(16 * 0.25, rel=1e-12)
    variance = np.trace(np.cov(x.T))
    mean = np.square(x.mean(0)).sum()
    assert fid(x, 3 * x) == pytest.approx(4 * (variance + mean), rel=1e-12)
    assert fid(x, np.full((7, 16), 2.0)) == pytest.approx(variance + np.square(x.mean(0) - 2).sum())
    assert fid(np.ones((3, 4)), np.ones((3, 4))) == 0


CASES = {
    "many rows": ((400, 48, 1), (300, 48, 2), {}),
    "fewer rows than features": ((20, 48, 1), (300, 48, 2), {}),
    "fewer in both": ((20, 48, 1), (31, 48, 2), {}),
    "one row more than features": ((49, 48, 1), (49, 48, 2), {}),
    "nearly singular": ((400, 48, 1), (300, 48, 2), {"condition": 1e10}),
    "singular to rounding": ((400, 48, 1), (300, 48, 2), {"condition": 1e20}),
    "nearly singular, few rows": ((20, 48, 1), (300, 48, 2), {"condition": 1e10}),
}


def exact(x, y):
    """From singular values of the product of centred features: no covariance, nothing squared."""
    a, b = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (x, y))
    apart = np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum()
    return apart - 2 * linalg.svdvals(a @ b.T).sum()


@pytest.mark.parametrize("case", CASES)
def test_frechet_agrees_with_the_features_themselves(case):
    first, second, options = CASES[case]
    x, y = gaussian(*first, **options), gaussian(*second, shift=0.1, **options)
    assert fid(x, y) == pytest.approx(exact(x, y), rel=1e-7, abs=0)
    assert fid(y, x) == pytest.approx(exact(x, y), rel=1e-7, abs=0)


@pytest.mark.parametrize("case", CASES)
def test_frechet_agrees_with_scipys_root(case):
    first, second, options = CASES[case]
    x, y = gaussian(*first, **options), gaussian(*second, shift=0.1, **options)
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says itself that singular products are its limit
        root = linalg.sqrtm(cov_x @ cov_y)
    apart = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cov_x + cov_y)
    assert fid(x, y) == pytest.approx(apart - 2 * np.trace(root).real, rel=1e-6)


def test_small_distances_keep_their_digits():
    """A set and itself scaled by 1 + e are e² times its power apart, at any condition."""
    for condition in (1.0, 1e6, 1e12):
        x = gaussian(300, 48, condition=condition)
        power = np.trace(np.cov(x.T)) + np.square(x.mean(0)).sum()
        assert fid(x, x * 1.001) == pytest.approx(1e-6 * power, rel=1e-6, abs=0)


@pytest.mark.parametrize("tail", [1e-2, 1e-3])
def test_directions_that_one_set_lacks_count_in_full(tail):
    """Their roots are of the size of rounding in a product of covariances."""
    turn_DD = np.linalg.qr(np.random.default_rng(1).standard_normal((48, 48)))[0]
    small_DD = turn_DD[24:].T @ turn_DD[24:]
    x = gaussian(300, 48)
    x -= (1 - tail) * (x @ small_DD)
    y = x - x @ small_DD
    wanted = exact(x, y)
    assert 0 < wanted < 1e-3 * np.trace(np.cov(x.T))
    assert fid(x, y) == pytest.approx(wanted, rel=1e-6, abs=0)
    assert fid(y, x) == pytest.approx(wanted, rel=1e-6, abs=0)


def test_rounding_beyond_the_rank_does_not_count():
    """Two pictures have one direction; a second one of 1e-16 would cost 1e-8 of the distance."""
    for seed in range(300):
        x, y = gaussian(2, 2, seed, shift=1e3), gaussian(6, 2, seed + 1, shift=1e3)
        assert fid(x, y) == pytest.approx(exact(x, y), rel=1e-11, abs=0)


# --- statistics -----------------------------------------------------------------------------------


def same(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean_D, b.mean_D, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a.scatter_DD, b.scatter_DD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
def test_batches_give_what_one_pass_gives(batch, monkeypatch):
    monkeypatch.setattr(statistics, "ROWS", 16)
    x = gaussian(300, 24, condition=1e4, shift=5.0)
    whole = statistics.of(x)
    same(statistics.gather(x[i : i + batch] for i in range(0, len(x), batch)), whole)
    np.testing.assert_allclose(whole.scatter_DD / 299, np.cov(x.T), atol=1e-12)


def test_merging_in_any_order_gives_one_pass():
    x = gaussian(300, 24, shift=5.0)
    parts = [statistics.of(part) for part in np.split(x, [1, 50, 120])]
    for order in itertools.permutations(parts):
        same(functools.reduce(statistics.merge, order), statistics.of(x))


def test_a_large_mean_costs_no_digits():
    x = gaussian(300, 8)
    np.testing.assert_allclose(
        statistics.gather(np.split(x + 1e6, 10)).scatter_DD,
        statistics.of(x).scatter_DD,
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_any_real_dtype_is_summed_in_float64(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 200, (50, 5)), dtype)
    got = statistics.gather([x[:20], x[20:]])
    assert got.scatter_DD.dtype == np.float64
    same(got, statistics.of(np.asarray(x).astype(np.float64)))


def test_statistics_come_back_from_a_file(tmp_path):
    made, path = statistics.of(gaussian(20, 6)), tmp_path / "train.npz"
    statistics.save(path, made, source={"extractor": "ab", "data": "cd"})
    got = statistics.load(path, expected={"extractor": "ab"})
    assert got.count == made.count
    np.testing.assert_array_equal(got.mean_D, made.mean_D)
    np.testing.assert_array_equal(got.scatter_DD, made.scatter_DD)
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path, allow_pickle=False) as file:
        assert len(str(file["sha256"])) == 64
    with pytest.raises(errors.DataError, match="extractor ab → xy"):
        statistics.load(path, expected={"extractor": "xy"})
    with pytest.raises(errors.DataError, match="weights None → xy"):
        statistics.load(path, expected={"weights": "xy"})
    with pytest.raises(errors.DataError, match="not readable"):
        statistics.load(tmp_path / "none.npz", expected={})


def test_a_damaged_file_is_an_error_or_harmless(tmp_path):
    made, path = statistics.of(gaussian(20, 2)), tmp_path / "train.npz"
    statistics.save(path, made, source={"extractor": "ab"})
    data, rng, caught = path.read_bytes(), np.random.default_rng(0), 0
    for place in range(0, len(data), 3):
        bad = bytearray(data)
        bad[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            got = statistics.load(path, expected={"extractor": "ab"})
        except errors.DataError:
            caught += 1
        else:
            np.testing.assert_array_equal(got.scatter_DD, made.scatter_DD)
    assert caught > len(data) / 3 / 3
    path.write_bytes(data[:-30])
    with pytest.raises(errors.DataError, match=r"train\.npz"):
        statistics.load(path, expected={})


def test_changed_arrays_do_not_match_the_hash(tmp_path):
    path = tmp_path / "train.npz"
    statistics.save(path, statistics.of(gaussian(20, 2)), source={})
    with np.load(path) as file:
        values = dict(file)
    np.savez(path, **{**values, "mean_D": values["mean_D"] + 1})
    with pytest.raises(errors.DataError, match="SHA-256"):
        statistics.load(path, expected={})


# --- kernels --------------------------------------------------------------------------------------


def test_kid_of_one_source_is_zero_within_its_spread():
    """Unbiased: over halves of one world, values of both signs."""
    found = [
        kernel.kid(gaussian(100, 8, s), gaussian(100, 8, s + 50), subsets=1, subset_size=100).mean
        for s in range(40)
    ]
    turned = kernel.kid(gaussian(400, 8), gaussian(400, 8), subsets=20, subset_size=50)
    assert min(found) < 0 < max(found)
    assert abs(turned.mean) < 2 * turned.spread
    assert turned == kernel.kid(gaussian(400, 8), gaussian(400, 8), subsets=20, subset_size=50)


def test_cmmd_of_a_set_with_itself_is_zero():
    x = embedded(gaussian(60, 16))
    assert kernel.cmmd(x, x) == 0
    assert kernel.cmmd(x, x[::-1].copy()) == pytest.approx(0, abs=1e-12)


def test_cmmd_is_the_gaussian_kernels_mean():
    x, y = embedded(gaussian(40, 16)), embedded(gaussian(30, 16, 1, shift=0.2))
    mean = lambda a, b: np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 200).mean()
    wanted = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert kernel.cmmd(x, y) == pytest.approx(wanted, rel=1e-8, abs=0)


def test_cmmd_of_nearly_equal_sets_keeps_its_digits():
    """A shift by e is far below the last digit of the kernel's mean: e²/σ² to first order."""
    x = embedded(gaussian(40, 16))
    moved = x + 1e-7 * np.eye(16)[0]
    assert kernel.cmmd(x, moved) == pytest.approx(1000 * 1e-14 / 100, rel=0.05, abs=0)


# --- manifolds ------------------------------------------------------------------------------------


def test_blocks_do_not_change_anything(monkeypatch):
    x, y = small(pictures(0))[:60], small(pictures(1))[:50]
    wanted = manifold.compare(x, y), manifold.memorised(x, y), kernel.cmmd(x, y)
    monkeypatch.setattr(features, "BLOCK", 1000)
    got = manifold.compare(x, y), manifold.memorised(x, y), kernel.cmmd(x, y)
    assert got[0] == wanted[0]
    assert got[2] == pytest.approx(wanted[2], rel=1e-12)
    for a, b in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b)


def test_distances_are_right_and_copies_at_zero():
    x = gaussian(40, 30, shift=1e4)
    y = np.concatenate([x[:5], gaussian(20, 30, 1, shift=1e4)])
    ((_, got),) = features.squared_distances(x, y)
    wanted = np.square(x[:, None] - y[None]).sum(-1)
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert np.all(np.diagonal(got)[:5] == 0)


def test_manifolds_by_hand():
    """On a line."""
    real, fake = np.array([[0.0], [1], [2], [10]]), np.array([[0.5], [5], [30], [31], [32]])
    got = manifold.compare(real, fake, k=1, density_k=1)
    # Real radii 1, 1, 1, 8; fake radii 4.5, 4.5, 1, 1, 1.
    assert got.precision == 2 / 5
    assert got.recall == 3 / 4
    assert got.density == (2 + 1) / 5
    assert got.coverage == 3 / 4


@pytest.mark.parametrize("times", [1, 8])
def test_a_set_covers_itself(times):
    """Also where neighbours are copies and the radius is 0."""
    x = np.repeat(small(pictures(0))[:60], times, 0)
    got = manifold.compare(x, x[::-1].copy())
    assert got.precision == got.recall == got.coverage == 1
    far = manifold.compare(x, x + 100)
    assert far == (0, 0, 0, 0)


def test_density_and_coverage_of_one_source_are_what_the_paper_expects():
    """Naeem et al. 2020: 1, and 1 - 1/2⁵ for large sets of one size, whatever the width."""
    x, y = np.random.default_rng(0).standard_normal((2, 800, 16))
    got = manifold.compare(x, y)
    assert got.density == pytest.approx(1, abs=0.1)
    assert got.coverage == pytest.approx(1 - 0.5**5, abs=0.03)


def test_copies_of_the_training_set_are_found():
    train, fresh = small(pictures(0)), small(pictures(1))
    shares = []
    for copies in (0, 30, 60, 150, 300):
        fake = np.concatenate([train[:copies] + 1e-4, fresh[copies:]])
        got = manifold.memorised(train, fake)
        np.testing.assert_array_equal(got.index_M[:copies], np.arange(copies))
        shares.append(got.share)
    assert np.all(np.diff(shares) > 0.05)
    assert shares[0] < 0.2
    assert shares[-1] == 1
    exact = manifold.memorised(np.repeat(train[:5], 2, 0), train[:5])  # twice in the training set
    assert exact.share == 1
    assert np.all(exact.distance_M == 0)


# --- classes --------------------------------------------------------------------------------------


def test_inception_score_counts_sure_and_varied_classes():
    sure = np.eye(10)[np.arange(200) % 10]
    assert classes.inception_score(sure).mean == pytest.approx(10)
    assert classes.inception_score(sure, splits=1).spread == 0
    assert classes.inception_score(np.full((200, 10), 0.1)).mean == pytest.approx(1)
    assert classes.inception_score(np.eye(10)[np.zeros(200, int)]).mean == pytest.approx(1)
    unsure = [
        classes.inception_score(sure * (1 - e) + e / 10).mean for e in (0, 0.1, 0.2, 0.4, 0.8)
    ]
    gone = [classes.inception_score(np.eye(10)[np.arange(200) % k]).mean for k in (10, 8, 6, 4, 2)]
    assert np.all(np.diff(unsure) < 0)
    assert np.all(np.diff(gone) < 0)


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [pixels.psnr, pixels.ssim])
def test_pixel_metrics_fall_with_noise_and_are_symmetric(metric):
    x = pictures(0)[:6]
    noise = np.random.default_rng(0).standard_normal(x.shape)
    harmed = [np.clip(x + 20 * level * noise, 0, 255).astype(np.uint8) for level in range(1, 6)]
    values = [metric(x, y) for y in harmed]
    assert np.all(np.diff(np.stack(values), axis=0) < 0)
    np.testing.assert_allclose(metric(harmed[1], x), values[1], rtol=1e-12)
    np.testing.assert_allclose(metric(x[:1], harmed[0][:1]), values[0][:1], rtol=1e-12)
    best = metric(x, x.copy())
    np.testing.assert_allclose(best, np.inf if metric is pixels.psnr else 1, rtol=1e-14)


@pytest.mark.parametrize("metric", [pixels.psnr, pixels.ssim])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_spans_say_the_same(metric, dtype):
    x, y = pictures(0)[:3], pictures(1)[:3]
    wanted = metric(x, y)
    unit = [(v / 255).astype(dtype) for v in (x, y)]
    np.testing.assert_allclose(metric(*unit, span=(0, 1)), wanted, rtol=1e-5)
    signed = [jnp.asarray(v * 2 - 1) for v in unit]
    np.testing.assert_allclose(metric(*signed, span=(-1, 1)), wanted, rtol=1e-5)
    assert not jax.config.jax_enable_x64


# --- retrieval ------------------------------------------------------------------------------------


def test_recall_at_k_by_hand():
    similarity = np.array([[3.0, 2, 1], [3, 1, 2], [1, 2, 3]])
    assert [retrieval.recall_at(similarity, k) for k in (1, 2, 3)] == [2 / 3, 2 / 3, 1]
    assert retrieval.recall_at(similarity, 1, truth_Q=[0, 0, 0]) == 2 / 3
    assert retrieval.recall_at(similarity[:2, :1], 1, truth_Q=[0, 0]) == 1


def test_a_model_that_says_nothing_gets_chance():
    assert retrieval.recall_at(np.zeros((50, 50)), 5) == pytest.approx(0.1)
    assert retrieval.r_precision(np.zeros((120, 120))) == pytest.approx(0.01)
    noise = np.random.default_rng(0).standard_normal((2000, 100))
    assert retrieval.recall_at(noise, 10, truth_Q=np.arange(2000) % 100) == pytest.approx(
        0.1, abs=0.02
    )


def test_retrieval_falls_with_noise():
    noise = np.random.default_rng(0).standard_normal((200, 200))
    for measure in (
        lambda s: retrieval.recall_at(s, 1),
        lambda s: retrieval.r_precision(s, candidates=50),
    ):
        values = [measure(np.eye(200) + 0.3 * level * noise) for level in LEVELS]
        assert values[0] == 1
        assert np.all(np.diff(values) < 0)


def test_r_precision_draws_others_without_the_own_caption():
    similarity = np.random.default_rng(0).standard_normal((30, 30))
    everyone = retrieval.r_precision(similarity, candidates=30)
    assert everyone == retrieval.recall_at(similarity, 1)
    order = np.random.default_rng(1).permutation(30)
    assert retrieval.recall_at(similarity[order][:, order], 3) == retrieval.recall_at(similarity, 3)


# --- bad input ------------------------------------------------------------------------------------

GOOD = gaussian(20, 4)
HOLE = np.where(np.arange(80).reshape(20, 4) == 29, np.nan, GOOD)
WIDE = gaussian(20, 5)
UINT8 = np.zeros((1, 16, 16, 3), np.uint8)
FLOAT = np.zeros((1, 16, 16, 3))
BAD = {
    "not finite, first in row 7": lambda: statistics.of(HOLE),
    "batch 1 features are not finite": lambda: statistics.gather([GOOD, HOLE]),
    "no features at all": lambda: statistics.gather([]),
    "given features are 0 × 4": lambda: statistics.of(GOOD[:0]),
    "not a matrix of numbers": lambda: statistics.of(GOOD[0]),
    "complex128": lambda: statistics.of(GOOD * 1j),
    "'batch 0': 4, 'batch 1': 5": lambda: statistics.gather([GOOD, WIDE]),
    "unequal widths: 4 and 5": lambda: fid(GOOD, WIDE),
    "widths: 4 and 5": lambda: statistics.merge(statistics.of(GOOD), statistics.of(WIDE)),
    "first set has 1 picture": lambda: fid(GOOD[:1], GOOD),
    "second set's statistics are not finite": lambda: statistics.frechet(
        statistics.of(GOOD), statistics.of(GOOD)._replace(mean_D=np.full(4, np.inf))
    ),
    "fake features are 1 × 4": lambda: kernel.kid(GOOD, GOOD[:1]),
    "subsets of 1000 of 20 real": lambda: kernel.kid(GOOD, GOOD),
    "real features are not finite": lambda: kernel.cmmd(HOLE, GOOD),
    "'real': 4, 'fake': 5": lambda: manifold.compare(GOOD, WIDE),
    "5 neighbours among 5 real": lambda: manifold.compare(GOOD[:5], GOOD),
    "3 neighbours among 3 fake": lambda: manifold.compare(GOOD, GOOD[:3]),
    "train features are 1 × 4": lambda: manifold.memorised(GOOD[:1], GOOD),
    "ratio is 2": lambda: manifold.memorised(GOOD, GOOD, ratio=2),
    "rows sum to": lambda: classes.inception_score(GOOD),
    "10 splits of 5": lambda: classes.inception_score(np.eye(5)),
    "float pictures within None": lambda: pixels.psnr(FLOAT, FLOAT),
    "uint8 pictures within": lambda: pixels.psnr(UINT8, UINT8, span=(0, 1)),
    "pictures are uint8": lambda: pixels.psnr(UINT8, FLOAT),
    "values from -1 to -1": lambda: pixels.psnr(FLOAT, FLOAT - 1, span=(0, 1)),
    "values from nan": lambda: pixels.ssim(FLOAT * np.nan, FLOAT, span=(0, 1)),
    "pictures of 10 × 16": lambda: pixels.ssim(UINT8[:, :10], UINT8[:, :10]),
    "no finite matrix": lambda: retrieval.recall_at(HOLE, 1),
    "places up to 19": lambda: retrieval.recall_at(GOOD, 1),
    "k is 5": lambda: retrieval.recall_at(GOOD[:4], 5),
    "20 pictures and 4 captions": lambda: retrieval.r_precision(GOOD),
    "100 candidates of 4": lambda: retrieval.r_precision(GOOD[:4]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message):
    with pytest.raises((errors.DataError, errors.ConfigError)) as caught:
        BAD[message]()
    assert message in caught.value.what
    assert caught.value.where
    assert caught.value.fix


# --- parity ---------------------------------------------------------------------------------------


def test_ssim_and_psnr_agree_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x, rng = pictures(0)[:4], np.random.default_rng(0)
    y = (x + 25 * rng.standard_normal(x.shape)).clip(0, 255).astype(np.uint8)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)
    for a, b, high, span in ((x, y, 255, None), (x / 255, y / 255, 1.0, (0, 1))):
        pairs = list(zip(a, b, strict=True))
        wanted = [metrics.structural_similarity(p, q, data_range=high, **options) for p, q in pairs]
        np.testing.assert_allclose(pixels.ssim(a, b, span=span), wanted, rtol=1e-9)
        wanted = [metrics.peak_signal_noise_ratio(p, q, data_range=high) for p, q in pairs]
        np.testing.assert_allclose(pixels.psnr(a, b, span=span), wanted, rtol=1e-12)


def identity(width):
    """A torch module that hands torchmetrics the features it is given."""
    import torch

    module = torch.nn.Identity()
    module.num_features = width
    return module


def updated(metric, x, y):
    import torch

    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    return metric.compute()


def test_frechet_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.fid")
    for n, m in ((300, 200), (200, 200)):
        x, y = gaussian(n, 48, 1), gaussian(m, 48, 2, shift=0.1)
        wanted = updated(image.FrechetInceptionDistance(feature=identity(48)), x, y)
        assert fid(x, y) == pytest.approx(float(wanted), rel=1e-6)


def test_frechet_agrees_with_pytorch_fid():
    """Its function alone: the package wants torchvision, and SciPy 1.18's `sqrtm` has no `disp`."""
    package = pytest.importorskip("pytorch_fid")
    source = (pathlib.Path(package.__file__).parent / "fid_score.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if getattr(node, "name", "") == "calculate_frechet_distance"
    )
    sqrtm = lambda x_DD, disp=True: linalg.sqrtm(x_DD) if disp else (linalg.sqrtm(x_DD), None)
    theirs = {"np": np, "linalg": types.SimpleNamespace(sqrtm=sqrtm)}
    exec(ast.unparse(function), theirs)
    sets = {
        "many": (gaussian(300, 48, 1), gaussian(200, 48, 2, shift=0.1)),
        "near": (gaussian(4000, 48, 1), gaussian(4000, 48, 2)),
        "flat": (gaussian(300, 48, 1) * np.logspace(0, -3, 48), gaussian(300, 48, 2)),
    }
    for name, (x, y) in sets.items():
        moments = [m for z in (x, y) for m in (z.mean(0), np.cov(z, rowvar=False))]
        wanted = theirs["calculate_frechet_distance"](*moments)
        assert fid(x, y) == pytest.approx(wanted, rel=1e-6), name


@pytest.mark.filterwarnings("ignore:.*features in buffer")
def test_kid_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.kid")
    x, y = gaussian(80, 48, 1), gaussian(80, 48, 2, shift=0.1)
    metric = image.KernelInceptionDistance(feature=identity(48), subsets=3, subset_size=80)
    mean, std = updated(metric, x, y)
    got = kernel.kid(x, y, subsets=3, subset_size=80)
    assert got.mean == pytest.approx(float(mean), rel=1e-6)
    assert got.spread == pytest.approx(float(std), abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*features in buffer", "ignore:std.*degrees of freedom")
def test_inception_score_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.inception")
    import torch

    logits = torch.randn(60, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = image.InceptionScore(feature=identity(10), splits=1)
    metric.set_dtype(torch.float64)
    metric.update(logits)
    wanted = float(metric.compute()[0])
    got = classes.inception_score(logits.softmax(1).numpy(), splits=1)
    assert got.mean == pytest.approx(wanted, rel=1e-6, abs=0)
