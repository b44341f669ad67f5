"""Refuses a config whose values are out of range, before anything is built."""

from collections.abc import Mapping
from typing import Annotated

from t2i_jax import errors, fields, limits, weights

OFTEN = Annotated[int, fields.at_least(0)]  # every so many steps; 0: never
NO_OR_BOTH = fields.Rule(
    lambda v: not v or (len(v) == 2 and min(v) > 0), ": none, or height and width", whole=True
)
SIDES = Annotated[tuple[int, ...], NO_OR_BOTH]
KEYS = {  # a key of the config -> what its value must be
    **dict.fromkeys(("steps", "batch_size", "accumulate", "res", "text_length"), fields.Size),
    **dict.fromkeys(("log_every", "save_every", "keep"), fields.Size),
    **dict.fromkeys(("sample_every", "eval_every", "rollbacks"), OFTEN),
    **dict.fromkeys(("minutes", "save_minutes"), fields.Weight),
    **{"seed": fields.Seed, "bad_budget": fields.Share, "size": SIDES},
}
DECAY = Annotated[float, fields.at_least(0), fields.below(1)]


def check(config) -> None:
    """Refuses values outside their range, before anything is built."""
    weights.to_json(config)  # which a run writes only after reading its nets and captions
    for name, wanted in KEYS.items():
        fields.checked(wanted, name, config[name], where="config")
    for name, decay in config.ema.items():
        fields.checked(DECAY, name, decay, where="config.ema")
    for name, options in config.evaluators.items():
        fields.checked(Mapping, name, options, where="config.evaluators")
    for prompt in config.prompts:
        limits.check_prompt(prompt, "config.prompts")
    if config.init_from:
        weights.locate(config.init_from)
    if config.best and not (config.eval_every and config.evaluators):
        raise errors.ConfigError(
            "nothing is evaluated", where="config.best", fix="set eval_every and evaluators"
        )
    # A minus in front says that less is better. It is no part of the name.
    measured = config.best.removeprefix("-").partition("/")[0]
    if config.best and measured not in config.evaluators:
        raise errors.ConfigError(
            f"it is {config.best!r}, and no evaluator is called {measured!r}",
            where="config.best",
            fix=f"write <evaluator>/<metric>: {errors.nearest(measured, config.evaluators)}",
        )
