"""Text encoders by source: the module that a checkpoint's config.json names, and its parameters."""

import flax.linen as nn

from t2i_jax import errors
from t2i_jax.text import bert, clip, gpt2, hf, t5, tokenize

FAMILIES = {
    model_type: family for family in (bert, clip, gpt2, t5) for model_type in family.MODEL_TYPES
}


def make(source: str | None, *, dtype: str = "float32") -> nn.Module:
    """A module `(text_BL, mask_BL) -> Cond` for `source` (see hf.locate), still without weights.

    None makes the small random encoder of bytes that debug configs use.
    """
    if source is None:
        return bert.Bert(
            vocab=tokenize.BYTES_VOCAB, width=32, depth=1, heads=2, mlp_width=64, dtype=dtype
        )
    config, family = _read(hf.locate(source))
    return family.from_config(config, dtype=dtype)


def check(source: str, abstract_variables) -> None:
    """Raises DataError unless `load` will find every tensor, and no other."""
    _spec(source, abstract_variables)


def load(source: str, abstract_variables):
    """Variables {"params": …} of the encoder `make(source)`: shaped, typed and placed as given."""
    return {"params": hf.load(_spec(source, abstract_variables))}


def _spec(source, abstract_variables):
    folder = hf.locate(source)
    config, family = _read(folder)
    return hf.match(folder, abstract_variables["params"], family.names(config))


def _read(folder):
    config = hf.read_json(folder / hf.CONFIG)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise errors.ConfigError(
            f"model_type {model_type!r} is no text encoder",
            where=str(folder / hf.CONFIG),
            fix=f"use a checkpoint of one of {', '.join(sorted(FAMILIES))}",
        )
    return config, FAMILIES[model_type]
