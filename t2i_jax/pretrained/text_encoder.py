"""Text encoders by source: the module that a checkpoint's config.json names, and its parameters.

B batch · L text length · D width
"""

import contextlib
import pathlib

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import bert, hf, opener
from t2i_jax.text import tokenize

DTYPES = ("float32", "bfloat16", "float16")


class Joined(nn.Module):
    """Several encoders of one caption, as in SD3 (arXiv:2403.03206, section 4).

    Their tokens stand one after another in text_BL, `lengths` of each, of the last perhaps fewer;
    so do their states, narrower ones filled up with zeros. Pooled vectors are joined.
    """

    encoders: tuple[nn.Module, ...]
    lengths: tuple[int, ...]

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Tokens and pooled width of each encoder, in their order."""
        pooled = (getattr(e, "projected", 0) or e.width for e in self.encoders)
        return tuple(zip(self.lengths, pooled, strict=True))

    def __call__(self, text_BL, mask_BL) -> Cond:
        ends = [sum(self.lengths[:i]) for i in range(1, len(self.lengths))]
        texts, masks = (jnp.split(x, ends, axis=1) for x in (text_BL, mask_BL))
        conds = [fn(*tokens) for fn, *tokens in zip(self.encoders, texts, masks, strict=True)]
        widest = max(c.seq_BLD.shape[-1] for c in conds)
        fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1])))
        return Cond(
            jnp.concatenate([fill(c.seq_BLD) for c in conds], axis=1),
            mask_BL,
            jnp.concatenate([c.pooled_BD for c in conds], axis=-1),
        )


def given(source):
    """What `config.load` or a flag says, as a source: None for nothing, a tuple for several, which
    a string that is no folder names with commas between.
    """
    if isinstance(source, str) and "," in source and not pathlib.Path(source).is_dir():
        source = [one.strip() for one in source.split(",")]
    if source is None or isinstance(source, str):
        return source or None
    return tuple(source)


def make(source, *, length: int = 0, dtype: str = "float32", **options) -> nn.Module:
    """A module `(text_BL, mask_BL) -> Cond` for `source`, still without weights.

    Args:
      source: a checkpoint (see hf.locate), several that read each caption together, or None for the
        small random encoder of bytes that debug configs use; see `given`.
      length: config.text_length, which several encoders need to know.
      dtype: what it computes in.
      options: family -> more options of its `from_config`, such as clip={"skip": 1}.
    """
    source = given(source)
    checkpoints = _opened(source)
    _check_options({checkpoint.name for checkpoint in checkpoints}, dtype, options)
    if source is None:
        return bert.Bert(
            vocab=tokenize.BYTES_VOCAB, width=32, depth=1, heads=2, mlp_width=64, dtype=dtype
        )
    encoders = tuple(
        checkpoint.module(Cond, **{"dtype": dtype, **options.get(checkpoint.name, {})})
        for checkpoint in checkpoints
    )
    return encoders[0] if isinstance(source, str) else Joined(encoders, lengths(source, length))


def lengths(source, length: int) -> tuple[int, ...]:
    """How many tokens each encoder of a source reads: `length`, or of several none more than its
    positions.
    """
    source = given(source)
    if source is None or isinstance(source, str):
        return (length,)
    return tuple(min(length, getattr(make(one), "positions", length)) for one in source)


def tokenizer(source, length: int):
    """`captions -> Tokens` for `make(source, length=length)`."""
    source = given(source)
    names = [str(checkpoint.folder) for checkpoint in _opened(source)] or ["bytes"]
    each = [tokenize.open(*pair) for pair in zip(names, lengths(source, length), strict=True)]
    return each[0] if len(each) == 1 else tokenize.Several(each)


def origin(source: str) -> str:
    """The pretrained checkpoint an encoder comes from: the source, or of a run of ours, in which it
    learned, what the run began with.

    Raises:
      ConfigError: a run that began with no checkpoint, or with several.
    """
    folder, net = hf.split(source)
    path = folder / hf.CONFIG
    config = hf.read_json(path) if path.is_file() else {}
    if "objective" not in config:
        return source
    began = given(config.get("load", {}).get(net or "text"))
    if not isinstance(began, str):
        raise errors.ConfigError(
            f"the run's text encoder began with {began!r}; only what began with one pretrained "
            "checkpoint can be read again",
            where=str(path),
            fix="give a pretrained checkpoint as config.load.text",
        )
    return origin(began)


def _check_options(here: set[str], dtype, options) -> None:
    """Options of families that are not `here`, or that are none, are errors."""
    for name, given in options.items():
        if name not in here:
            raise errors.ConfigError(
                f"no encoder of the family {name!r} is loaded",
                where="config.text",
                fix=errors.nearest(name, here | {"dtype"}),
            )
        if not hasattr(given, "items"):
            raise errors.ConfigError(
                f"it is {given!r}", where=f"config.text.{name}", fix="give dict(…) of options"
            )
    for value in (dtype, *(given.get("dtype", dtype) for given in options.values())):
        if value not in DTYPES:
            raise errors.unknown("dtype", value, DTYPES, where="config.text")


def _opened(source) -> list[opener.Checkpoint]:
    """The pretrained checkpoints that a source names, or that runs of ours began with."""
    checkpoints = []
    for one in () if source is None else (source,) if isinstance(source, str) else source:
        began = origin(one)
        # What a run's config.json names is no choice of the user.
        network = contextlib.nullcontext() if began == one else hf.offline_except()
        try:
            with network:
                checkpoints.append(opener.open(began))
        except errors.DataError as e:
            if isinstance(source, str) or not e.what.startswith("no such folder"):
                raise
            what = f"{e.what}; commas separate several encoders"
            raise errors.DataError(what, where=e.where, fix=e.fix) from e
    return checkpoints
