"""From a position in the stream to a batch, as a pure function: nothing to save but the step.

position = step × batch_size + slot; epoch and place in it follow by division; the record is a keyed
permutation of (seed, epoch). A broken example keeps its slot with weight 0, so no other slot moves.

B examples of this process · H W pixels · C channels · L text length
"""

import collections
import concurrent.futures
import contextlib
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from grain.experimental import index_shuffle

from t2i_jax import errors, plugins
from t2i_jax.data import inputs, transforms

FEW = 3  # broken examples pass whatever the budget, unless it is 0
JUDGED = 1000  # records (or all, where fewer) that a share of broken ones is taken of, at least
WAITS = (0.1, 1.0, 5.0)  # seconds before a failed read is tried again
# Pictures are decoded and resized without Python's lock: one thread for each core of this process.
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AHEAD = range(2, 17)  # batches made in advance: as many of these as HELD allows
HELD = 2**28  # bytes of their arrays


def make_source(config, **overrides):
    """The training data that config.data describes; `overrides` such as split="test"."""
    return plugins.source(
        {**config.data, **overrides}, where="config.data", res=config.size or config.res
    )


class Batch(NamedTuple):
    """One process's share of a global batch.

    arrays: what the inputs make, images as uint8 BHWC until they are on the devices
      (`Layout.place`); "index" int32 B, the slot in the global batch; "weight" float32 B. Numpy.
    records: the examples' numbers in the source, int64 B.
    bad: (slot, record, reason) of each broken example: weight 0, zeros, so an empty caption.
    """

    arrays: dict
    records: np.ndarray
    bad: list


class Loader:
    """`loader.batch(step) -> Batch`, and the same read ahead in the background by `iterate`.

    A source smaller than a batch repeats within it: positions go on into the next epoch.

    Args:
      source: has len, [i] -> {"image": uint8 HWC, "caption": str}, fingerprint; read by threads.
        An example may have a "weight" in the loss. where(i), the file of an example, is for
        messages, if the source has that.
      inputs: `objective.Input`s, made in this order. More may be added before the first batch.
      batch_size: over all processes.
      share: (i, n): this process makes the i-th of n equal slices of the slots.
      seed: of the order and of what inputs draw.
      bad_budget: share of broken examples at which `iterate` stops; see there.
    """

    def __init__(
        self,
        source,
        inputs,
        *,
        batch_size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
        bad_budget: float = 0.01,
    ):
        if not len(source):
            raise errors.DataError(
                "no examples", where="config.data", fix="give a source with some"
            )
        index, parts = share
        if batch_size < 1 or batch_size % parts:
            raise errors.ConfigError(
                f"batch_size {batch_size} does not divide by {parts} processes",
                where="config.batch_size",
                fix=f"use a multiple of {parts}",
            )
        self.inputs = tuple(inputs)
        self.quarantine = {}  # record -> (step, slot, reason) of its first sight by `iterate`
        self._source, self._batch_size, self._seed = source, batch_size, seed
        size = batch_size // parts
        self._slots = range(index * size, (index + 1) * size)
        self._budget = bad_budget
        self._seen = np.zeros(len(source), bool)
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "examples")
        # With it the threads make that batch first which is asked for first.
        self._in_order = threading.Lock()

    def batch(self, step: int) -> Batch:
        """The batch of a step, the same whenever it is asked for."""
        # Parts are handed out under the lock and awaited outside: the next batch's queue up behind.
        with self._in_order:
            positions = [int(step) * self._batch_size + slot for slot in self._slots]
            records = np.array([self._record(position) for position in positions], np.int64)
            b = len(records)
            shapes = {key: s for one in self.inputs for key, s in one.shapes.items()}
            # Zeros, not empty memory: the row of a broken example stays as it is here.
            arrays = jax.tree.map(lambda s: np.zeros((b, *s.shape), s.dtype), shapes)
            weight_B = np.zeros(b, np.float32)

            def fill(rows):
                """Fills the rows that can be.   -> (row, reason) of the others"""
                try:
                    examples = [read(self._source, int(records[row])) for row in rows]
                    # Keyed by the position, so neither threads nor processes nor a restart change
                    # the draws.
                    seeds = [(self._seed, positions[row]) for row in rows]
                    rngs = [np.random.default_rng(seed) for seed in seeds]
                    made = inputs.arrays(self.inputs, examples, rngs, records[rows])
                except transforms.BadExample as e:
                    if len(rows) == 1:
                        return [(rows[0], str(e))]
                    # One of them is broken: alone each says whether it is the one.
                    return [bad for row in rows for bad in fill([row])]
                # No two threads have a row in common, so this needs no lock.
                jax.tree.map(lambda array, part: array.__setitem__(rows, part), arrays, made)
                weight_B[rows] = [example.get("weight", 1.0) for example in examples]
                return []

            size = -(-b // (4 * THREADS))  # small parts, so that all threads end together
            parts = [list(range(b))[first : first + size] for first in range(0, b, size)]
            broken = self._threads.map(fill, parts)
        bad = [
            (self._slots[row], int(records[row]), reason)
            for row, reason in itertools.chain.from_iterable(broken)
        ]
        arrays |= {"index": np.array(self._slots, np.int32), "weight": weight_B}
        return Batch(arrays, records, bad)

    def iterate(self, start: int, stop: int | None = None) -> Iterator[Batch]:
        """Batches start … stop − 1 in order, made ahead in the background; without stop, for ever.

        Broken records are counted once each, by each process among its own, as they come; those
        met are in `quarantine`.

        Raises:
          DataError: too many examples are broken: more than `bad_budget` of the records seen, or
            all. At least 1000 (or all, of a smaller source) count as seen. Three broken ones
            always pass, unless the budget is 0.
          StorageError: an example could not be read, four times within six seconds.
        """
        shapes = jax.tree.leaves([one.shapes for one in self.inputs])
        example = sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in shapes)
        ahead = HELD // (len(self._slots) * max(example, 1))
        ahead = min(max(ahead, AHEAD[0]), AHEAD[-1])
        # One thread of grain for each batch in the making. It mostly waits for the pool's threads.
        reading = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        # A range of grain needs an end.
        stop = sys.maxsize if stop is None else stop
        steps = grain.MapDataset.range(start, stop)
        # Unclosed, grain's threads would live on after the consumer has stopped.
        with contextlib.closing(iter(steps.map(self.batch).to_iter_dataset(reading))) as batches:
            for step, batch in enumerate(batches, start):
                self._count(step, batch)
                yield batch

    def _record(self, position: int) -> int:
        n = len(self._source)
        epoch, place = divmod(position, n)
        # SeedSequence mixes both, so neighbouring seeds and epochs have unrelated orders.
        key = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        # A keyed permutation finds any place without a list of all. Four rounds are its least.
        return int(index_shuffle(place, max_index=n - 1, seed=key, rounds=4))

    def _count(self, step: int, batch: Batch) -> None:
        self._seen[batch.records] = True
        for slot, record, reason in batch.bad:
            self.quarantine.setdefault(record, (step, slot, reason))
        if batch.bad:
            reasons = {record: reason for record, (*_, reason) in self.quarantine.items()}
            check_broken(self._source, reasons, int(self._seen.sum()), self._budget)


def check_broken(source, reasons, seen: int, budget: float) -> None:
    """Raises DataError where more examples are broken than a share of those seen may be.

    reasons: record -> what is wrong with it.
    """
    broken, n = len(reasons), len(source)
    allowed = budget * max(seen, min(n, JUDGED))
    if broken and (broken == n or broken > max(allowed, FEW if budget else 0)):
        kinds = collections.Counter(reason.split(":")[0] for reason in reasons.values())
        raise errors.DataError(
            f"{broken} of {seen} examples are broken: "
            + "; ".join(f"{kind} ({count})" for kind, count in kinds.most_common(3)),
            where=", ".join(_where(source, record) for record in sorted(reasons)[:5]),
            fix="mend or remove them, or raise config.bad_budget",
        )


def read(source, record: int) -> dict:
    """An example, which is asked for again where a disk or network fails for a while.

    Raises:
      StorageError: it goes on failing.
    """
    for wait in (*WAITS, None):
        try:
            return source[record]
        except OSError as e:
            if wait is None:
                raise errors.StorageError(
                    f"cannot be read: {e}",
                    where=_where(source, record),
                    fix="check the disk or network that holds the data",
                ) from e
            logging.warning("%s: %s; trying again in %g s", _where(source, record), e, wait)
            time.sleep(wait)


def _where(source, record: int) -> str:
    return source.where(record) if hasattr(source, "where") else f"record {record}"


def sound(source, records) -> Iterator[tuple[int, dict]]:
    """(record, example) of the given records that are not broken; warns of the first that are."""
    for record in records:
        try:
            yield record, read(source, int(record))
        except transforms.BadExample as e:
            logging.log_first_n(logging.WARNING, "example %d is left out: %s", 5, record, e)


def some_captions(source, count: int = 4) -> list[str]:
    """Captions of examples far apart, always the same; no two are equal and none is empty."""
    found = {}
    for size in (count, 8 * count):  # more are looked at only where the first do not do
        records = np.linspace(0, len(source) - 1, min(size, len(source))).astype(int).tolist()
        found |= {e["caption"]: None for _, e in sound(source, records) if e["caption"].strip()}
        if len(found) >= count:
            break
    return list(found)[:count]
