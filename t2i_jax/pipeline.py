"""Prompts in, pictures out: what sample.py, evaluators and notebooks call, for every family."""

import functools
import inspect
import os
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from t2i_jax import errors, fields, images, limits, objective, plugins, sharding, weights
from t2i_jax.data import inputs, transforms
from t2i_jax.lora import SUFFIX
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import hf, lora_files, opener, previews
from t2i_jax.run import compile_cache
from t2i_jax.text import tokenize, words

NOUNS = {objective.Pictures: "picture", objective.Texts: "text"}  # of a prediction's kind
EXAMPLES = {"image": "--image", "caption": "--prompt", "noise": "noise"}  # kind -> its flag
WANTED = {"image": "uint8 arrays, each height × width × 3", "noise": "finite float arrays HWC"}
TAKEN = (  # arguments of `Predictor.draw` and `Pipeline.draw`
    *("name", "nets", "examples", "seed", "index", "batch_size", "watch", "callback"),
)


class Predictor:
    """An objective's predictions as host functions of captions, compiled once per static option.

    Options that are integers, strings or booleans are static; floats and tuples of floats are
    arrays, so that another guidance scale compiles nothing, but for what
    `fields.compiled_apart` in the option's annotation says. With a `sharding.Layout`, batches are
    split over its mesh where they divide, and results lie whole on every device. `draw` makes them
    divide.
    """

    def __init__(self, config, *, layout=None):
        self.config, self._layout = config, layout
        self.poll = lambda: None  # called before each batch; may raise to stop
        self.objective = objective.make(config)
        for name, fn in self.objective.predict.items():
            _check_signature(name, fn)
        read = [one for one in self.objective.inputs if one.tokenizer is not None]
        self.tokenizers = {key: one.tokenizer for one in read for key in one.shapes}
        self._readers = {name: self._reader(name) for name in self.objective.predict}
        # Bounded, as users choose static options such as steps, and each program stays in memory.
        self._compiled = functools.lru_cache(maxsize=32)(self._compile)
        self._announced = set()  # programs that were compiled, by what they depend on

    def check(self, name: str, **given) -> dict:
        """All options of a prediction: the given ones, then `config.<name>`'s, then the family's.

        Raises:
          ConfigError: the prediction or an option is unknown to this family, or a value is
            against the option's type or rules.
        """
        if name not in self.objective.predict:
            raise errors.ConfigError(
                f"objective {self.config.objective!r} has no prediction {name!r}",
                where="the model",
                fix=f"it has {', '.join(self.objective.predict)}; or open another model",
            )
        fn = self.objective.predict[name]
        parameters = fields.signature(fn).parameters
        options = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
        # What is drawn otherwise, as from another image, has the settings of drawing.
        drawing = {k: v for k, v in self.config.get("sample", {}).items() if k in options}
        own = self.config.get(name, {})
        for values, where in ((drawing, "config.sample"), (own, f"config.{name}"), (given, "--")):
            options |= fields.check(fn, values, where=where, given=3)
        return options

    def trace(self, name: str, nets=None, batch=None, **options):
        """A prediction's program, traced: what the config's options refuse, it refuses here.

        nets, batch: shapes, perhaps with shardings; by default the config's.
        """
        nets = nets or weights.abstract_nets(self.objective, self.config)
        batch = batch or weights.abstract_batch(self.objective, self.config.batch_size)
        fn, arrays = self._bind(name, options)
        return fn.trace(nets, batch, np.uint32(0), arrays)

    def evaluator(self, name: str, **options):
        """`run(nets, step) -> dict` of t2i_jax/evaluators/<name>.py, its options checked."""
        if options.get("sample"):
            self.check("sample", **options["sample"])
        make = plugins.load("evaluators", name).make
        options = self.evaluator_options(name, options)
        return fields.build(make, options, self.bound, where=f"evaluator {name}")

    def evaluator_options(self, name: str, options) -> dict:
        """The options, and for an evaluator that needs data the split "test" of the config's."""
        make = plugins.load("evaluators", name).make
        data = inspect.signature(make).parameters.get("data")
        needed = data is not None and data.default is data.empty
        own = {"res": self.config.size or self.config.res, **self.config.data, "split": "test"}
        return ({"data": own} if needed else {}) | dict(options)

    def run(self, name: str, nets, batch, *, seed=0, **options):
        """One prediction on one batch of numpy arrays -> pytree of device arrays.

        seed: a number, or B numbers, one for each example.
        """
        self.poll()
        nets = dict(nets) if isinstance(nets, weights.OnDemand) else nets
        fn, arrays = self._bind(name, options)
        # One type for all seeds, and an argument: another seed then needs no other program.
        return fn(nets, batch, np.asarray(seed, np.uint32), arrays)

    def _bind(self, name, options, stage=None):
        """A prediction's jitted program and the options that are its arguments.

        stage: the number of one of its stages, for the program of that alone.
        """
        options = self.check(name, **options)
        parameters = fields.signature(self.objective.predict[name]).parameters
        static = {k: v for k, v in options.items() if fields.is_static(parameters[k], v)}
        arrays = {k: np.float32(v) for k, v in options.items() if k not in static}
        # Sorted, as the key of a cache must not depend on the order of options.
        return self._compiled(name, tuple(sorted(static.items())), stage), arrays

    def _compile(self, name, static, stage):
        layout, parts = self._layout, self.objective.stages.get(name)
        fn = self.objective.predict[name] if stage is None else parts[stage].fn

        def predict(nets, batch, seed, arrays):
            if layout:
                nets, batch = layout.gather(nets), layout.spread(batch)
            if layout and seed.ndim:
                seed = layout.spread(seed)
            key = jax.vmap(jax.random.key)(seed) if seed.ndim else jax.random.key(seed)
            return fn(nets, batch, key, **dict(static), **arrays)

        predict = layout.context()(predict) if layout else predict
        # What lies between stages stays split.
        whole = layout and stage is None
        return jax.jit(predict, out_shardings=layout.whole if whole else None)

    def kind(self, name: str):
        """What a prediction gives: `objective.Pictures`, `objective.Texts`, or else arrays."""
        self.check(name)
        said = fields.signature(self.objective.predict[name]).return_annotation
        kind = getattr(said, "__origin__", said)  # of Annotated[Texts, key], Texts
        return objective.Pictures if name == "sample" else kind  # it draws, whoever wrote it

    def _reader(self, name: str):
        """The tokenizer that reads what a prediction gives; None where it gives no texts.

        Raises:
          ConfigError: there are several, and its annotation does not name one of them.
        """
        said = fields.signature(self.objective.predict[name]).return_annotation
        if getattr(said, "__origin__", said) is not objective.Texts:
            return None
        readers = traverse_util.flatten_dict(self.tokenizers, sep="/")
        # Without a mark, the only tokenizer there is.
        key, *others = getattr(said, "__metadata__", readers) or [""]
        if others or key not in readers:
            raise errors.ConfigError(
                f"nothing says which tokenizer reads the texts of prediction {name!r}",
                where=f"objectives, {name}",
                fix=f"annotate it as Annotated[Texts, …], with one of {sorted(readers)}",
            )
        return readers[key]

    def draws(self, name: str) -> bool:
        """Whether a prediction gives pictures or texts."""
        return self.kind(name) in NOUNS

    def draw(
        self,
        name: str,
        nets,
        examples,
        *,
        seed=0,
        index=None,
        batch_size=None,
        watch=None,
        **options,
    ):
        """A prediction of B examples, on the host.

        Args:
          name: of the family's predictions.
          nets: net -> variables, all that the family has. Those that are loaded on demand,
            `weights.OnDemand`, are loaded for each stage of the prediction, and freed after it.
          examples: what the prediction reads of "caption": B strings, "image": B uint8 images HWC
            of any size, "negative_prompt": B captions to be guided away from, or None.
          seed: 0 … 2³² − 1, or B of them.
          index: B integers, an example's number under its seed (default 0 … B − 1). Noise depends
            on (seed, index) alone, never on the batch size or on the other examples.
          batch_size: examples per compiled call at most. Fewer are padded to a power of two: every
            size is a program of its own, and compiling takes longer than drawing. Of several
            devices each gets as many, and one at least.
          watch: a function of a step's number, from 1 on, and of what the batch in work would be
            then: pictures as latents, float32 BhwC. Each stage and step is then a program of its
            own, and whether somebody watches changes nothing in those.
          options: of the prediction.
        Returns:
          Pictures as uint8 BHWC, texts as B strings, of other predictions their arrays.
        Raises:
          ConfigError: no such prediction, a wrong option, examples that it lacks or does not read,
            arrays that are not one for each example, or no stages where they are needed.
          DataError: pictures that are not finite.
        """
        settings, kind = self.check(name, **options), self.kind(name)
        n = self._checked_count(name, examples, seed, index, settings)
        size = self._rows(name, n, batch_size)
        seed_B = np.broadcast_to(np.asarray(seed), n)
        staged = watch is not None or isinstance(nets, weights.OnDemand)
        if staged and name not in self.objective.stages:
            raise errors.ConfigError(
                f"prediction {name!r} of {self.config.objective!r} is one program, without stages",
                where="callback" if watch else "low_memory",
                fix="leave it out",
            )
        whole, starts = fields.build(self.batch, examples, where="examples"), range(0, n, size)
        if index is not None:
            whole["index"] = np.asarray(index).astype(np.int32)

        def batch_at(start):
            # The last example fills the batch up. Its copies are cut off behind the drawing.
            rows = np.minimum(np.arange(start, start + size), n - 1)
            return jax.tree.map(lambda x: x[rows], whole), seed_B[rows].astype(np.uint32)

        began = self._announced_at(name, nets, *batch_at(0), examples, options, staged)
        if staged:
            cut = watch and (lambda i, step, x: watch(step, np.asarray(x)[: n - starts[i]]))
            drawn = self._in_stages(name, nets, [*map(batch_at, starts)], cut, options)
        else:
            drawn = self._in_turn(name, nets, map(batch_at, starts), options)
        out = []
        for start, found in zip(starts, drawn, strict=True):
            self._check_result(name, found, size, settings)
            if began is not None:
                _say(f"compiled, and drew the first in {time.perf_counter() - began:.1f} s")
                began = None
            found = images.to_uint8(found) if kind is objective.Pictures else found
            out.append(jax.tree.map(lambda x, start=start: x[: n - start], found))
        found = jax.tree.map(lambda *parts: np.concatenate(parts), *out)
        return self._readers[name].decode(*found) if kind is objective.Texts else found

    def _checked_count(self, name: str, examples, seed, index, settings) -> int:
        """How many examples there are; checks what `draw` is given of each."""
        if self.kind(name) is objective.OfBatch:
            raise _of_batch(name)
        fields.check_names(self.batch, examples, where="examples")
        n = _count(examples)
        if np.ndim(seed) and len(seed) != n:
            raise errors.ConfigError(
                f"{len(seed)} of them for {n} examples", where="seed", fix="give one for each"
            )
        if index is not None:
            limits.places(index, n)
        for one in np.broadcast_to(np.asarray(seed), n).tolist():
            limits.check_seed(one, "--seed")
        if any(examples.get("negative_prompt") or ()):
            self.check_negative(settings)
        return n

    def _rows(self, name: str, n: int, batch_size) -> int:
        """The rows of a compiled call for n examples, see `draw`."""
        if batch_size is not None:
            fields.checked(fields.Size, "batch_size", batch_size, where="batch_size")
        size = min(batch_size or self.config.batch_size, _padded(n))
        together = getattr(self.objective.predict[name], "together", False)
        if together and n != size:
            raise errors.ConfigError(
                f"prediction {name!r} reads a batch as a whole, and {n} examples are not one of "
                f"{size}",
                where="draw",
                fix="give 2, 4, 8, … examples, and a batch_size that holds them",
            )
        if together or not self._layout:
            return size
        return -(-size // self._layout.parts) * self._layout.parts

    def _in_turn(self, name: str, nets, batches, options):
        """Results on the host. One batch is computed while the result before it is fetched."""
        ahead = []
        for batch, seed in batches:
            ahead.append(self.run(name, nets, batch, seed=seed, **options))
            if len(ahead) > 1:
                yield jax.device_get(ahead.pop(0))
        yield jax.device_get(ahead.pop())

    def _in_stages(self, name: str, nets, batches, watch, options):
        """The same. All batches go through a stage before its nets make room for the next one's.

        watch: a function of a batch's number, a step's number and its "preview".
        """
        batches, seeds = map(list, zip(*batches, strict=True))
        settings, held, own = self.check(name, **options), (), {}
        for number, stage in enumerate(self.objective.stages[name]):
            fn, arrays = self._bind(name, options, number)
            if stage.nets != held:
                held, own = stage.nets, {}  # freed, before others are loaded
                own = {net: nets[net] for net in nets if net.removesuffix(SUFFIX) in held}

            def run(i, batch, seed, stage=stage, fn=fn, own=own, arrays=arrays):
                batch = self._placed(batch)
                if stage.times is None:
                    return jax.device_get(fn(own, batch, seed, arrays))
                for n in range(stage.times(batch, **settings)):
                    new = fn(own, batch, seed, {**arrays, "n": np.int32(n)})
                    batch = stage.changed(batch, new)
                    if watch:
                        watch(i, n + 1, new["preview"])
                return jax.device_get(batch)

            for i, seed in enumerate(seeds):
                self.poll()
                batches[i] = run(i, batches[i], seed)
            del run  # it refers to the nets
        return batches

    def _placed(self, batch):
        """A stage's result on the devices. What a scan made begins with layers, and these need not
        divide.
        """
        if not (layout := self._layout):
            return jax.device_put(batch)
        fits = lambda x: np.ndim(x) and len(x) % layout.parts == 0
        where = jax.tree.map(lambda x: layout.batch if fits(x) else layout.whole, batch)
        return jax.device_put(batch, where)

    def _announced_at(self, name: str, nets, batch, seed, examples, options, staged: bool):
        """Says when something is compiled, which may take long, and gives the time; else None."""
        shapes = str(jax.tree.map(np.shape, batch))
        fn, arrays = self._bind(name, options)
        program, count = (fn, shapes, np.shape(seed), staged), len(batch["index"])
        if program in self._announced:
            return None
        if isinstance(nets, weights.OnDemand):
            nets = weights.abstract_nets(self.objective, self.config)
        kinds = {kind for kind in EXAMPLES if kind in examples}
        self._check_read(name, fn, (nets, batch, seed, arrays), kinds)
        self._announced.add(program)
        what = NOUNS.get(self.kind(name), "example")
        _say(f"compiling for {count} {what}{'s' * (count > 1)} at once …")
        return time.perf_counter()

    def _check_result(self, name: str, found, size: int, settings) -> None:
        """DataError for pictures that are not finite, ConfigError unless there are `size`."""
        if self.kind(name) is objective.Pictures and not np.isfinite(found).all():
            raise errors.DataError(
                "the pictures hold values that are not finite",
                where=f"{name} with {settings}",
                fix="choose options nearer to the defaults, or a model that was trained well",
            )
        if any(np.shape(x)[:1] != (size,) for x in jax.tree.leaves(found)):
            raise _of_batch(name)

    def _check_read(self, name: str, fn, arguments, kinds) -> None:
        """ConfigError unless a prediction has the examples that it reads, and reads those it has.

        One kind of example alone may be there only to say how many there are.

        Args:
          arguments: of `fn`, the prediction's program.
          kinds: those of EXAMPLES that the batch was made of.
        """
        made_of = {key: one.reads for one in self.objective.inputs for key in one.shapes}
        made_of["noise"] = ("noise",)
        try:
            jaxpr = fn.trace(*arguments).jaxpr.jaxpr
        except KeyError as e:
            # Only the lack of an example is the user's. Other keys are a fault of the family.
            lacking = [kind for kind in made_of.get(e.args[0], ()) if kind not in kinds]
            if not lacking:
                raise
            raise errors.ConfigError(
                f"prediction {name!r} reads {e.args[0]!r}, and there is no {lacking[0]}",
                where=EXAMPLES.get(lacking[0], "examples"),
                fix="give one",
            ) from e
        _, batch, *_ = jax.tree.unflatten(jax.tree.structure(arguments), jaxpr.invars)
        # An input is read if an equation has it, or a result is the input itself.
        used = {id(var) for equation in jaxpr.eqns for var in equation.invars}
        used |= {id(var) for var in jaxpr.outvars}
        read = {
            kind
            for key, reads in made_of.items()
            if key in batch and any(id(var) in used for var in jax.tree.leaves(batch[key]))
            for kind in reads
        }
        for kind in sorted(kinds - read) if len(kinds) > 1 else ():
            raise errors.ConfigError(
                f"prediction {name!r} does not read the {kind}",
                where=EXAMPLES[kind],
                fix="leave it out",
            )

    def check_negative(self, options: dict, where: str = "--negative_prompt") -> None:
        """Raises ConfigError unless pictures with these options are guided away from a prompt.

        A prediction that reads "negative_text" has an option `guidance`.
        """
        if "guidance" not in options:
            raise errors.ConfigError(
                f"objective {self.config.objective!r} takes no negative prompt",
                where=where,
                fix="leave it out, or draw with a model that takes --guidance",
            )

    def sample(self, nets, captions, *, negative_prompt=None, noise=None, **options):
        """`draw` of the prediction "sample": one picture per caption.   -> uint8 BHWC

        negative_prompt: a caption to be guided away from, or B of them, or None.
        noise: B arrays to begin with, or None for those of the seed.
        """
        examples = {"caption": captions} | ({} if noise is None else {"noise": noise})
        if negative_prompt is not None:
            one = isinstance(negative_prompt, str)
            examples["negative_prompt"] = (
                [negative_prompt] * len(captions) if one else negative_prompt
            )
        return self.draw("sample", nets, examples, **options)

    def between(self, nets, captions, frames: int, **options):
        """Draws `frames` pictures on the way from each caption's picture to the next one's, the
        last at the end; options as of `draw`.   -> uint8 NHWC, N = (B − 1)·frames + 1
        """
        if len(captions) < 2:
            raise errors.ConfigError(
                "one picture", where="--interpolate", fix="give two prompts or more --num_images"
            )
        n, size = len(captions), _padded(len(captions))
        # Each needs the next one, so all are one batch, which copies of the last one fill up.
        fill = lambda rows: [*rows, *[rows[-1]] * (size - n)] if np.ndim(rows) else rows
        options = {"batch_size": size, **{name: fill(x) for name, x in options.items()}}
        way = functools.partial(self.draw, "between", nets, {"caption": fill(captions)}, **options)
        image_BFHWC = np.stack([way(share=share)[:n] for share in np.arange(frames) / frames], 1)
        whole = image_BFHWC[:-1].reshape(-1, *image_BFHWC.shape[2:])
        return np.concatenate([whole, image_BFHWC[-1:, 0]])

    def batch(self, image=None, caption=None, negative_prompt=None, noise=None, scale=None):
        """Examples as a batch that predictions take: uint8 images HWC, captions, those to be guided
        away from, noise, and how much larger images are in their files; what there is of them, and
        the inputs that can be made of that.
        """
        given = {"image": image, "caption": caption, "scale": scale}
        given = {key: rows for key, rows in given.items() if rows is not None}
        batch, n = self._made(given), len(next(iter(given.values())))
        if any(negative_prompt or ()):
            # Where all are empty, the key is left out, and the null condition takes its place.
            away = self._made({"caption": [text or "" for text in negative_prompt]})
            batch |= {f"negative_{key}": tokens for key, tokens in away.items()}
        if noise is not None:
            batch["noise"] = np.asarray(noise, np.float32)
        seen = lambda x: transforms.to_float(x) if sharding.is_image(x.dtype, x.ndim) else x
        batch = jax.tree.map(seen, batch)  # as `Layout.place` does in training
        return batch | {"index": np.arange(n, dtype=np.int32), "weight": np.ones(n, np.float32)}

    def _made(self, given) -> dict:
        """The arrays of the inputs that read no more than is given."""
        examples = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
        n, read = len(examples), [one for one in self.objective.inputs if {*one.reads} <= {*given}]
        return inputs.arrays(read, examples, [None] * n, np.arange(n))

    def cuts(self, captions) -> list[str | None]:
        """What is not read of each caption, for it is too long: the most that a net loses."""
        each = [[None] * len(captions)]
        each += [tokenize.read(one, captions)[1] for one in self.tokenizers.values()]
        return [max(lost, key=lambda text: len(text or "")) for lost in zip(*each, strict=True)]

    @property
    def bound(self):
        """name -> host function, the `predict` that evaluators get; "batch" makes their batches."""
        named = {name: functools.partial(self.run, name) for name in self.objective.predict}
        named["batch"] = self.batch
        return named | ({"sample": self.sample} if "sample" in named else {})


def _check_signature(name: str, fn) -> None:
    """ConfigError unless a prediction's options stand after `*`, under names that `draw` leaves."""
    for option in list(fields.signature(fn).parameters.values())[3:]:
        if option.kind is not option.KEYWORD_ONLY or option.name in TAKEN:
            raise errors.ConfigError(
                f"prediction {name!r} has {option.name!r} as an option",
                where=f"objectives, {name}",
                fix=f"write options after `*`, and not as one of {', '.join(TAKEN)}",
            )


def _of_batch(name: str) -> errors.ConfigError:
    return errors.ConfigError(
        f"prediction {name!r} gives no array with an entry for each example",
        where="draw",
        fix="call Predictor.run with a whole batch",
    )


def _count(examples) -> int:
    """How many examples there are.

    Raises:
      ConfigError: none, other numbers of them, no lists, captions that are no strings, or images
        that are not uint8 with three channels.
    """
    counts = {}
    for name, rows in examples.items():
        if rows is None:
            continue
        if (
            isinstance(rows, str)
            or not hasattr(rows, "__len__")
            or not all(_is_example(name, row) for row in rows)
        ):
            wanted = WANTED.get(name, "strings")
            raise errors.ConfigError(
                f"the examples of {name!r} are none that can be read",
                where=f"examples[{name!r}]",
                fix=f"give a list of {wanted}, one for each example",
            )
        counts[name] = len(rows)
    if len({*counts.values()}) != 1 or 0 in counts.values():
        said = ", ".join(f"{n} of {name!r}" for name, n in counts.items()) or "none"
        raise errors.ConfigError(
            f"numbers of examples differ, or there are none: {said}",
            where="examples",
            fix="give as many of each, and one at least",
        )
    return next(iter(counts.values()))


def _is_example(name: str, value) -> bool:
    if name == "image":
        shape = np.shape(value)
        return getattr(value, "dtype", None) == np.uint8 and len(shape) == 3 and shape[2] == 3
    if name == "noise":
        return np.ndim(value) == 3 and bool(np.isfinite(value).all())
    return isinstance(value, str) or (value is None and name == "negative_prompt")


def _padded(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def _say(text: str) -> None:
    """As a line of the log, or where none is shown, as in a notebook, on stderr."""
    if logging.level_info():
        logging.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


class Pipeline:
    """A trained model, ready to draw.

    words: those of its training captions, or None where they are not known.
    adapters: "name", "sha256" and "weight" of each file of adapters.
    int8: as of `load`.
    preview: the `previews.Preview` that callbacks see pictures by, or None.
    """

    adapters: Sequence[Mapping] = ()
    int8: str = ""
    preview: previews.Preview | None = None

    def __init__(self, predictor: Predictor, nets, source: str, step: int | None, words=None):
        self.predictor, self.nets = predictor, nets
        self.config, self.source, self.step = predictor.config, source, step
        self.words, self._told = words, set()

    @classmethod
    def load(
        cls,
        source: str,
        *,
        step: int | str | None = None,
        averaged: bool = True,
        load=None,
        lora: Mapping[str, float] | None = None,
        int8: str = "",
        mesh: Mapping[str, int] | None = None,
        strategy: str = "data",
        low_memory: bool = False,
        preview: str | None = None,
    ) -> "Pipeline":
        """Opens a run's workdir (its newest checkpoint, that of `step`, or the "best"), an exported
        model's folder, or `builtin:name`; with averaged parameters where there are any. Or a
        pretrained pipeline: a folder of diffusers, or `hf:org/name[@revision]`.

        Args:
          load: net -> where its weights lie now, in place of what config.json says.
          lora: of a pretrained pipeline, file of adapters -> weight, see `pretrained.lora_files`.
          int8: nets whose kernels are kept in eight bits, with commas, such as "model,text".
          mesh: axis -> devices of this process, see `sharding.Layout`; by default all along one
            axis, over which batches are split.
          strategy: "data" holds the nets whole on every device, "fsdp" a part of them on each.
          low_memory: of a pretrained pipeline, nets are loaded for the stage of a drawing that
            reads them, and leave the devices after it. Only the largest has to fit.
          preview: a small autoencoder that `callback` sees pictures by: a folder, or
            "hf:madebyollin/taesd".
        Raises:
          ConfigError, DataError: no such model, or what it was trained with changed or is gone.
        """
        compile_cache.enable()
        source = os.fspath(source)
        if not isinstance(lora or {}, Mapping):
            raise errors.ConfigError(
                f"it is {lora!r}", where="lora", fix='give files and weights: {"FILE": 0.8}'
            )
        with weights.describes(source):
            config, local = weights.config_at(source), jax.local_devices()
        # Not by config.attention, which names a kernel of the devices that trained.
        layout = sharding.Layout(mesh or {"data": -1}, strategy, devices=local)
        layout = layout if len(local) > 1 else None
        weights.override(config, load or {})

        def complete(read):
            # What is wrong with a small network is told before a large one is read.
            seen = None
            if preview:
                with weights.describes(f"{source}/config.json"):
                    latents = weights.sources(config).get(folders.AUTOENCODER)
                seen = previews.Preview(preview, latents)
            pipe = read()
            pipe.preview, pipe.int8 = seen, int8
            return pipe

        if weights.is_pipeline(source):
            config.int8 = int8
            given = source, config, step, lora or {}, layout, low_memory
            return complete(lambda: cls._import(*given))
        if low_memory:
            raise errors.ConfigError(
                "nets are loaded stage by stage of a pretrained pipeline alone",
                where="low_memory",
                fix="leave it out, or export the run with --format=diffusers, and draw from that; "
                "adapters by --lora beside their pipeline",
            )
        if lora:
            raise errors.ConfigError(
                "files of adapters go with a pretrained pipeline",
                where="lora",
                fix="leave them out; a run's own adapters are part of it",
            )
        folder = weights.locate(source)
        try:
            # A model's config names what its author chose. Only what the caller names is fetched.
            with hf.offline_except(*weights.named(load), *opener.each(preview)):
                given = source, folder, config, step, averaged, layout, int8
                return complete(lambda: cls._load(*given))
        except (errors.DataError, errors.ConfigError) as e:
            described = folder / "config.json"
            if e.where == str(described):  # its sources may be senseless, too
                raise
            places = {str(source): name for name, source in weights.sources(config).items()}
            places |= {f"config.load.{name}={source}": name for source, name in places.items()}
            if e.where not in places:
                raise
            # The kind stays, and with it the exit code.
            raise type(e)(
                e.what,
                where=f"{e.where}, which {described} names in config.load",
                fix=f"bring it back, or say where it lies now: --load={places[e.where]}=DIR",
            ) from e

    @classmethod
    def _import(cls, source, config, step, files, layout, low_memory):
        if step is not None:
            raise errors.ConfigError(
                f"a pretrained pipeline has no step {step}", where=source, fix="leave out --step"
            )
        with weights.describes(source):
            predictor = Predictor(config, layout=layout)
        nets = weights.imported(predictor.objective, config, layout and layout.nets)
        nets = nets if low_memory else dict(nets)
        if files:
            shapes = weights.abstract_nets(predictor.objective, config)
            params = {name: net["params"] for name, net in shapes.items()}
            adapters = lora_files.opened(folders.open(source), params, files)
            # Their scale is part of them, so that any rank will do here.
            config.lora = {name: {"rank": 1} for name in adapters}
            own = {f"{n}{SUFFIX}": {"params": tree} for n, tree in adapters.items()}
            nets |= jax.device_put(own, layout.nets(own)) if layout else own
            predictor = Predictor(config, layout=layout)
        pipe = cls(predictor, nets, source, None)
        pipe.adapters = lora_files.described(files)
        return pipe

    @classmethod
    def _load(cls, source, folder, config, step, averaged, layout, int8):
        with weights.describes(folder / "config.json"):
            predictor = Predictor(config, layout=layout)
            family = predictor.objective
            shapes = weights.abstract_nets(family, config)
        held = weights.nets_in(folder) or family.trained
        wanted = {name: shapes[name] for name in held}
        wanted = sharding.on(wanted, layout.nets(wanted)) if layout else wanted
        nets, step = weights.load_trained(folder, wanted, step=step, averaged=averaged)
        known = weights.frozen_digests(folder, step)
        # A digest of all nets, as older runs have, can be compared with all of them alone.
        unread = () if isinstance(known, str) else family.training_only
        options = dict(except_nets=(*held, *unread), shapes=shapes)
        frozen = weights.frozen(family, config, layout and layout.nets, **options)
        sources = weights.sources(config)
        loaded = frozen if step is not None else {n: frozen[n] for n in frozen if n in sources}
        weights.check_frozen(loaded, known)
        # After the check: digests are those of what the run was trained with.
        nets = weights.in_eight_bits(nets | frozen, int8)
        # What another model began with knows words that these captions lack.
        base = {net.removesuffix(SUFFIX) for net in family.trained} & sources.keys()
        return cls(predictor, nets, source, step, None if base else words.read(folder))

    def __call__(
        self,
        prompts,
        *,
        num_images: int = 1,
        seed=0,
        negative_prompt=None,
        index=None,
        batch_size: int | None = None,
        noise=None,
        callback=None,
        **options,
    ):
        """Draws pictures.   -> uint8 BHWC, the pictures of a prompt beside each other

        Args:
          prompts: a string, or a list of them.
          num_images: pictures of each prompt.
          seed: 0 … 2³² − 1, for all pictures: they differ by their place among them. Or a list: a
            seed for each prompt, or for each picture, which is then drawn as if alone.
          negative_prompt: what to be guided away from, or a list with one for each prompt.
          index: places, in place of 0 … B − 1: noise depends on (seed, place) alone.
          batch_size: pictures drawn together at most; it changes no picture.
          noise: what the pictures begin with in place of the seed's noise, such as another
            program's: B × height × width × channels of what the model learned, float32.
          callback: a function `(step, images)` that is called after each step, from 1 on, with what
            the pictures of the batch in work would be: uint8 BHWC, by the `preview` of `load`.
          options: of the family's "sample", such as guidance and steps.
        Raises:
          ConfigError: an argument of a wrong type or length, an option the family lacks, or a
            callback without a `preview`.
        """
        asked = limits.pictures(prompts, num_images, seed, negative_prompt, index)
        limit = self.config.batch_size if batch_size is None else batch_size
        limit = fields.checked(fields.Size, "batch_size", limit, where="batch_size")
        if known := {*options} & limits.ALIASES.keys():
            name = min(known)
            raise errors.ConfigError(
                f"no option {name!r}", where="draw", fix=f"say {limits.ALIASES[name]!r}"
            )
        texts = [text for text in (*asked["captions"], *(asked["negative_prompt"] or ())) if text]
        self.tell_unknown_words(texts)
        self._tell_what_is_not_read(texts)
        settings = self.predictor.check("sample", **options)
        if any(asked["negative_prompt"] or ()) and settings.get("guidance") == 1:
            logging.warning("guidance 1 is none: the negative prompt changes nothing")
        options = dict(noise=noise, batch_size=limit, watch=self._watch(callback), **options)
        return self.predictor.sample(self.nets, **asked, **options)

    def draw(self, name: str, examples, *, callback=None, **options):
        """A prediction of examples with this model; see `Predictor.draw`, and above."""
        watch = self._watch(callback)
        return self.predictor.draw(name, self.nets, examples, watch=watch, **options)

    def _watch(self, callback):
        if callback is None:
            return None
        if self.preview is None:
            raise errors.ConfigError(
                "no small autoencoder to decode previews with",
                where="callback",
                fix=f"load the model with preview=…, a folder or {previews.KNOWN}",
            )
        return lambda step, z_BHWC: callback(step, self.preview(z_BHWC))

    def tell_unknown_words(self, texts) -> None:
        """Warns, once for each, of words that the training captions do not have."""
        if self.words is None:
            return
        missing = [
            w for text in dict.fromkeys(texts) for w in words.unknown(text or "", self.words)
        ]
        if missing := [word for word in dict.fromkeys(missing) if word not in self._told]:
            self._told.update(missing)
            logging.warning("%s", words.message(missing, self.words))

    def _tell_what_is_not_read(self, texts) -> None:
        """Warns, once for each, of texts that are too long for the model."""
        new = [text for text in dict.fromkeys(texts) if text not in self._told]
        for text, lost in zip(new, self.predictor.cuts(new), strict=True):
            if lost:
                self._told.add(text)
                logging.warning("%r … is too long for the model, which misses %r", text[:40], lost)

    def evaluate(self, name: str, **options) -> dict:
        """Runs one evaluator of t2i_jax/evaluators on this model."""
        return self.predictor.evaluator(name, **options)(self.nets, self.step or 0)()
