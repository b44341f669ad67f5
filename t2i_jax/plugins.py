"""Families, data sources, encoders and evaluators are found by file name."""

import importlib
import pkgutil

from t2i_jax import errors


def load(kind: str, name: str):
    """The module t2i_jax/<kind>/<name>.py; an unknown name is an error that lists what there is."""
    package = importlib.import_module(f"t2i_jax.{kind}")
    known = [m.name for m in pkgutil.iter_modules(package.__path__)]
    if name not in known:
        raise errors.ConfigError(
            f"no {kind} named {name!r}", where=f"t2i_jax/{kind}/", fix=errors.nearest(name, known)
        )
    return importlib.import_module(f"t2i_jax.{kind}.{name}")
