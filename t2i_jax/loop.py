"""The one training loop: evaluate, save, take a batch, step, log. It knows no family."""

import functools
import json
import logging as std_logging
import pathlib
import platform
import signal
import threading
import time

import jax
import ml_collections
import numpy as np
from absl import logging

import t2i_jax
from t2i_jax import (
    checkpoint,
    errors,
    images,
    metrics,
    optim,
    pipeline,
    plugins,
    sharding,
    step,
    weights,
)
from t2i_jax.data import cache, loader

SKIP_LIMIT = 10  # non-finite steps in a row that end a run
FREE_TO_CHANGE = (  # keys another start may change; any other difference is refused
    *("steps", "log_every", "save_every", "sample_every", "eval_every", "evaluators", "keep"),
    *("prompts", "sample", "mesh", "init_from", "bad_budget", "cache"),
)
FREE_OF_OPTIM = ("learning_rate", "clip", "warmup")  # config.optim.<net>.<these>, too


def train(config: ml_collections.ConfigDict, workdir, *, dry_run: bool = False) -> dict:
    """Trains what the config says in `workdir`, going on from its newest checkpoint.

    Returns the last step's metrics. Everything is checked before anything is written or compiled.

    Raises:
      ConfigError, DataError, StorageError: see each message for the fix.
      NonFiniteError: ten steps in a row were not finite.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    workdir = pathlib.Path(workdir)
    check(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.accumulate, mesh)
    predictor = pipeline.Predictor(config)
    family = predictor.objective
    if "sample" in family.predict:
        predictor.trace("sample")
    if set(config.optim) != set(family.trained) or not set(config.ema) <= set(family.trained):
        raise errors.ConfigError(
            f"config.optim has {sorted(config.optim)}, config.ema {sorted(config.ema)}",
            where=f"objective {config.objective!r}",
            fix=f"its trained nets are {sorted(family.trained)}: one optimiser for each",
        )
    optimisers = {
        name: optim.make(spec, steps=config.steps, where=f"config.optim.{name}")
        for name, spec in config.optim.items()
    }
    source = make_source(config)
    _check_same_run(config, workdir, source)
    hooks = Hooks(predictor, workdir)
    batches = loader.Loader(
        source,
        predictor.tokenize,
        batch_size=config.batch_size,
        res=config.res,
        seed=config.seed,
        augment=tuple(config.augment),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        bad_budget=config.bad_budget,
    )
    frozen = jax.device_put(weights.frozen(family, config), sharding.replicated(mesh))

    ema = dict(config.ema)
    init = functools.partial(step.init, family, optimisers, ema)
    update = step.make_update(
        family, optimisers, ema=ema, seed=config.seed, accumulate=config.accumulate
    )
    update = jax.jit(update, donate_argnums=0, out_shardings=sharding.replicated(mesh))
    if dry_run:
        return _dry_run(init, update, frozen, predictor, mesh)
    if config.cache:
        encode = functools.partial(predictor.run, config.cache, frozen)
        batches.extra = cache.precompute(encode, source, predictor.tokenize)

    _prepare(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep)
    state, start = _first_state(init, optimisers, config, checkpoints, mesh, workdir)
    writer = metrics.Writer(workdir, start=start, stop=config.steps, batch_size=config.batch_size)
    meta = {"data": source.fingerprint, "t2i_jax": t2i_jax.__version__, "jax": jax.__version__}

    stream = batches.iterate(start, config.steps)
    compiled, rows, saved = None, [], start
    with Interrupt() as interrupt:
        for n in range(start, config.steps):
            if n > start:
                hooks.run(n, state, frozen, writer)
                if n % config.save_every == 0:
                    rows = _flush(writer, rows)
                    checkpoints.save(state, meta)
                    saved = n
            if interrupt.requested:
                break
            batch = next(stream)
            for slot, record, reason in batch.bad:
                _quarantine(workdir, n + 1, slot, record, reason)
            arrays = sharding.place(batch.arrays, mesh)
            if compiled is None:
                compiled = _compile(update, state, frozen, arrays)
                writer.pause()
            with jax.transfer_guard("disallow"):
                state, values = compiled(state, frozen, arrays)
            writer.step(n + 1, values)
            if (n + 1) % config.log_every == 0:
                rows = _flush(writer, rows)
        done = int(state.step)
        if done == config.steps and done > start:
            hooks.run(done, state, frozen, writer)
        rows = _flush(writer, rows)
        if done > saved:
            checkpoints.save(state, meta)
        checkpoints.close()
        writer.close()
    if interrupt.requested and done < config.steps:
        raise errors.Preempted(
            f"stopped by {interrupt.requested} after step {done}, saved",
            where=str(workdir),
            fix="start the same command again to go on",
        )
    logging.info("done: %d steps in %s", done, workdir)
    return rows[-1] if rows else {}


def make_source(config, **overrides):
    """The training data that config.data describes."""
    options = dict(config.data) | overrides
    module = plugins.load("data", options.pop("source"))
    return plugins.call(module.make, where="config.data", options={"res": config.res, **options})


def check(config) -> None:
    """Refuses values outside their range, before anything is built."""
    positive = ("steps", "batch_size", "accumulate", "res", "text_length", "log_every")
    for name in (*positive, "save_every", "keep"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise errors.ConfigError(
                f"{name} is {config[name]!r}", where=f"config.{name}", fix="give a whole number ≥ 1"
            )
    if not 0 <= config.seed < pipeline.SEED_LIMIT:
        raise errors.ConfigError(
            f"seed is {config.seed}", where="config.seed", fix="give a number from 0 to 2³² − 1"
        )
    for name, decay in config.ema.items():
        if not 0 <= decay < 1:
            raise errors.ConfigError(
                f"EMA decay is {decay}", where=f"config.ema.{name}", fix="give a number in [0, 1)"
            )


class Hooks:
    """What happens between steps: pictures of fixed prompts and evaluators, with averaged nets."""

    def __init__(self, predictor, workdir):
        self._predictor, self._workdir, self._config = predictor, workdir, predictor.config
        self._evaluators = {
            name: predictor.evaluator(name, **options)
            for name, options in self._config.evaluators.items()
        }

    def run(self, n: int, state, frozen, writer) -> None:
        config = self._config
        due = lambda every: every and (n % every == 0 or n == config.steps)
        draw = due(config.sample_every) and config.prompts and "sample" in self._predictor.bound
        judge = due(config.eval_every) and self._evaluators
        if not (draw or judge):
            return
        nets = {**averaged(state), **frozen}
        if draw:
            drawn = self._predictor.sample(nets, list(config.prompts), seed=config.seed)
            if jax.process_index() == 0:
                path = self._workdir / "samples" / f"step_{n:08d}.png"
                path.parent.mkdir(exist_ok=True)
                images.save(path, images.grid(drawn), {"prompts": list(config.prompts)})
        for name, run in self._evaluators.items() if judge else ():
            found = {f"{name}/{k}": v for k, v in run(nets, n).items()}
            logging.info("step %d · %s", n, " ".join(f"{k} {v:.3f}" for k, v in found.items()))
            writer.event(n, found)
        writer.pause()


def averaged(state: step.State):
    """The trained nets with averaged parameters where there are any."""
    return {
        name: {**net, "params": state.ema[name]} if name in state.ema else net
        for name, net in state.nets.items()
    }


class Interrupt:
    """Turns the first SIGTERM or Ctrl-C into a flag that the loop polls; a second Ctrl-C raises."""

    def __init__(self):
        self.requested = ""
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self._main:
            self._old = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _catch(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        logging.warning("%s: saving after this step", self.requested)

    def __exit__(self, *_):
        for number, handler in self._old.items() if self._main else ():
            signal.signal(number, handler)


def _first_state(init, optimisers, config, checkpoints, mesh, workdir):
    """The newest checkpoint's state and step, else fresh nets, perhaps from config.init_from."""
    arguments = (jax.random.key(config.seed), weights.abstract_batch(config))
    whole = sharding.replicated(mesh)
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole),
        jax.eval_shape(init, *arguments),
    )
    if steps := checkpoints.steps():
        logging.info("resuming %s after %d steps", workdir, steps[-1])
        return checkpoints.restore(steps[-1], target), steps[-1]
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), arguments[1])
    state = jax.jit(init, out_shardings=whole)(arguments[0], zeros)
    if not config.init_from:
        logging.info("no checkpoint in %s: starting from scratch", workdir)
        return state, 0
    logging.info("no checkpoint in %s: starting from %s", workdir, config.init_from)
    shapes = jax.eval_shape(lambda s: s.nets, state)
    nets, _ = weights.load_trained(weights.locate(config.init_from), shapes, step=None)
    started = jax.jit(functools.partial(step.start, optimisers, config.ema), out_shardings=whole)
    return started(nets), 0


def _compile(update, state, frozen, arrays):
    logging.info("compiling the first step …")
    started = time.perf_counter()
    compiled = update.lower(state, frozen, arrays).compile()
    logging.info("compiled in %.1f s", time.perf_counter() - started)
    return compiled


def _flush(writer, rows):
    new = writer.flush()
    if new and new[-1]["skipped"] >= SKIP_LIMIT:
        raise errors.NonFiniteError(
            f"{int(new[-1]['skipped'])} steps in a row were not finite",
            where=f"step {new[-1]['step']}",
            fix="lower the learning rate or clip the gradient (config.optim.<net>.clip)",
        )
    return new or rows


def _prepare(workdir: pathlib.Path, config) -> None:
    """Makes the workdir, proves it writable, writes config.json, env.txt and opens log.txt."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        images.write_whole(workdir / "config.json", weights.to_json(config).encode())
        environment = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "jax": jax.__version__,
            "t2i_jax": t2i_jax.__version__,
            "devices": [str(d) for d in jax.devices()],
        }
        images.write_whole(workdir / "env.txt", json.dumps(environment, indent=1).encode())
        handler = std_logging.FileHandler(workdir / "log.txt")
    except OSError as e:
        raise errors.StorageError(
            f"cannot write there: {e.strerror}", where=str(workdir), fix="choose another --workdir"
        ) from e
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(lambda record: "orbax" not in record.pathname)
    logger = logging.get_absl_logger()
    for old in [h for h in logger.handlers if isinstance(h, std_logging.FileHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)


def _check_same_run(config, workdir: pathlib.Path, source) -> None:
    """Refuses a workdir that holds an exported model, or a run with another config or data."""
    if (workdir / weights.EXPORTED).exists():
        raise errors.ConfigError(
            "an exported model lies there", where=str(workdir), fix="use a new --workdir"
        )
    if config.init_from:
        weights.locate(config.init_from)
    if not (workdir / "config.json").exists() or not (workdir / "checkpoints").is_dir():
        return
    before, now = _flat(weights.read_config(workdir)), _flat(config)
    differences = [
        f"{key}: {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key.split(".")[0] not in FREE_TO_CHANGE
        and not (key.startswith("optim.") and key.split(".")[-1] in FREE_OF_OPTIM)
    ]
    if differences:
        raise errors.ConfigError(
            "the workdir holds a run with another config: " + "; ".join(differences[:10]),
            where=str(workdir),
            fix="use a new --workdir (with --config.init_from to start from this run)",
        )
    checkpoints = checkpoint.Checkpoints(workdir, create=False)
    steps = checkpoints.steps()
    data = checkpoints.meta(steps[-1])["data"] if steps else source.fingerprint
    checkpoints.close()
    if data != source.fingerprint:
        raise errors.ConfigError(
            f"the run was trained on other data ({data[:12]}…, now {source.fingerprint[:12]}…)",
            where=str(workdir),
            fix="restore the data, or use a new --workdir with --config.init_from=<this run>",
        )


def _flat(config) -> dict:
    values = json.loads(weights.to_json(config))
    flat = {}

    def visit(prefix, value):
        if isinstance(value, dict) and value:
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    visit("", values)
    return flat


def _quarantine(workdir, n, slot, record, reason) -> None:
    logging.warning("step %d: example %d is broken and counts nothing: %s", n, record, reason)
    with (workdir / "quarantine.jsonl").open("a") as f:
        row = {"step": n, "slot": int(slot), "record": int(record), "reason": reason}
        f.write(json.dumps(row) + "\n")


def _dry_run(init, update, frozen, predictor, mesh) -> dict:
    """Compiles the step as training runs it and says what it needs; writes nothing."""
    config = predictor.config
    on = lambda tree, where: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree
    )
    batch = weights.abstract_batch(config)
    state = on(jax.eval_shape(init, jax.random.key(config.seed), batch), sharding.replicated(mesh))
    if config.cache:
        encode = predictor.objective.predict[config.cache]
        batch |= jax.eval_shape(lambda n, b: cache.arrays(encode(n, b)), frozen, batch)
    batch = on(batch, sharding.split(mesh))
    compiled = update.lower(state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    found = {f"parameters/{name}": size(net["params"]) for name, net in state.nets.items()}
    found |= {f"frozen/{name}": size(net) for name, net in frozen.items()}
    found |= {
        "devices": mesh.size,
        "state_bytes": memory.alias_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    for name, value in found.items():
        print(f"{name:24} {value:>16,}")
    return found
