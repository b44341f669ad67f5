"""Prompts in, pictures out: what sample.py, evaluators and notebooks call, for every family."""

import functools
import inspect
import math

import jax
import numpy as np

from t2i_jax import errors, images, objective, plugins, weights
from t2i_jax.data import transforms
from t2i_jax.text import encoder

SEED_LIMIT = 2**32
COUNT_LIMIT = 10_000  # of sampling steps and the like


class Predictor:
    """An objective's predictions as host functions of captions, compiled once per static option.

    Options that are integers, strings or booleans are static; floats and tuples of floats are
    arrays, so that another guidance scale compiles nothing, but for an `objective.Constant` of the
    option's annotation. With a `sharding.Layout`, batches are
    split over its mesh where they divide, and results lie whole on every device.
    """

    def __init__(self, config, *, layout=None):
        self.config, self._layout = config, layout
        self.poll = lambda: None  # called before each batch; may raise to stop
        self.objective = objective.make(config)
        self.tokenize = encoder.tokenizer(config.load.get("text"), config.text_length)
        self._compiled = functools.lru_cache(maxsize=32)(self._compile)

    def check(self, name: str, **given) -> dict:
        """All options of a prediction: the given ones, then `config.<name>`'s, then the family's.

        Raises:
          ConfigError: the prediction or an option is unknown to this family, or a value is of
            another type than the default, not finite, negative, or out of bounds.
        """
        if name not in self.objective.predict:
            raise errors.ConfigError(
                f"objective {self.config.objective!r} has no prediction {name!r}",
                where="predict",
                fix=errors.nearest(name, self.objective.predict),
            )
        parameters = inspect.signature(self.objective.predict[name]).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for values, prefix in ((self.config.get(name, {}), f"config.{name}."), (given, "--")):
            for option, value in values.items():
                if option not in options:
                    raise errors.ConfigError(
                        f"objective {self.config.objective!r} takes no option {option!r}",
                        where=f"{prefix}{option}",
                        fix=errors.nearest(option, options),
                    )
                options[option] = _as(options[option], option, value, f"{prefix}{option}")
        return options

    def trace(self, name: str, nets=None, batch=None, **options):
        """A prediction's program, traced: what the config's options refuse, it refuses here.

        nets, batch: shapes, perhaps with shardings; by default the config's.
        """
        nets = nets or weights.abstract_nets(self.objective, self.config)
        fn, arrays = self._bind(name, options)
        return fn.trace(nets, batch or weights.abstract_batch(self.config), np.uint32(0), arrays)

    def evaluator(self, name: str, **options):
        """`run(nets, step) -> dict` of t2i_jax/evaluators/<name>.py, its options checked."""
        if options.get("sample"):
            self.check("sample", **options["sample"])
        make = plugins.load("evaluators", name).make
        return plugins.call(make, self.bound, where=f"evaluator {name}", options=options)

    def run(self, name: str, nets, batch, *, seed: int = 0, **options):
        """One prediction on one batch of numpy arrays -> pytree of device arrays."""
        self.poll()
        fn, arrays = self._bind(name, options)
        return fn(nets, batch, np.uint32(seed), arrays)

    def _bind(self, name, options):
        """A prediction's jitted program and the options that are its arguments."""
        options = self.check(name, **options)
        parameters = inspect.signature(self.objective.predict[name]).parameters
        apart = lambda k, v: (
            objective.Constant(v) in getattr(parameters[k].annotation, "__metadata__", ())
        )
        static = {k: v for k, v in options.items() if isinstance(v, int | str) or apart(k, v)}
        arrays = {k: np.float32(v) for k, v in options.items() if k not in static}
        return self._compiled(name, tuple(sorted(static.items()))), arrays

    def _compile(self, name, static):
        fn, layout = self.objective.predict[name], self._layout

        def predict(nets, batch, seed, arrays):
            if layout:
                nets, batch = layout.gather(nets), layout.spread(batch)
            return fn(nets, batch, jax.random.key(seed), **dict(static), **arrays)

        return jax.jit(predict, out_shardings=layout.whole if layout else None)

    def sample(
        self, nets, captions, *, seed=0, index=None, negative=None, batch_size=None, **options
    ):
        """Draws one picture per caption.   -> uint8 BHWC

        Args:
          nets: net -> variables, all that the family has.
          captions: B strings.
          seed: 0 … 2³² − 1.
          index: B integers, the picture's number under this seed (default 0 … B − 1). Noise
            depends on (seed, index) alone, never on the batch size or on the other captions.
          negative: a caption to be guided away from, or None.
          batch_size: pictures per compiled call.
        """
        if not 0 <= seed < SEED_LIMIT:
            raise errors.ConfigError(
                f"seed is {seed}", where="--seed", fix=f"give a number from 0 to {SEED_LIMIT - 1}"
            )
        self.check("sample", **options)
        size = min(batch_size or self.config.batch_size, len(captions))
        index = np.arange(len(captions)) if index is None else np.asarray(index)
        text_BL, mask_BL, _ = self.tokenize(captions)
        out = []
        for start in range(0, len(captions), size):
            rows = np.minimum(np.arange(start, start + size), len(captions) - 1)
            batch = {
                "text": text_BL[rows],
                "mask": mask_BL[rows],
                "index": index[rows].astype(np.int32),
            }
            if negative is not None:
                negative_BL, negative_mask_BL, _ = self.tokenize([negative] * size)
                batch |= {"negative_text": negative_BL, "negative_mask": negative_mask_BL}
            pictures = jax.device_get(self.run("sample", nets, batch, seed=seed, **options))
            if not np.isfinite(pictures).all():
                raise errors.DataError(
                    "the pictures hold values that are not finite",
                    where=f"sample with {self.check('sample', **options)}",
                    fix="choose options nearer to the defaults, or a model that was trained well",
                )
            out.append(images.to_uint8(pictures)[: len(captions) - start])
        return np.concatenate(out)

    def between(self, nets, captions, frames: int, *, seed=0, index=None, **options):
        """Draws `frames` pictures on the way from each caption's picture to the next one's, the
        last at the end; arguments as of `sample`.   -> uint8 NHWC, N = (B − 1)·frames + 1
        """
        self.check("between", **options)
        if len(captions) < 2:
            raise errors.ConfigError(
                "one picture", where="--interpolate", fix="give two prompts or more --num_images"
            )
        text_BL, mask_BL, _ = self.tokenize(captions)
        index = np.arange(len(captions)) if index is None else np.asarray(index)
        batch = {"text": text_BL, "mask": mask_BL, "index": index.astype(np.int32)}
        shares = np.arange(frames) / frames
        drawn = [
            jax.device_get(self.run("between", nets, batch, seed=seed, share=share, **options))
            for share in shares
        ]
        image_BFHWC = np.stack(drawn, 1)
        whole = image_BFHWC[:-1].reshape(-1, *image_BFHWC.shape[2:])
        return images.to_uint8(np.concatenate([whole, image_BFHWC[-1:, 0]]))

    def batch(self, pictures, captions):
        """Uint8 pictures HWC with their captions as a batch that predictions take."""
        text_BL, mask_BL, _ = self.tokenize(captions)
        squares = [transforms.square(picture, self.config.res) for picture in pictures]
        return {
            "image": transforms.to_float(np.stack(squares)),
            "text": text_BL,
            "mask": mask_BL,
            "index": np.arange(len(captions), dtype=np.int32),
            "weight": np.ones(len(captions), np.float32),
        }

    @property
    def bound(self):
        """name -> host function, the `predict` that evaluators get; "batch" makes their batches."""
        named = {name: functools.partial(self.run, name) for name in self.objective.predict}
        named["batch"] = self.batch
        return named | ({"sample": self.sample} if "sample" in named else {})


def _as(default, option: str, value, where: str):
    """An option's value as the type of its default; integers are counts, numbers not negative."""
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    if isinstance(default, tuple):
        ok = isinstance(value, tuple | list) and len(value) == len(default)
        ok = ok and all(number(v) and math.isfinite(v) and v >= 0 for v in value)
        wanted = f"{len(default)} finite numbers that are not negative"
    elif isinstance(default, float):
        ok = number(value) and math.isfinite(value) and value >= 0
        wanted = "a finite number that is not negative"
    elif isinstance(default, int) and not isinstance(default, bool):
        ok = number(value) and 1 <= value <= COUNT_LIMIT and value == int(value)
        wanted = f"a whole number from 1 to {COUNT_LIMIT}"
    else:
        ok, wanted = isinstance(value, type(default)), f"a {type(default).__name__}"
    if not ok:
        raise errors.ConfigError(f"{option} is {value!r}", where=where, fix=f"give {wanted}")
    return type(default)(value)


class Pipeline:
    """A trained model, ready to draw."""

    def __init__(self, predictor: Predictor, nets, source: str, step: int | None):
        self.predictor, self.nets = predictor, nets
        self.config, self.source, self.step = predictor.config, source, step

    @classmethod
    def load(
        cls, source: str, *, step: int | str | None = None, averaged: bool = True, load=None
    ) -> "Pipeline":
        """Opens a run's workdir (its newest checkpoint, that of `step`, or the "best"), an exported
        model's folder, or `builtin:name`; with averaged parameters where there are any.

        Args:
          load: net -> where its weights lie now, in place of what config.json says.
        Raises:
          ConfigError, DataError: no such model, or what it was trained with changed or is gone.
        """
        folder = weights.locate(source)
        config = weights.read_config(folder)
        weights.override(config, load or {})
        try:
            return cls._load(source, folder, config, step, averaged)
        except errors.DataError as e:
            if e.where not in map(str, weights.sources(config).values()):
                raise
            raise errors.DataError(
                e.what,
                where=f"{e.where}, which {folder / 'config.json'} names in config.load",
                fix="bring it back, or say where it lies now: --load=text=DIR",
            ) from e

    @classmethod
    def _load(cls, source, folder, config, step, averaged):
        predictor = Predictor(config)
        family = predictor.objective
        shapes = weights.abstract_nets(family, config)
        held = weights.held(folder) or family.trained
        wanted = {name: shapes[name] for name in held}
        nets, step = weights.load_trained(folder, wanted, step=step, averaged=averaged)
        frozen, sources = weights.frozen(family, config, besides=held), weights.sources(config)
        loaded = frozen if step is not None else {n: frozen[n] for n in frozen if n in sources}
        weights.check_frozen(loaded, weights.frozen_digest(folder, step))
        nets |= frozen
        return cls(predictor, nets, source, step)

    def __call__(self, captions, **options):
        """Pictures for captions, see Predictor.sample.   -> uint8 BHWC"""
        return self.predictor.sample(self.nets, captions, **options)

    def evaluate(self, name: str, **options) -> dict:
        """Runs one evaluator of t2i_jax/evaluators on this model."""
        return self.predictor.evaluator(name, **options)(self.nets, self.step or 0)()
