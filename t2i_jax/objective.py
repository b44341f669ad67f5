"""The contract every family fulfils: networks, losses run in order, and named predictions."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from t2i_jax import errors, lora, plugins, sharding

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

    The scalar is the mean over the batch of each example's value times its `batch["weight"]`. An
    example of weight 0 counts nothing; see `losses.weighted_mean`.

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
    """The same: `Tokens` of B texts, which a tokenizer of the family's inputs reads.

    Where there are several, `Annotated[Texts, key]` names one: the key of its input, and behind a
    slash its name there, such as "text/t5".
    """


class OfBatch:
    """The same: arrays of a batch as a whole, such as its mean loss. `Predictor.run` gives them."""


def together(prediction: Callable) -> Callable:
    """Marks a prediction whose result for an example depends on the others of its batch."""
    prediction.together = True
    return prediction


class Stage(NamedTuple):
    """A part of a prediction that can be a program of its own.

    Then only its nets take memory, and one can look at what lies between stages.

    nets: those that it reads.
    fn: `(nets, batch, key, **options) -> batch`, of the next stage, or what the prediction gives.
      The first axis of each array in a batch is that of the examples, or of several rows of each.
    times: `(batch, **options) -> int`, how often `fn` runs; None: once. Where it is set, `fn` gets
      the number `n`, too, and gives what changes in the batch; beside that "preview", which is what
      the pictures would be, as latents.
    """

    nets: tuple[str, ...]
    fn: Callable
    times: Callable | None = None

    def changed(self, batch, new):
        """The batch behind one run of `fn` that gave `new`."""
        return new if self.times is None else {key: new.get(key, batch[key]) for key in batch}


def through(stages, nets, batch, key, **options):
    """What stages give, one after another in one program."""
    for stage in stages:
        if stage.times is None:
            batch = stage.fn(nets, batch, key, **options)
        elif times := stage.times(batch, **options):

            def step(n, batch, stage=stage):
                own, n = sharding.anew(nets, n)
                return stage.changed(batch, stage.fn(own, batch, key, n=n, **options))

            batch = jax.lax.fori_loop(0, times, step, batch)
    return batch


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
    predict: name -> `(nets, batch, key, **options)`. Its return annotation is `Pictures`, `Texts`
      or `OfBatch`; without one it gives arrays with an entry for each example. Options may have
      rules, see `fields`.
    training_only: frozen nets that no prediction reads. A trained model is opened without them.
    cached: the predictions that `config.cache` may name. Where none of them reads captions, it may
      also name one of the text alone that gives a `Cond`: batches then bring its "cond_seq" and
      "cond_pooled".
    inputs: what the batch holds; by default `data.inputs.picture_and_caption(config)`, which are
      "image", BHWC, and "text", `models.types.Tokens` or of several encoders name -> `Tokens`.
    stages: name of a prediction -> what it goes `through`, where it does.

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
    stages: Mapping[str, tuple[Stage, ...]] = {}

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


def outputs(config) -> Mapping[str, str]:
    """net -> what it puts out, of the nets for which that is a choice, as a flow network's "v".

    A net that is loaded into another run must mean the same there. A family whose nets have such a
    choice has a function `outputs(config)` in its module.
    """
    family = plugins.load("objectives", config.objective)
    return getattr(family, "outputs", lambda config: {})(config)


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
        usual = importlib.import_module("t2i_jax.data.inputs").picture_and_caption
        family = family._replace(inputs=usual(config))
    for shape in [one.shapes["image"].shape for one in family.inputs if "image" in one.shapes]:
        if config.size and shape[:2] != size(config):
            raise errors.ConfigError(
                f"objective {config.objective!r} learns squares",
                where="config.size",
                fix="set it to () and config.res to the side",
            )
    return lora.wrap(family, config.lora) if config.lora else family
