"""Families, data sources, encoders and evaluators, found by file name; options are checked."""

import contextlib
import importlib
import pkgutil
import re
import sys

from t2i_jax import errors, fields

ENTRY = re.compile(r"^(def make|class Backbone)\b", re.MULTILINE)  # of a pluggable module


def load(kind: str, name: str):
    """The module t2i_jax/<kind>/<name>.py; an unknown name is an error that lists what there is."""
    package = importlib.import_module(f"t2i_jax.{kind}")
    # A file without an entry only serves others. Files are read for that and not imported, as
    # some need a library that may not be there.
    text = lambda m: m.module_finder.find_spec(m.name).loader.get_source(m.name)
    found = pkgutil.iter_modules(package.__path__)
    known = [m.name for m in found if not m.ispkg and ENTRY.search(text(m))]
    if name not in known:
        raise errors.ConfigError(
            f"no {kind} named {name!r}",
            where=f"t2i_jax/{kind}/",
            fix=f"{errors.nearest(name, known)}; one of your own is a file of that folder",
        )
    return importlib.import_module(f"t2i_jax.{kind}.{name}")


def source(options, *, where: str, **defaults):
    """The data source that `options` name by their "source", with the others of them."""
    options = {**defaults, **options}
    module = load("data", options.pop("source", ""))
    return fields.build(module.make, options, where=where)


def network(kind, *, where: str, options):
    """A Linen module, its options checked; its `width` must be a multiple of its `heads`."""
    net = fields.build(kind, options, where=where)
    if hasattr(net, "heads") and net.width % net.heads:
        raise errors.ConfigError(
            f"width {net.width} is no multiple of heads {net.heads}",
            where=where,
            fix="change one of them",
        )
    return net


def check_nets(model, nets, *, where: str = "config.model") -> None:
    """ConfigError unless every key of `model` is one of `nets`, those that are described there."""
    for name, value in model.items():
        if name in nets:
            continue
        if hasattr(value, "items"):
            raise errors.unknown("net", name, nets, where=where)
        raise errors.ConfigError(
            f"{name!r} is no net but a size of one",
            where=where,
            fix=f"set {' or '.join(f'{where}.{net}.{name}' for net in nets)}",
        )


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
