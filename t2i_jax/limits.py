"""Checks of what a user asks to draw: prompts, counts and seeds within their limits."""

import operator

import numpy as np

from t2i_jax import errors

PROMPT_LIMIT = 10_000  # characters
COUNT_LIMIT = 100_000
SEED_LIMIT = 2**32
INDEX_LIMIT = 2**31  # images under one seed: an index is an int32 in a batch
ALIASES = {  # name in diffusers -> name here, for the hints of errors
    "num_images_per_prompt": "num_images",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "generator": "seed",
    "negative": "negative_prompt",
}


def check_prompt(text, where: str) -> None:
    """Raises ConfigError unless it passes `check_text` and is more than white space."""
    check_text(text, where)
    if not text.strip():
        raise errors.ConfigError("a prompt is empty", where=where, fix="say what to draw")


def check_text(text, where: str) -> None:
    """Raises ConfigError unless it is a string of valid Unicode, of at most PROMPT_LIMIT."""
    if not isinstance(text, str):
        raise errors.ConfigError(f"a prompt is {text!r}", where=where, fix="give a string")
    if len(text) > PROMPT_LIMIT:
        raise errors.ConfigError(
            f"a prompt has {len(text):,} characters",
            where=where,
            fix=f"shorten it; {PROMPT_LIMIT:,} is the limit",
        )
    # Python decodes bad bytes of a command line to lone surrogates, which no file can hold.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise errors.ConfigError(
            "a prompt is not valid Unicode", where=where, fix="write it in UTF-8"
        )


def check_seed(seed, where: str) -> None:
    """Raises ConfigError unless it is a whole number from 0 to SEED_LIMIT − 1."""
    if not is_whole(seed) or not 0 <= seed < SEED_LIMIT:
        raise errors.ConfigError(
            f"seed is {seed!r}", where=where, fix="give a whole number from 0 to 2³² − 1"
        )


def is_whole(value) -> bool:
    """Whether it is an integer of Python or NumPy. A bool is none."""
    if isinstance(value, bool) or getattr(value, "ndim", 0):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def pictures(prompts, num_images, seed, negative_prompt, index) -> dict:
    """The arguments of `Pipeline.__call__` as lists with one entry for each of its B images.

    Returns:
      {"captions", "seed", "index", "negative_prompt"}; the last is None without one.
    Raises:
      ConfigError: an argument is out of its limits, or lists have unequal lengths.
    """
    texts = _listed(prompts, "prompts", "a string or a list of strings")
    if not texts:
        raise errors.ConfigError("no prompt", where="prompts", fix="give one string at least")
    for text in texts:
        check_prompt(text, "prompts")
    seeds = [seed] if is_whole(seed) else _listed(seed, "seed", "a whole number or a list of them")
    for one in seeds:
        check_seed(one, "seed")
    if len(texts) == 1 and num_images == 1:  # one prompt with many seeds asks for an image a seed
        num_images = len(seeds)
    if not is_whole(num_images) or not 1 <= num_images <= COUNT_LIMIT:
        raise errors.ConfigError(
            f"num_images is {num_images!r}", where="num_images", fix=f"give 1 to {COUNT_LIMIT:,}"
        )
    # One seed for all: the images are told apart by their index. One seed an image: each is the
    # first of its seed. One seed a prompt: the index counts the images of the prompt.
    n = len(texts) * num_images
    if is_whole(seed):
        seed_B, place_B = np.full(n, seed, np.int64), np.arange(n)
    elif len(seeds) == n:
        seed_B, place_B = np.array(seeds), np.zeros(n, int)
    elif len(seeds) == len(texts):
        seed_B, place_B = np.repeat(seeds, num_images), np.tile(np.arange(num_images), len(texts))
    else:
        raise _unequal("seed", len(seeds), len(texts), n)
    if index is not None:
        place_B = places(index, n)
    negatives = None
    if negative_prompt is not None:
        negatives = _listed(negative_prompt, "negative_prompt", "a string or a list of strings")
        for text in negatives:
            if text is not None:
                check_text(text, "negative_prompt")
        if len(negatives) not in (1, len(texts)):
            raise _unequal("negative_prompt", len(negatives), len(texts), len(texts))
        negatives = [text for text in negatives for _ in range(n // len(negatives))]
    captions = [text for text in texts for _ in range(num_images)]
    return dict(captions=captions, seed=seed_B, index=place_B, negative_prompt=negatives)


def places(index, n: int):
    """The places of n images under their seeds.   -> array of n

    Raises:
      ConfigError: not n whole numbers from 0 on.
    """
    place_B = np.array(_listed(index, "index", "a list of whole numbers"))
    if place_B.shape != (n,):
        raise errors.ConfigError(
            f"{len(place_B)} of them for {n} examples", where="index", fix="give one for each"
        )
    for one in place_B.tolist():
        if not is_whole(one) or not 0 <= one < INDEX_LIMIT:
            raise errors.ConfigError(
                f"a place is {one!r}", where="index", fix="give whole numbers from 0"
            )
    return place_B


def _listed(values, where: str, wanted: str) -> list:
    """The values as a list. A single string becomes a list of one."""
    if isinstance(values, str):
        return [values]
    # Both can be iterated, but to keys or to numbers.
    if isinstance(values, dict | bytes) or not hasattr(values, "__iter__"):
        raise errors.ConfigError(f"{where} is {values!r}", where=where, fix=f"give {wanted}")
    return list(values)


def _unequal(name: str, entries: int, prompts: int, total: int) -> errors.ConfigError:
    wanted = f"{prompts}" if prompts == total else f"{prompts} or {total}"
    return errors.ConfigError(f"it has {entries} entries", where=name, fix=f"give one, or {wanted}")
