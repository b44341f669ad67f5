"""From a position in the stream to a batch, as a pure function: nothing to save but the step.

position = step × batch_size + slot; epoch and place in it follow by division; the record is a keyed
permutation of (seed, epoch). A broken example keeps its slot with weight 0, so no other slot moves.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import logging
from grain.experimental import index_shuffle

from t2i_jax import errors
from t2i_jax.data import transforms

MIN_BAD = 3  # so many broken examples are never too many


class Batch(NamedTuple):
    """arrays: image_BHWC, text_BL, mask_BL, index_B, weight_B (numpy); records: which ones, int64 B;
    bad: (slot, record, reason) of broken examples."""

    arrays: dict
    records: np.ndarray
    bad: list


class Loader:
    """`loader.batch(step) -> Batch`, and the same read ahead in the background by `iterate`.

    Args:
      source: has len, [i] -> {"image": uint8 HWC, "caption": str}, fingerprint.
      tokenize: captions -> (text_BL, mask_BL, cut).
      batch_size: over all processes; each makes its own slice of the slots.
      res: side of the square pictures.
      seed: of the order and the augmentation.
      augment: names of transforms.AUGMENTATIONS.
      bad_budget: share of the records seen that may be broken before the run stops.
      extra: record numbers -> more arrays for the batch, such as cached caption states.

    A source smaller than a batch repeats within it: positions go on into the next epoch.
    """

    def __init__(
        self,
        source,
        tokenize,
        *,
        batch_size: int,
        res: int,
        seed: int,
        augment=(),
        process_index: int = 0,
        process_count: int = 1,
        bad_budget: float = 0.01,
        extra: Callable | None = None,
    ):
        if not len(source):
            raise errors.DataError(
                "no examples", where="config.data", fix="give a source with some"
            )
        if batch_size % process_count:
            raise errors.ConfigError(
                f"batch_size {batch_size} does not divide by {process_count} processes",
                where="config.batch_size",
                fix=f"use a multiple of {process_count}",
            )
        for name in augment:
            if name not in transforms.AUGMENTATIONS:
                raise errors.ConfigError(
                    f"unknown augmentation {name!r}",
                    where="config.augment",
                    fix=errors.nearest(name, transforms.AUGMENTATIONS),
                )
        self.extra = extra
        self._source, self._tokenize = source, tokenize
        self._batch_size, self._res, self._seed = batch_size, res, seed
        self._augment = [transforms.AUGMENTATIONS[name] for name in augment]
        share = batch_size // process_count
        self._slots = np.arange(process_index * share, (process_index + 1) * share)
        self._budget, self._seen, self._reasons = bad_budget, set(), {}
        self._told_cut = False

    def records(self, step: int) -> list[int]:
        """The records of this process's slots, in order; exact at any size of step."""
        n, found = len(self._source), []
        for slot in self._slots.tolist():
            epoch, place = divmod(int(step) * self._batch_size + slot, n)
            found.append(_permuted(place, n, self._seed, epoch))
        return found

    def batch(self, step: int) -> Batch:
        """The batch of a step, the same whenever it is asked for."""
        records = self.records(step)
        b, res = len(records), self._res
        image_BHWC = np.zeros((b, res, res, 3), np.float32)
        weight_B, captions, bad = np.ones(b, np.float32), [""] * b, []
        for row, record in enumerate(records):
            try:
                example = self._source[record]
                image = transforms.square(example["image"], res)
                if not isinstance(example["caption"], str):
                    raise transforms.BadExample(f"caption is {type(example['caption']).__name__}")
            except transforms.BadExample as e:
                weight_B[row] = 0
                bad.append((int(self._slots[row]), record, str(e)))
                continue
            position = int(step) * self._batch_size + int(self._slots[row])
            for augment in self._augment:
                image = augment(image, np.random.default_rng((self._seed, position)))
            image_BHWC[row], captions[row] = transforms.to_float(image), example["caption"]
        text_BL, mask_BL, cut = self._tokenize(captions)
        self._tell_cut(captions, cut)
        arrays = {
            "image": image_BHWC,
            "text": text_BL,
            "mask": mask_BL,
            "index": self._slots.astype(np.int32),
            "weight": weight_B,
        }
        records = np.array(records, np.int64)
        if self.extra:
            arrays |= self.extra(records)
        return Batch(arrays, records, bad)

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches start … stop − 1 in order, made ahead in the background.

        Raises:
          DataError: over `bad_budget` of the distinct records so far are broken, and more than three.
        """
        stream = (
            grain.MapDataset.range(start, stop)
            .map(self.batch)
            .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        )
        for batch in stream:
            self._count(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        if len(self._seen) < len(self._source):
            self._seen.update(batch.records.tolist())
        self._reasons.update({record: reason for _, record, reason in batch.bad})
        broken, seen = len(self._reasons), len(self._seen)
        if batch.bad and broken > max(MIN_BAD, self._budget * seen):
            top = collections.Counter(r.split(":")[0] for r in self._reasons.values()).most_common(
                3
            )
            raise errors.DataError(
                f"{broken} of {seen} examples are broken: "
                + "; ".join(f"{reason} ({count})" for reason, count in top),
                where=f"records {sorted(self._reasons)[:5]} …",
                fix="mend or remove them, or raise config.bad_budget",
            )

    def _tell_cut(self, captions, cut) -> None:
        for caption, rest in zip(captions, cut, strict=True):
            if rest and not self._told_cut:
                self._told_cut = True
                logging.warning(
                    "captions are cut to fit, the first: %r loses %r", caption[:80], rest[:80]
                )


def _permuted(place: int, n: int, seed: int, epoch: int) -> int:
    """Element `place` of the permutation of range(n) that (seed, epoch) names."""
    key = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return int(index_shuffle(place, max_index=n - 1, seed=key, rounds=4)) if n > 1 else 0
