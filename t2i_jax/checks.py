"""Refuses a config whose values are out of range, before anything is built."""

from t2i_jax import errors, limits, weights


def check(config) -> None:
    """Refuses values outside their range, before anything is built."""
    positive = ("steps", "batch_size", "accumulate", "res", "text_length", "log_every")
    for name in (*positive, "save_every", "keep"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise errors.ConfigError(
                f"{name} is {config[name]!r}", where=f"config.{name}", fix="give a whole number ≥ 1"
            )
    if not 0 <= config.seed < limits.SEED_LIMIT:
        raise errors.ConfigError(
            f"seed is {config.seed}", where="config.seed", fix="give a number from 0 to 2³² − 1"
        )
    for prompt in config.prompts:
        limits.check_prompt(prompt, "config.prompts")
    if not 0 <= config.minutes < float("inf"):
        raise errors.ConfigError(
            f"minutes is {config.minutes}", where="config.minutes", fix="give a time of training"
        )
    if not 0 <= config.save_minutes < float("inf"):
        raise errors.ConfigError(
            f"save_minutes is {config.save_minutes}",
            where="config.save_minutes",
            fix="give minutes, or 0 for saves by steps alone",
        )
    for name, decay in config.ema.items():
        if not 0 <= decay < 1:
            raise errors.ConfigError(
                f"EMA decay is {decay}", where=f"config.ema.{name}", fix="give a number in [0, 1)"
            )
    if config.init_from:
        weights.locate(config.init_from)
    if config.best and not (config.eval_every and config.evaluators):
        raise errors.ConfigError(
            "nothing is evaluated", where="config.best", fix="set eval_every and evaluators"
        )
    measured = config.best.removeprefix("-").partition("/")[0]
    if config.best and measured not in config.evaluators:
        raise errors.ConfigError(
            f"it is {config.best!r}, and no evaluator is called {measured!r}",
            where="config.best",
            fix=f"write <evaluator>/<metric>: {errors.nearest(measured, config.evaluators)}",
        )
    for name, options in config.evaluators.items():
        if not hasattr(options, "items"):
            raise errors.ConfigError(
                f"it is {options!r}",
                where=f"config.evaluators.{name}",
                fix="give dict(…) of options",
            )
