"""Rules beside a field, as `Annotated[type, rule]`, and the one check of options by them.

    class Options(NamedTuple):
        gamma: Annotated[tuple[float, float], at_least(0)] = (0.5, 0.05)

Fields are those of a NamedTuple, of a Linen module, or the arguments of a function.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Annotated, Any, NamedTuple

import numpy as np

from t2i_jax import errors

# Numbers are computed in float32: a smaller one counts as 0, a larger one is infinite.
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
FLAGS = ("guidance", "steps", "sampler", "shift", "truncation")  # of options; others: --set
UNIONS = (typing.Union, types.UnionType)
NAMES = {  # type -> its values in words, for messages; all other types are "None"
    **{float: "a finite number", int: "a whole number", bool: "True or False", str: "a text"},
    Mapping: "a dictionary",
}


class Rule(NamedTuple):
    """A condition on a field's value, in addition to its type. In a tuple each entry must meet it.

    fits: value -> whether it meets the condition.
    wanted: the end of the message, after the type, such as " above 0".
    names: the values that are allowed, if these are names.
    whole: the condition is on the whole tuple, not on its entries.
    """

    fits: Callable[[Any], bool]
    wanted: str = ""
    names: Any = None
    whole: bool = False


class Static(NamedTuple):
    """Marks the value of a prediction's option that is a constant of the compiled program."""

    value: Any


STATIC = Static(...)  # every value has its own program, so code may ask `temperature == 0`


def compiled_apart(value) -> Static:
    """Marks a value that gets its own, smaller program. All other values share one.

    `guidance: Annotated[float, at_least(0), compiled_apart(1.0)] = 3.0`
    """
    return Static(value)


def at_least(low) -> Rule:
    return Rule(lambda v: v >= low, f", {low} or more")


def above(low) -> Rule:
    return Rule(lambda v: v - low >= LEAST, f" above {low}")


def below(high) -> Rule:
    return Rule(lambda v: v < high, f" below {high}")


def between(low, high) -> Rule:
    """From `low` to `high`, both included."""
    return Rule(lambda v: low <= v <= high, f" from {low} to {high:,}")


def count(most: int = 10_000) -> Rule:
    """From 1 to `most`, for sampling steps and the like."""
    return between(1, most)


def one_of(names) -> Rule:
    return Rule(lambda v: v in names, names=names)


def ascending() -> Rule:
    """For a tuple whose entries never decrease."""
    return Rule(lambda v: list(v) == sorted(v), " with the largest last", whole=True)


def pattern() -> Rule:
    return Rule(_compiles, " that is a regular expression")


Size = Annotated[int, at_least(1)]
Seed = Annotated[int, between(0, 2**32 - 1)]
Share = Annotated[float, between(0, 1)]
Dtype = Annotated[str, one_of(("float32", "bfloat16", "float16"))]  # what a network computes in
Weight = Annotated[float, at_least(0)]


def build(kind: Callable, options: Mapping[str, Any], *args, where: str):
    """`kind(*args, **options)` with checked options. For the arguments see `check`.

    Raises:
      ConfigError: as `check`, or an option without a default is missing.
    """
    options = check(kind, options, where=where, given=len(args))
    for name, parameter in _parameters(kind, len(args)).items():
        ordinary = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if ordinary and parameter.default is parameter.empty and name not in options:
            raise errors.ConfigError(f"it lacks the option {name!r}", where=where, fix="add it")
    return kind(*args, **options)


def check(kind: Callable, options: Mapping[str, Any], *, where: str, given: int = 0) -> dict:
    """The options, each in the type of its field: 3 becomes 3.0 for a float, a list a tuple.

    Args:
      kind: a NamedTuple, a Linen module or a function. A field without an annotation has the type
        of its default.
      where: the place of the options, for errors. The option's name is added to a key of the config
        and to "--".
      given: the number of positional arguments in front of the options.
    Raises:
      ConfigError: an option that `kind` does not have, or a value against its type or rules.
    """
    check_names(kind, options, where=where, given=given)
    parameters = _parameters(kind, given)
    kinds = {name: _annotation(parameters[name]) if name in parameters else Any for name in options}
    return {name: checked(kinds[name], name, options[name], where=where) for name in options}


def check_names(kind: Callable, options, *, where: str, given: int = 0) -> None:
    """Raises ConfigError unless `kind` takes every option after `given` positional arguments."""
    parameters = _parameters(kind, given)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values()):
        return
    for name in options:
        errors.check_known("option", name, parameters, where=_place(where, name))


def checked(annotation, name: str, value, *, where: str):
    """A value in the type of an annotation. For `where` and the errors see `check`."""
    kind, rules = annotation, ()
    if typing.get_origin(annotation) is Annotated:
        kind, *rules = typing.get_args(annotation)
        rules = [rule for rule in rules if isinstance(rule, Rule)]
    place, typed = _place(where, name), _fits(kind, value)
    for rule in rules if typed else ():
        entries = [value] if rule.whole or not isinstance(value, tuple | list) else value
        # None is a matter of the type, as in `float | None`. Rules are of the other values.
        bad = [entry for entry in entries if not (entry is None or rule.fits(entry))]
        if bad and rule.names is not None:
            raise errors.unknown(name, bad[0], rule.names, where=place)
        typed = typed and not bad
    if not typed:
        wanted = _named(kind) + " and".join(rule.wanted for rule in rules)
        raise errors.ConfigError(f"{name} is {value!r:.200}", where=place, fix=f"give {wanted}")
    return _cast(kind, value)


def signature(kind: Callable) -> inspect.Signature:
    """`inspect.signature`, its annotations as objects also where a file writes them as strings."""
    raw = inspect.signature(kind)
    texts = [*(p.annotation for p in raw.parameters.values()), raw.return_annotation]
    if not any(isinstance(text, str | typing.ForwardRef) for text in texts):
        return raw
    what = f"annotations of {kind.__qualname__} cannot be read"
    fix = "define their names in the module, or write no annotations as strings"
    with errors.explained(errors.ConfigError, what, where=kind.__module__, fix=fix, of=NameError):
        hints = typing.get_type_hints(kind, include_extras=True)
    parameters = [
        p.replace(annotation=hints.get(p.name, p.annotation)) for p in raw.parameters.values()
    ]
    given = hints.get("return", raw.return_annotation)
    return raw.replace(parameters=parameters, return_annotation=given)


def is_static(parameter: inspect.Parameter, value) -> bool:
    """Whether this value of a prediction's option is a constant of the compiled program."""
    marks = getattr(parameter.annotation, "__metadata__", ())
    # Marks are tuples, which `in` compares by value: Static(1.0) is found for 1.0 alone.
    return isinstance(value, int | str) or STATIC in marks or Static(value) in marks


def _parameters(kind, given: int) -> dict[str, inspect.Parameter]:
    """The fields by name, without the first `given` and without Flax's own."""
    parameters = list(signature(kind).parameters.values())[given:]
    # Linen gives every module these two fields, which are no sizes of a network.
    flax = ("parent", "name") if hasattr(kind, "__dataclass_fields__") else ()
    other = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.kind not in other and p.name not in flax}


def _annotation(parameter: inspect.Parameter):
    """A field's annotation, else the type of its default, else Any."""
    default = parameter.default
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    if isinstance(default, tuple) and default:
        return tuple[tuple(map(type, default))]
    return type(default) if isinstance(default, bool | int | float | str) else Any


def _place(where: str, name: str) -> str:
    if where == "--":
        return f"--{name}" if name in FLAGS else f"--set {name}"
    return f"{where}.{name}" if where.partition(".")[0] == "config" else where


def _fits(kind, value) -> bool:
    """Whether a value can be converted to a type. For types other than those below, any can."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in (float, int):
        # A bool is an int in Python. NaN fails the comparison, too.
        finite = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= MOST
        return finite and (kind is float or value == int(value))
    if origin is tuple:
        several = isinstance(value, tuple | list)
        parts = _entries(parts, len(value)) if several else ()
        return several and len(parts) == len(value) and all(map(_fits, parts, value))
    if origin in UNIONS:
        return any(_fits(part, value) for part in parts)
    if kind is Mapping:
        return hasattr(value, "items")
    return kind not in (bool, str, type(None)) or isinstance(value, kind)


def _cast(kind, value):
    """Converts a value that fits a type to that type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in (float, int):
        return kind(value)
    if origin is tuple:
        return tuple(map(_cast, _entries(parts, len(value)), value))
    if origin in UNIONS:
        # The first part that fits wins: `int | float` keeps 3 a whole number.
        return _cast(next(part for part in parts if _fits(part, value)), value)
    return value


def _entries(parts, n: int) -> tuple:
    """The types of the n entries of a tuple."""
    return (parts[0],) * n if parts[1:] == (...,) else parts


def _named(kind) -> str:
    """A type in words, for messages: "a finite number", "2 finite numbers"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return " or ".join(map(_named, parts))
    if origin is tuple:
        number = "" if parts[1:] == (...,) else f"{len(parts)} "
        # The plural loses the article and may change its end: a dictionary, dictionaries.
        return f"{number}{_named(parts[0]).partition(' ')[2]}s".replace("ys", "ies")
    return NAMES.get(kind, "None")


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
