"""Text encoders by source: the module that a checkpoint's config.json names, and its parameters.

B batch · L text length · D width
"""

import contextlib
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax import errors, fields
from t2i_jax.models.types import Cond
from t2i_jax.pretrained import bert, hf, opener
from t2i_jax.text import tokenize


class Joined(nn.Module):
    """Several encoders of one caption, as in SD3 (arXiv:2403.03206, section 4).

    Each reads its own tokens, by its name. Their states stand one after another, narrower ones
    filled up with zeros. Pooled vectors are joined.
    """

    encoders: tuple[nn.Module, ...]
    names: tuple[str, ...]

    @property
    def pooled(self) -> tuple[int, ...]:
        """The pooled width of each encoder."""
        return tuple(getattr(e, "projected", 0) or e.width for e in self.encoders)

    def __call__(self, tokens) -> Cond:
        conds = [fn(*tokens[name]) for fn, name in zip(self.encoders, self.names, strict=True)]
        widest = max(c.seq_BLD.shape[-1] for c in conds)
        fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1])))
        return Cond(
            jnp.concatenate([fill(c.seq_BLD) for c in conds], axis=1),
            jnp.concatenate([c.mask_BL for c in conds], axis=1),
            jnp.concatenate([c.pooled_BD for c in conds], axis=-1),
        )


def make(source, *, dtype: str = "float32", **options) -> nn.Module:
    """A module `(ids_BL, mask_BL) -> Cond` for `source`, or of several `(name -> Tokens) -> Cond`,
    still without weights.

    Args:
      source: a checkpoint (see hf.locate), several that read each caption together, or None for the
        small random encoder of bytes that debug configs use; see `opener.parse`.
      dtype: what it computes in.
      options: family -> more options of its `from_config`, such as clip={"skip": 1}.
    """
    source = opener.parse(source)
    checkpoints = _opened(source)
    fields.checked(fields.Dtype, "dtype", dtype, where="config.text")
    families = {checkpoint.name for checkpoint in checkpoints}
    for name, own in options.items():
        if name not in families:
            raise errors.ConfigError(
                f"no encoder of the family {name!r} is loaded",
                where="config.text",
                fix=errors.nearest(name, families | {"dtype"}),
            )
        fields.checked(Mapping, name, own, where="config.text")
    if source is None:
        return bert.Bert(
            vocab=tokenize.BYTES_VOCAB, width=32, depth=1, heads=2, mlp_width=64, dtype=dtype
        )
    encoders = tuple(
        checkpoint.module(Cond, **{"dtype": dtype, **options.get(checkpoint.name, {})})
        for checkpoint in checkpoints
    )
    return encoders[0] if isinstance(source, str) else Joined(encoders, _names(checkpoints))


def tokenizer(source, length: int):
    """The tokenizer of `make(source)`, of `length` tokens; of several encoders a dict, encoder's
    name -> tokenizer, none of more tokens than its encoder has positions.
    """
    source = opener.parse(source)
    if source is None:
        return tokenize.open("bytes", length)
    checkpoints = _opened(source)
    if isinstance(source, str):
        return tokenize.open(str(checkpoints[0].folder), length)
    made = {}
    for name, checkpoint in zip(_names(checkpoints), checkpoints, strict=True):
        # T5 has no such limit: it knows distances alone.
        positions = getattr(checkpoint.module(Cond), "positions", length)
        made[name] = tokenize.open(str(checkpoint.folder), min(length, positions))
    return made


def _names(checkpoints) -> tuple[str, ...]:
    """Their families', numbered from the second alike on: clip, clip_2, t5."""
    families = [checkpoint.name for checkpoint in checkpoints]
    count = lambda i: families[: i + 1].count(families[i])
    return tuple(f"{f}_{count(i)}" if count(i) > 1 else f for i, f in enumerate(families))


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
    began = opener.parse(config.get("load", {}).get(net or "text"))
    if not isinstance(began, str):
        raise errors.ConfigError(
            f"the run's text encoder began with {began!r}; only what began with one pretrained "
            "checkpoint can be read again",
            where=str(path),
            fix="give a pretrained checkpoint as config.load.text",
        )
    return origin(began)


def _opened(source) -> list[opener.Checkpoint]:
    """The pretrained checkpoints that a source names, or that runs of ours began with."""
    checkpoints = []
    for one in opener.each(source):
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
