"""What a family reads of each example, as keys of the batch; see `objective.Input`.

B batch · H W pixels · C channels · L text length
"""

import itertools

import jax
import numpy as np
from absl import logging

from t2i_jax import errors
from t2i_jax.data import transforms
from t2i_jax.models.types import Tokens
from t2i_jax.objective import Input
from t2i_jax.pretrained import text_encoder
from t2i_jax.text import tokenize


def picture_and_caption(config) -> tuple[Input, ...]:
    """What most families read: "image", and "text" for the net of that name."""
    tokenizer = text_encoder.tokenizer(config.load.get("text"), config.text_length)
    return picture(config.res, augment=tuple(config.augment)), caption(tokenizer)


def picture(size, key: str = "image", augment=()) -> Input:
    """An image, uint8 HWC; float32 in [-1, 1] for losses and predictions.

    size: height and width, or one number for a square.
    augment: names of `transforms.AUGMENTATIONS`, applied in this order, in training alone.
    """
    for name in augment:
        errors.check_known("augmentation", name, transforms.AUGMENTATIONS, where="config.augment")
    size = (size, size) if isinstance(size, int) else tuple(size)

    def one(example, rng):
        image_HWC = transforms.fit(example["image"], size)
        for name in augment if rng else ():
            image_HWC = transforms.AUGMENTATIONS[name](image_HWC, rng)
        return image_HWC

    def make(examples, rngs, records):
        return {key: np.stack([one(*pair) for pair in zip(examples, rngs, strict=True)])}

    return Input({key: jax.ShapeDtypeStruct((*size, 3), np.uint8)}, make, reads=("image",))


def origin(size, key: str = "origin") -> Input:
    """Where `picture` takes an image of this height and width from: height and width of the file's
    picture, and the top left corner of the part in it, once it is resized: int32 4.

    It reads the picture as the source gave it, so it stands in front of `picture`.
    """

    def one(example):
        sides = np.array(example["image"].shape[:2])
        scaled = sides * max(size / sides)
        return [*np.round(sides * example.get("scale", 1.0)), *(np.round(scaled - size) // 2)]

    def make(examples, rngs, records):
        return {key: np.array([one(example) for example in examples], np.int32)}

    return Input({key: jax.ShapeDtypeStruct((4,), np.int32)}, make, reads=("image",))


def smaller(size: int, key: str = "low") -> Input:
    """The image that `picture` made, each pixel the mean of the area that it covers: uint8 HWC."""

    def make(examples, rngs, records):
        return {key: np.stack([transforms.shrink(e["image"], size) for e in examples])}

    return Input({key: jax.ShapeDtypeStruct((size, size, 3), np.uint8)}, make, reads=("image",))


def caption(tokenizer, key: str = "text") -> Input:
    """The caption's `Tokens`; of several tokenizers, name -> tokenizer, a dict of them.

    The first caption that is cut off is told in the log.
    """
    row = lambda one, kind: jax.ShapeDtypeStruct((one.length,), kind)
    shapes = jax.tree.map(lambda one: Tokens(row(one, np.int32), row(one, bool)), tokenizer)
    told = itertools.count()  # threads share it

    def make(examples, rngs, records):
        captions = [example["caption"] for example in examples]
        tokens, cuts = tokenize.read(tokenizer, captions)
        for text, lost in zip(captions, cuts, strict=True):
            # Predictions pass no generators, and their callers tell of cuts themselves.
            if rngs[0] and lost and next(told) == 0:
                logging.warning(
                    "captions are too long and cut (config.text_length, or an encoder's limit), "
                    "the first: %r loses %r",
                    *(text[:80], lost[:80]),
                )
        return {key: tokens}

    return Input({key: shapes}, make, reads=("caption",), tokenizer=tokenizer)


def hole(size: int, key: str = "hole") -> Input:
    """A rectangle to be filled in, True inside: bool HW1. A record always has the same one, with
    sides from a quarter to three quarters of the image's.
    """

    def one(record):
        rng = np.random.default_rng(int(record))
        h, w = rng.integers(size // 4, 3 * size // 4, 2, endpoint=True)
        top, left = rng.integers(size - h, endpoint=True), rng.integers(size - w, endpoint=True)
        mask_HW1 = np.zeros((size, size, 1), bool)
        mask_HW1[top : top + h, left : left + w] = True
        return mask_HW1

    def make(examples, rngs, records):
        return {key: np.stack([one(record) for record in records])}

    return Input({key: jax.ShapeDtypeStruct((size, size, 1), bool)}, make, reads=("image",))


def stored(store, key: str) -> Input:
    """What a store holds of each record, such as latents: a row of it.

    store: an array with a row for each record, perhaps a memory map.
    """
    shapes = {key: jax.ShapeDtypeStruct(store.shape[1:], store.dtype)}
    make = lambda examples, rngs, records: {key: np.asarray(store[np.asarray(records)])}
    return Input(shapes, make, reads=("record",))


def arrays(inputs, examples, rngs, records) -> dict:
    """The arrays of all inputs, each made of the examples and of what those before it made.

    Raises:
      TypeError: an input does not make what its shapes say.
    """
    # Copies, as inputs add their keys to them below and a source may keep its own.
    batch, examples = {}, [dict(example) for example in examples]
    for one in inputs:
        made = one.make(examples, rngs, records)
        said = jax.tree.map(lambda s: (len(examples), *s.shape, np.dtype(s.dtype)), one.shapes)
        there = jax.tree.map(lambda x: (*x.shape, x.dtype), made)
        # Assigning to the loader's arrays would broadcast a wrong shape without a word.
        if said != there:
            raise TypeError(f"an input says it makes {said}, and makes {there}")
        batch |= made
        for i, example in enumerate(examples):
            example |= jax.tree.map(lambda x, i=i: x[i], made)
    return batch
