"""The stream of batches: a pure function of the step, exactly once, whatever breaks."""

import collections
import contextlib
import threading
import time

import jax
import numpy as np
import pytest

from t2i_jax import errors
from t2i_jax.data import inputs, loader, transforms
from t2i_jax.models.types import Tokens
from t2i_jax.objective import Input


class Source:
    """Pictures whose left columns name their record, the right ones black; `broken` ones raise."""

    fingerprint = "test"

    def __init__(self, n, broken=()):
        self._n, self._broken = n, frozenset(broken)

    def __len__(self):
        return self._n

    def __getitem__(self, i):
        if i in self._broken:
            raise transforms.BadExample(f"broken picture: number {i}")
        image_HWC = np.zeros((4, 4, 3), np.uint8)
        image_HWC[:, :2] = i % 200 + 1
        return {"image": image_HWC, "caption": f"record {i}"}


class Tokenizer:
    length = 12

    def __call__(self, captions):
        ids_BL = np.zeros((len(captions), 12), np.int32)
        for row, caption in enumerate(captions):
            ids_BL[row, : len(caption[:12])] = [ord(c) for c in caption[:12]]
        return Tokens(ids_BL, ids_BL > 0), [caption[12:] for caption in captions]


def make(source, batch_size=8, seed=3, augment=(), more=(), **options):
    read = (inputs.picture(4, augment=augment), inputs.caption(Tokenizer()), *more)
    return loader.Loader(source, read, batch_size=batch_size, seed=seed, **options)


def records(batches):
    return np.concatenate([batch.records for batch in batches]).tolist()


def assert_same(a, b):
    assert a.arrays.keys() == b.arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, a.arrays, b.arrays)
    assert a.records.tolist() == b.records.tolist()
    assert a.bad == b.bad


def test_a_batch_has_the_arrays_of_the_contract():
    batch = make(Source(20)).batch(0)
    kind = lambda array: f"{array.dtype.name} {array.shape}"
    assert jax.tree.map(kind, batch.arrays) == {
        "image": "uint8 (8, 4, 4, 3)",
        "text": Tokens("int32 (8, 12)", "bool (8, 12)"),
        "index": "int32 (8,)",
        "weight": "float32 (8,)",
    }
    assert batch.records.dtype == np.int64
    assert batch.arrays["image"][:, 0, 0, 0].tolist() == (batch.records + 1).tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    used = make(Source(50), augment=("flip",))
    for step in (9, 0, 4):
        used.batch(step)
    assert_same(used.batch(3), make(Source(50), augment=("flip",)).batch(3))
    assert records([used.batch(3)]) != records([used.batch(4)])
    assert records([used.batch(3)]) != records([make(Source(50), seed=4).batch(3)])


def test_augmentation_differs_between_the_epochs_of_a_record():
    stream = make(Source(8), augment=("flip",))
    left_is_black = lambda step: (stream.batch(step).arrays["image"][:, 0, 0, 0] == 0).tolist()
    sides = {
        (record, side)
        for s in range(20)
        for record, side in zip(records([stream.batch(s)]), left_is_black(s), strict=True)
    }
    assert sides == {(record, side) for record in range(8) for side in (True, False)}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_epoch_holds_every_record_once_whatever_the_processes(processes):
    n, steps, whole = 52, 26, make(Source(52))  # 26 steps of 8 are four epochs of 52
    shares = [make(Source(n), share=(i, processes)) for i in range(processes)]
    found, index = [], []
    for step in range(steps):
        batches = [share.batch(step) for share in shares]
        found += records(batches)
        index += np.concatenate([b.arrays["index"] for b in batches]).tolist()
    assert found == records(whole.batch(step) for step in range(steps))
    assert index == list(range(8)) * steps
    epochs = [found[i : i + n] for i in range(0, len(found), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_positions_beyond_32_and_64_bits_are_exact():
    n, step = 7, 2**70
    found = records(make(Source(n), batch_size=7).batch(step + i) for i in range(3))
    assert [sorted(found[i : i + n]) for i in (0, n, 2 * n)] == [list(range(n))] * 3

    class Endless(Source):
        def __len__(self):
            return 2**33

    many = make(Source(1))
    many._source = Endless(2**33)
    assert max(records([many.batch(0)])) > 2**31


def test_iterate_gives_the_batches_in_order_from_any_step():
    stream = make(Source(30, broken=[4]), augment=("flip",))
    for start, stop in ((0, 12), (5, 9), (7, 7), (2**40, 2**40 + 2)):
        got = list(stream.iterate(start, stop))
        assert len(got) == stop - start
        for step, batch in enumerate(got, start):
            assert_same(batch, make(Source(30, broken=[4]), augment=("flip",)).batch(step))


def test_the_examples_of_one_batch_are_made_at_the_same_time(monkeypatch):
    monkeypatch.setattr(loader, "THREADS", 4)
    together = threading.Barrier(4)

    class Waiting(Source):
        def __getitem__(self, i):
            together.wait(timeout=10)
            return super().__getitem__(i)

    assert_same(make(Waiting(40), batch_size=16).batch(2), make(Source(40), batch_size=16).batch(2))


@pytest.mark.parametrize(("held", "ahead"), [(0, 2), (5 * 8 * (48 + 60), 5), (10**9, 16)])
def test_no_more_batches_are_made_in_advance_than_memory_allows(monkeypatch, held, ahead):
    monkeypatch.setattr(loader, "HELD", held)
    made = []
    stream = make(Source(1000))
    monkeypatch.setattr(loader, "read", lambda source, i: (made.append(i), source[i])[1])
    with contextlib.closing(stream.iterate(0)) as batches:
        for taken in (1, 2, 3):
            next(batches)
            deadline = time.monotonic() + 10
            while len(made) < 8 * (taken + ahead) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert len(made) == 8 * (taken + ahead)


def test_iterate_without_an_end_stops_its_threads_when_closed(readers):
    stream = make(Source(30)).iterate(0)
    next(stream)
    assert readers()
    stream.close()
    assert not readers(wait=5)


def test_an_unexpected_error_reaches_the_consumer_at_its_step():
    class Faulty(Source):
        def __getitem__(self, i):
            if i == 5:
                raise RuntimeError("a bug in the source")
            return super().__getitem__(i)

    step = next(s for s in range(8) if 5 in make(Source(64)).batch(s).records)
    batches = make(Faulty(64)).iterate(0, 8)
    for _ in range(step):
        next(batches)
    with pytest.raises(RuntimeError, match="a bug in the source"):
        next(batches)


def test_a_broken_example_keeps_its_slot_and_moves_nobody(monkeypatch):
    monkeypatch.setattr(loader, "THREADS", 1)  # parts of two examples
    good, bad = make(Source(40)), make(Source(40, broken=[7, 20]))
    arrays = lambda batch: jax.tree.leaves([batch.arrays["image"], batch.arrays["text"]])
    for step in range(5):
        a, b = good.batch(step), bad.batch(step)
        hit = np.isin(a.records, [7, 20])
        assert a.records.tolist() == b.records.tolist()
        assert b.arrays["weight"].tolist() == (1.0 - hit).tolist()
        assert [(slot, record) for slot, record, _ in b.bad] == [
            (slot, record) for slot, record in enumerate(a.records) if record in (7, 20)
        ]
        for ours, theirs in zip(*map(arrays, (a, b)), strict=True):
            np.testing.assert_array_equal(ours[~hit], theirs[~hit])
            assert not theirs[hit].any()


def test_too_many_broken_examples_stop_the_run_with_the_reasons(readers):
    stream = make(Source(400, broken=range(0, 400, 20)))
    message = r"5 of \d+ examples are broken: broken picture \(5\)"
    with pytest.raises(errors.DataError, match=message) as caught:
        collections.deque(stream.iterate(3, 50), maxlen=0)
    assert not readers(wait=5), caught
    assert len(stream.quarantine) == 5
    for record, (step, slot, reason) in stream.quarantine.items():
        assert (slot, record, reason) in stream.batch(step).bad


@pytest.mark.parametrize(
    ("n", "broken", "budget", "stops"),
    [
        (64, 3, 0.01, False),  # a few always pass
        (64, 4, 0.01, True),
        (64, 4, 0.1, False),
        (64, 1, 0.0, True),  # a budget of nothing means nothing
        (2000, 10, 0.01, False),
        (2000, 40, 0.01, True),
        (2, 2, 0.5, True),  # nothing to learn from
    ],
)
def test_the_budget_counts_distinct_records(n, broken, budget, stops):
    stream = make(Source(n, broken=range(broken)), bad_budget=budget).iterate(0, 2 * n // 8 + 1)
    if stops:
        with pytest.raises(errors.DataError, match="are broken"):
            collections.deque(stream, maxlen=0)
    else:
        collections.deque(stream, maxlen=0)


def test_a_source_smaller_than_a_batch_repeats_epoch_by_epoch():
    found = records(make(Source(3)).batch(step) for step in range(3))  # 24 = eight epochs
    assert [sorted(found[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8
    assert records([make(Source(1)).batch(5)]) == [0] * 8


def test_a_failed_read_is_tried_again_then_named(monkeypatch):
    monkeypatch.setattr(loader, "WAITS", (0.0, 0.0))

    class Flaky(Source):
        failures = 2

        def __getitem__(self, i):
            if i == 5 and self.failures:
                self.failures -= 1
                raise OSError(5, "Input/output error")
            return super().__getitem__(i)

    source = Flaky(8)
    assert_same(make(source).batch(0), make(Source(8)).batch(0))
    source.failures = 3
    with pytest.raises(errors.StorageError, match=r"Input/output error \(at record 5"):
        make(source).batch(0)


def test_a_cut_caption_is_told_once(caplog):
    class Long(Source):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"caption": "twelve lettr and the rest"}

    stream = make(Long(20))
    with caplog.at_level("WARNING"):
        stream.batch(0), stream.batch(1)
    assert caplog.text.count("loses ' and the rest'") == 1


def test_a_store_gives_each_record_its_row():
    store = np.arange(40, dtype=np.float16).reshape(20, 2)
    batch = make(Source(20, broken=[3]), more=(inputs.stored(store, "latents"),)).batch(1)
    there = batch.records != 3
    np.testing.assert_array_equal(batch.arrays["latents"][there], store[batch.records[there]])
    assert batch.arrays["latents"].dtype == np.float16
    assert not batch.arrays["latents"][~there].any()


def test_a_smaller_image_is_of_the_augmented_one():
    class Striped(Source):
        def __getitem__(self, i):
            image_HWC = np.zeros((4, 4, 3), np.uint8)
            image_HWC[:, :2] = 2 * i + 1
            return super().__getitem__(i) | {"image": image_HWC}

    arrays = make(Striped(40), augment=("flip",), more=(inputs.smaller(2),)).batch(0).arrays
    mean = arrays["image"].reshape(8, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_array_equal(arrays["low"], mean)
    assert len({image[0, 0, 0] > 0 for image in arrays["low"]}) == 2  # some are flipped


def test_a_record_keeps_its_hole_in_every_epoch():
    stream = make(Source(8), more=(inputs.hole(16),))
    holes = {}
    for step in range(4):
        batch = stream.batch(step)
        for record, hole in zip(batch.records, batch.arrays["hole"], strict=True):
            holes.setdefault(int(record), set()).add(hole.tobytes())
            rows, columns = np.nonzero(hole[..., 0])
            assert hole.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert 16 <= hole.sum() <= 144
    assert [len(seen) for seen in holes.values()] == [1] * 8
    assert len(set.union(*holes.values())) > 4


def test_an_input_that_refuses_one_example_breaks_that_one_alone(monkeypatch):
    monkeypatch.setattr(loader, "THREADS", 1)  # parts of two examples

    def refuse(examples, rngs, records):
        if 7 in records:
            raise transforms.BadExample("odd: of this family")
        return {"n": np.asarray(records)}

    odd = Input({"n": jax.ShapeDtypeStruct((), np.int64)}, refuse)
    whole, stream = make(Source(40)), make(Source(40), more=(odd,))
    for step in range(5):
        a, b = whole.batch(step), stream.batch(step)
        hit = a.records == 7
        assert b.arrays["weight"].tolist() == (1.0 - hit).tolist()
        assert [record for _, record, _ in b.bad] == [7] * hit.sum()
        np.testing.assert_array_equal(a.arrays["image"][~hit], b.arrays["image"][~hit])
        np.testing.assert_array_equal(b.arrays["n"][~hit], b.records[~hit])


def test_an_input_makes_what_it_says():
    wrong = Input({"n": jax.ShapeDtypeStruct((2,), np.int64)}, lambda e, g, r: {"n": np.asarray(r)})
    with pytest.raises(TypeError, match=r"says it makes .*\(1, 2.* makes .*\(1,"):
        make(Source(40), more=(wrong,), batch_size=1).batch(0)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "no examples"),
        (9, {"share": (0, 3)}, "does not divide by 3 processes"),
        (9, {"batch_size": 0}, "batch_size 0"),
        (9, {"augment": ("flop",)}, "did you mean 'flip'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(n, options, message):
    with pytest.raises(errors.Error, match=message):
        make(Source(n), **options)
