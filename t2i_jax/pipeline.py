"""Prompts in, pictures out: what sample.py, evaluators and notebooks call, for every family."""

import functools
import inspect
import math

import jax
import numpy as np

from t2i_jax import errors, images, objective, plugins, weights
from t2i_jax.text import tokenize

SEED_LIMIT = 2**32
STEPS_LIMIT = 10_000


class Predictor:
    """An objective's predictions as host functions of captions, compiled once per static option.

    Options that are integers, strings or booleans are static; floats and tuples of floats are
    arrays, so that another guidance scale compiles nothing.
    """

    def __init__(self, config):
        self.config = config
        self.objective = objective.make(config)
        self.tokenize = tokenize.open(config.load.get("text", "bytes"), config.text_length)
        self._compiled = functools.lru_cache(maxsize=32)(self._compile)

    def options(self, name: str) -> dict:
        """Option -> default of a prediction: the family's, then those of `config.<name>`."""
        parameters = inspect.signature(self.objective.predict[name]).parameters.values()
        family = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        ours = dict(self.config.get(name, {}))
        for option in ours:
            if option not in family:
                raise errors.ConfigError(
                    f"unknown option {option!r}",
                    where=f"config.{name}",
                    fix=errors.nearest(option, family),
                )
        return family | ours

    def check(self, name: str, **options) -> dict:
        """All options of a prediction with defaults filled in.

        Raises:
          ConfigError: the prediction or an option is unknown to this family, or a number is not
            finite, negative, or out of bounds.
        """
        if name not in self.objective.predict:
            raise errors.ConfigError(
                f"objective {self.config.objective!r} has no prediction {name!r}",
                where="predict",
                fix=errors.nearest(name, self.objective.predict),
            )
        known = self.options(name)
        for option, value in options.items():
            where = f"--{option}"
            if option not in known:
                raise errors.ConfigError(
                    f"objective {self.config.objective!r} takes no option {option!r}",
                    where=where,
                    fix=errors.nearest(option, known),
                )
            numbers = value if isinstance(value, tuple | list) else [value]
            numbers = [v for v in numbers if isinstance(v, int | float)]
            if any(not math.isfinite(v) or v < 0 for v in numbers):
                raise errors.ConfigError(
                    f"{option} is {value}",
                    where=where,
                    fix="give finite numbers that are not negative",
                )
            if isinstance(value, int) and not 1 <= value <= STEPS_LIMIT:
                raise errors.ConfigError(
                    f"{option} is {value}",
                    where=where,
                    fix=f"give a number from 1 to {STEPS_LIMIT}",
                )
        return {k: v if v is None else type(v)(options.get(k, v)) for k, v in known.items()} | {
            k: v for k, v in options.items() if known[k] is None
        }

    def run(self, name: str, nets, batch, *, seed: int = 0, **options):
        """One prediction on one batch of numpy arrays -> pytree of device arrays."""
        options = self.check(name, **options)
        static = {k: v for k, v in options.items() if v is None or isinstance(v, int | str)}
        arrays = {k: np.float32(v) for k, v in options.items() if k not in static}
        fn = self._compiled(name, tuple(sorted(static.items())))
        return fn(nets, batch, np.uint32(seed), arrays)

    def _compile(self, name, static):
        fn = self.objective.predict[name]

        def predict(nets, batch, seed, arrays):
            return fn(nets, batch, jax.random.key(seed), **dict(static), **arrays)

        return jax.jit(predict)

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

    @property
    def bound(self):
        """name -> host function, the `predict` that evaluators get."""
        named = {name: functools.partial(self.run, name) for name in self.objective.predict}
        return named | ({"sample": self.sample} if "sample" in named else {})


class Pipeline:
    """A trained model, ready to draw."""

    def __init__(self, predictor: Predictor, nets, source: str, step: int | None):
        self.predictor, self.nets = predictor, nets
        self.config, self.source, self.step = predictor.config, source, step

    @classmethod
    def load(cls, source: str, *, step: int | None = None) -> "Pipeline":
        """Opens a run's workdir, an exported model's folder, or `builtin:name`."""
        folder = weights.locate(source)
        config = weights.read_config(folder)
        predictor = Predictor(config)
        shapes = weights.abstract_nets(predictor.objective, config)
        trained = {name: shapes[name] for name in predictor.objective.trained}
        nets = weights.load_trained(folder, trained, step=step)
        return cls(predictor, {**nets, **weights.frozen(predictor.objective, config)}, source, step)

    def __call__(self, captions, **options):
        """Pictures for captions, see Predictor.sample.   -> uint8 BHWC"""
        return self.predictor.sample(self.nets, captions, **options)

    def evaluate(self, name: str, **options) -> dict:
        """Runs one evaluator of t2i_jax/evaluators on this model."""
        module = plugins.load("evaluators", name)
        run = plugins.call(
            module.make, self.predictor.bound, where=f"evaluator {name}", options=options
        )
        return run(self.nets, self.step or 0)
