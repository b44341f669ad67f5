"""The text encoder a config names: its module from the checkpoint's config.json, its weights."""

from t2i_jax import errors, plugins
from t2i_jax.text import bert, hf


def make(source: str | None, *, dtype: str = "float32"):
    """A Linen module `(text_BL, mask_BL) -> Cond`.

    Args:
      source: a checkpoint (see hf.locate), or None: a tiny BERT over bytes, for :debug configs and tests.
      dtype: what it computes in; its parameters are float32.
    """
    if source is None:
        return bert.Bert(vocab=260, width=32, depth=1, heads=2, hidden=64, dtype=dtype)
    config = hf.read_config(hf.locate(source))
    return _family(config).from_config(config, dtype=dtype)


def load(source: str, target):
    """The checkpoint's weights in the tree of `target`, the module's variables or their shapes."""
    folder = hf.locate(source)
    return hf.load(folder, target, _family(hf.read_config(folder)).NAMES)


def _family(config: dict):
    name = config.get("model_type", "")
    module = plugins.load("text", name)
    if not hasattr(module, "from_config"):
        raise errors.ConfigError(
            f"no text encoder of model_type {name!r}",
            where="config.json",
            fix="use a BERT checkpoint",
        )
    return module
