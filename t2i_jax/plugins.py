"""Families, data sources, encoders and evaluators, found by file name; options are checked."""

import contextlib
import importlib
import inspect
import pkgutil
import sys

from t2i_jax import errors

ENTRIES = ("make", "Backbone", "from_config")  # what a pluggable module has one of


def load(kind: str, name: str):
    """The module t2i_jax/<kind>/<name>.py; an unknown name is an error that lists what there is."""
    package = importlib.import_module(f"t2i_jax.{kind}")
    known = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg]
    module = importlib.import_module(f"t2i_jax.{kind}.{name}") if name in known else None
    if not any(hasattr(module, entry) for entry in ENTRIES):
        raise errors.ConfigError(
            f"no {kind} named {name!r}", where=f"t2i_jax/{kind}/", fix=errors.nearest(name, known)
        )
    return module


def call(fn, *args, where: str, options):
    """`fn(*args, **options)`; a keyword that fn does not take, or lacks, is an error."""
    check_options(fn, options, where=where, given=len(args))
    needed = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    needed = [p.name for p in needed if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in needed[len(args) :]:
        if name not in options:
            raise errors.ConfigError(f"it lacks the option {name!r}", where=where, fix="add it")
    return fn(*args, **options)


def network(kind, *, where: str, options):
    """A Linen module: `call`, and its sizes must be whole numbers above 0, `width` a multiple of
    `heads`.
    """
    net = call(kind, where=where, options=options)
    for name, field in kind.__dataclass_fields__.items():
        value = getattr(net, name, None)
        if field.type in (int, "int") and (type(value) is not int or value < 1):
            raise errors.ConfigError(
                f"{name} is {value!r}", where=where, fix="give a whole number above 0"
            )
    if hasattr(net, "heads") and net.width % net.heads:
        raise errors.ConfigError(
            f"width {net.width} is no multiple of heads {net.heads}",
            where=where,
            fix="change one of them",
        )
    return net


def check_options(fn, options, *, where: str, given: int = 0) -> None:
    """ConfigError unless fn, after `given` positional arguments, takes every keyword."""
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY][given:]
    if hasattr(fn, "__dataclass_fields__"):  # a Linen module, with fields that are not ours to set
        known = [name for name in known if name not in ("parent", "name")]
    for name in options:
        if name not in known:
            raise errors.unknown("option", name, known, where=where)


@contextlib.contextmanager
def hidden(module: str):
    """Libraries that the body imports do not find this module, unless it is there already."""
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None  # Python's sign that it cannot be imported
    try:
        yield
    finally:
        if hide:
            del sys.modules[module]
