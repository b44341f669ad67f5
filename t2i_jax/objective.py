"""The contract every family fulfils: networks, losses run in order, and named predictions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from t2i_jax import errors, lora, plugins

# net name -> Linen variables {"params": …, "batch_stats": …}
Nets = Mapping[str, Mapping[str, Any]]


class Aux(NamedTuple):
    """What a loss returns beside its scalar.

    metrics: name -> scalar, logged as "<first net>/<name>".
    mutated: net -> {collection: new value}, e.g. an EMA codebook or batch statistics.
    """

    metrics: Mapping[str, Any] = {}
    mutated: Mapping[str, Mapping[str, Any]] = {}


class Loss(NamedTuple):
    """One loss: `fn(nets, batch, key, step) -> (scalar, Aux)`, differentiated for `nets` alone.

    The scalar is the mean over the batch weighted by `batch["weight"]`: an example of weight 0
    counts nothing.

    compares: whether an example's share depends on the other examples, as in contrastive losses,
      beyond that mean. Only the whole batch gives such a loss: a run refuses to cut it into
      micro-batches (`config.accumulate`) or into devices' parts (strategy "pmap").
    """

    nets: tuple[str, ...]
    fn: Callable
    compares: bool = False


class Pictures:
    """What a prediction gives, as its return annotation: images BHWC, float in [-1, 1]."""


class Texts:
    """The same: `Tokens` of B texts. The last tokenizer of the family's inputs reads them."""


def together(prediction: Callable) -> Callable:
    """Marks a prediction whose result for an example depends on the others of its batch."""
    prediction.together = True
    return prediction


class Input(NamedTuple):
    """Keys of the batch, and how they are made; `data.inputs` has the usual ones.

    shapes: key -> `jax.ShapeDtypeStruct` of one example, or a tree of them.
    make: `(examples, rngs, records) -> key -> arrays of these examples`, numpy. It runs in threads
      and on parts of a batch, so that each row depends on its own example, generator and record
      alone. It raises `transforms.BadExample` for an example that cannot be used.
        examples: what the source gave, with what the inputs before made under their keys.
        rngs: of each example a numpy generator, which depends on its place in the stream and from
          which the inputs draw in their order; outside of training None.
        records: the examples' numbers in the source.
    reads: keys of an example that `make` needs. Where one is missing, as the image is where
      captions are drawn, the batch lacks this input.
    tokenizer: that of an input of tokens: one, or name -> tokenizer.
    """

    shapes: Mapping[str, Any]
    make: Callable
    reads: tuple[str, ...] = ("image", "caption")
    tokenizer: Any = None


class Cached(NamedTuple):
    """A prediction whose arrays `config.cache` may keep, see `data.cache`: a dict of them, each
    with an entry for each example. A batch brings them under their names.

    reads: "caption" or "image", which is all that it reads. Of captions the first of `nets` has the
      arrays of the empty one as a collection "empty". With kept arrays of pictures, a batch has no
      input that reads pictures.
    nets: frozen nets that no loss then runs. A run that neither draws nor judges does without them.
    """

    reads: str
    nets: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its files' folder in a workdir."""
        return {"caption": "captions", "image": "pictures"}[self.reads]


class Objective(NamedTuple):
    """A family.

    init:    `(key, batch) -> Nets`, every network, trainable and frozen.
    losses:  run in order at each step; a net named by a loss is trained, any other is frozen.
    predict: name -> `(nets, batch, key, **options)`. Its return annotation is `Pictures` or
      `Texts`; without one it gives arrays. Options may have rules, see `fields`.
    training_only: frozen nets that no prediction reads. A trained model is opened without them.
    cached: the predictions that `config.cache` may name. Without any, it may name one of the text
      alone that gives a `Cond`: batches then bring its "cond_seq" and "cond_pooled".
    inputs: what the batch holds; by default `data.inputs.picture_and_caption(config)`, which are
      "image", BHWC, and "text", `models.types.Tokens` or of several encoders name -> `Tokens`.

    `batch` also holds "weight" f32 B and "index" int32 B: the slot in the global batch, or the
    picture's number when sampling, from which all noise of an example comes. Images of uint8 are
    f32 in [-1, 1] there. What a loss sees of a batch are slots in a row, from a multiple of their
    number on.
    """

    init: Callable
    losses: tuple[Loss, ...]
    predict: Mapping[str, Callable]
    training_only: tuple[str, ...] = ()
    cached: Mapping[str, Cached] = {}
    inputs: tuple[Input, ...] | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the nets some loss updates, in the order of their first mention."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.nets))


def model_by_net(config) -> Mapping[str, Any]:
    """`config.model` keyed by net: net -> its sizes.

    Older versions of a family may have written it otherwise. Such a family's module has a function
    `model_by_net(model, load)` that reads both forms.

    Args:
      config: any mapping with "objective", "model" and "load".
    """
    family = plugins.load("objectives", config["objective"])
    read = getattr(family, "model_by_net", lambda model, load: model)
    return read(config["model"], config["load"])


def size(config) -> tuple[int, int]:
    """Height and width of the pictures that a config's run learns."""
    return tuple(config.size) or (config.res, config.res)


def make(config) -> Objective:
    """The objective that `config.objective` names, with the adapters of `config.lora`.

    Raises:
      ConfigError: `config.size` asks for rectangles, and the family learns squares.
    """
    family = plugins.load("objectives", config.objective).make(config)
    if family.inputs is None:
        # By name and not imported: `data` builds on this module.
        usual = plugins.load("data", "inputs").picture_and_caption
        family = family._replace(inputs=usual(config))
    for shape in [one.shapes["image"].shape for one in family.inputs if "image" in one.shapes]:
        if config.size and shape[:2] != size(config):
            raise errors.ConfigError(
                f"objective {config.objective!r} learns squares",
                where="config.size",
                fix="set it to () and config.res to the side",
            )
    return lora.wrap(family, config.lora) if config.lora else family
