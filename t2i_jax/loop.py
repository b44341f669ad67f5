"""The one training loop: evaluate, save, take a batch, step, log. It knows no family."""

import collections
import contextlib
import functools
import json
import pathlib
import time

import jax
import ml_collections
import numpy as np
from absl import logging

import t2i_jax
from t2i_jax import (
    checks,
    errors,
    fields,
    images,
    optim,
    pipeline,
    plugins,
    sharding,
    step,
    weights,
)
from t2i_jax.data import cache, loader
from t2i_jax.run import (
    checkpoint,
    compile_cache,
    distributed,
    failpoints,
    fingerprint,
    health,
    hooks,
    interrupt,
    logs,
    metrics,
    owner,
    rundir,
    watchdog,
)

TIMED, WARM = 50, 5  # steps that are timed for config.minutes, and those before them
MAX_IN_FLIGHT = 2  # steps whose results are not waited for yet: a signal waits that long, too
SEEDS_APART = 1_000_003  # what a rollback adds to the seed


def train(config: ml_collections.ConfigDict, workdir, *, restart: bool = False) -> dict:
    """Trains what the config says in `workdir`, going on from its newest sound checkpoint.

    Returns the last step's metrics. Everything is checked before anything is written or compiled.

    Args:
      restart: set this workdir's checkpoints aside and begin again.
    Raises:
      ConfigError, DataError, StorageError: see each message for the fix.
      NonFiniteError: too many steps were not finite, or a metric of config.watch went beyond its
        limit, and config.rollbacks does not let the run go back once more.
      OwnerError: another process trains there.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    errors.check_local(workdir, "--workdir")
    workdir = pathlib.Path(workdir)
    with (
        interrupt.Interrupt(workdir) as signals,
        logs.told(),
        watchdog.phase("start"),
        errors.of_storage(workdir),
    ):
        try:
            return _train(config, workdir, signals, restart)
        except interrupt.Stop:
            signals.leave()
            raise interrupt.preempted(
                signals.requested, workdir, "before the first step of this start"
            ) from None


def _train(config, workdir, signals, restart: bool) -> dict:
    """As `train`, again from an earlier checkpoint where the run may go back."""
    with signals.at_once():
        run = Run(config, workdir, restart=restart)
        main = jax.process_index() == 0
        if main:
            rundir.make(workdir)
        holder = owner.Owner(workdir)
        if main:
            holder.acquire()
    try:
        signals.abandoned.append(holder.release)
        if run.unmeasured:
            run = run.measured(signals)
        while True:
            run.predictor.poll = signals.poll
            try:
                return run.train(signals, holder.check if main else lambda: None, restart)
            except errors.NonFiniteError as e:
                if not run.goes_back(e):
                    raise
            signals.begun = False
            run, restart = Run(config, workdir), False
    finally:
        if main:
            run.settle()  # its save ends under our lock
            holder.release()


class Run:
    """One start of one experiment: all that a config describes, checked and bound together.

    `devices` (default: all there are) may be those of another machine, to compile for. `restart`:
    as if it had not begun.
    """

    def __init__(self, config, workdir: pathlib.Path, devices=None, restart: bool = False):
        steps = config.steps or (0 if restart else _measured_before(config, workdir))
        self.unmeasured = bool(config.minutes) and not steps
        config = _with_steps(config, steps or (1000 if self.unmeasured else 0))
        checks.check(config)
        compile_cache.enable()
        self.config, self.workdir, self._restart, self._prepared = config, workdir, restart, False
        self._opened = None  # once it trains: checkpoints, writer, first step
        self.layout = sharding.Layout(config.mesh, config.strategy, devices=devices)
        self.layout.check_batch(config.batch_size, config.accumulate)
        self.predictor = pipeline.Predictor(config, layout=self.layout)
        family = self.predictor.objective
        if "sample" in family.predict:
            self.predictor.trace("sample")
        if set(config.optim) != set(family.trained) or not set(config.ema) <= set(family.trained):
            raise errors.ConfigError(
                f"config.optim has {sorted(config.optim)}, config.ema {sorted(config.ema)}",
                where=f"objective {config.objective!r}",
                fix=f"its trained nets are {sorted(family.trained)}: one optimiser for each",
            )
        self.optimisers = {
            name: optim.make(spec, steps=config.steps, where=f"config.optim.{name}")
            for name, spec in config.optim.items()
        }
        self._rollbacks = 0 if restart else distributed.as_first(rundir.rollbacks(workdir))
        seed = config.seed + SEEDS_APART * self._rollbacks  # other noise, other order of data
        self.source = make_source(config)
        self._changed = rundir.check_same_run(workdir, config, self.source.fingerprint)
        prompts = list(config.prompts)
        if not prompts and config.sample_every and "sample" in family.predict:
            prompts = loader.some_captions(self.source)
        self.hooks = hooks.Hooks(self.predictor, workdir, prompts)
        self.batches = loader.Loader(
            self.source,
            self.predictor.tokenize,
            batch_size=config.batch_size,
            res=config.res,
            seed=seed,
            augment=tuple(config.augment),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            bad_budget=config.bad_budget,
        )
        begun = not restart and (workdir / "checkpoints").is_dir()
        held = family.trained if begun else ()
        self.frozen = weights.frozen_shapes(family, config, except_nets=held)  # see load_frozen

        self._init = functools.partial(step.init, family, self.optimisers, dict(config.ema))
        self._example = weights.abstract_batch(config)
        self.shapes = jax.eval_shape(self._init, jax.random.key(config.seed), self._example)
        self._placed = self.layout.state(self.shapes)
        update = step.make_update(
            *(family, self.optimisers),
            ema=dict(config.ema),
            seed=seed,
            accumulate=config.accumulate,
            layout=self.layout,
        )
        self.update = jax.jit(
            update, donate_argnums=0, out_shardings=(self._placed, self.layout.whole)
        )
        if config.watch:
            health.check_watched(config.watch, self.trace().out_info[1])

    def train(self, signals, guard, restart: bool) -> dict:
        """Steps from the newest checkpoint to config.steps. Returns the last row of metrics."""
        config, workdir = self.config, self.workdir
        self._prepare(signals)
        checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep, guard=guard)
        distributed.barrier("workdir")
        if jax.process_index() == 0:
            rundir.describe(workdir, config, self.source)
        if self._changed:
            logging.info("the config changed: %s", "; ".join(self._changed))
        self.layout.report(self.shapes)
        if restart:
            checkpoints.set_all_aside()
            rundir.forget_rollbacks(workdir)
        with watchdog.phase("restore"), signals.at_once():
            state, start, evaluated = self._first_state(checkpoints)
            evaluated = evaluated or distributed.as_first(metrics.evaluated(workdir, start))
        writer = metrics.Writer(
            workdir,
            start=start,
            stop=config.steps,
            batch_size=config.batch_size,
            last_evaluated=start if evaluated else start - 1,
        )
        meta = {
            "data": self.source.fingerprint,
            "frozen": self._frozen_digests,
            "config": json.loads(weights.to_json(config)),  # should config.json be lost
            "t2i_jax": t2i_jax.__version__,
            "jax": jax.__version__,
        }
        self._opened = (checkpoints, writer, start)
        watches = health.Skips(writer.before(1000)), health.Watch(config.watch)
        compiled, row, in_flight = None, {}, collections.deque()
        n = saved = start
        since = time.monotonic()  # the last save
        with (
            contextlib.closing(self.batches.iterate(start, config.steps)) as stream,
            watchdog.phase("training"),
            writer.bar,
        ):
            while True:
                if not evaluated:
                    try:
                        with watchdog.phase("hooks"):
                            failpoints.hit("hooks.before", n)
                            self.hooks.run(n, state, self.frozen, writer)
                        evaluated = True
                    except interrupt.Stop:
                        pass
                self.hooks.collect(writer, checkpoints)
                last = signals.requested_at(n) or n == config.steps
                due = n % config.save_every == 0 or self.hooks.rates(n) or self._late(n, since)
                if n > saved and (last or due):
                    row = self._flush(writer, *watches) or row
                    with watchdog.phase("save"):
                        failpoints.hit("save.before", n)
                        done = self.hooks.collect(writer, checkpoints, before=n)
                        checkpoints.save(state, {**meta, "evaluated": evaluated and done})
                        failpoints.hit("save.started", n)
                    saved, since = n, time.monotonic()
                if last:
                    break
                try:
                    with watchdog.phase("reading data"), signals.at_once():
                        failpoints.hit("data.before", n + 1)
                        batch = next(stream)
                    failpoints.trace(workdir, jax.process_index(), _read(n + 1, batch))
                    for slot, record, reason in batch.bad:
                        if self.batches.quarantine[record][:2] == (n, slot):
                            _tell_broken(n + 1, record, reason)  # once a start
                        writer.broken(n + 1, int(slot), int(record), reason)
                    if failpoints.hit("batch.nan", n + 1):
                        batch.arrays["weight"][0] = np.nan  # images are bytes
                    arrays = self.layout.place(batch.arrays)
                    if compiled is None:
                        with watchdog.phase("compile"):
                            compiled = _compile(self.update, state, self.frozen, arrays, signals)
                        writer.pause()
                        checkpoints.begins(start)
                except interrupt.Stop:
                    continue  # asked to stop by now: first the state is saved
                failpoints.hit("step.before", n + 1)
                signals.begun = True
                with watchdog.phase("step"), jax.transfer_guard("disallow"):
                    state, values = compiled(state, self.frozen, arrays)
                    in_flight.append(values)
                    if len(in_flight) > MAX_IN_FLIGHT or n == start:
                        jax.block_until_ready(in_flight.popleft())
                n, evaluated = n + 1, False
                writer.step(n, values)
                if n == start + 1:
                    checkpoints.progressed()
                checkpoints.poll()
                if n % config.log_every == 0:
                    row = self._flush(writer, *watches) or row
        row = self._flush(writer, *watches) or row
        checkpoints.progressed()  # a signal before the first step is no death
        with watchdog.phase("save"):
            checkpoints.close()
        if not signals.requested or n == config.steps:
            with watchdog.phase("hooks"):
                self.hooks.collect(writer, checkpoints, before=n + 1)
        writer.close()
        if signals.requested and n < config.steps:
            raise interrupt.preempted(signals.requested, workdir, f"after step {n}")
        logging.info("done: %d steps in %s", n, workdir)
        return row

    def measured(self, signals):
        """This start of the run with as many steps as fit into config.minutes.

        Steps on the run's own data are timed, and their state is thrown away.
        """
        self.predictor.poll = signals.poll
        self._prepare(signals)
        with watchdog.phase("restore"), signals.at_once():
            state, values = self._fresh_state(), None
        with (
            contextlib.closing(self.batches.iterate(0, WARM + TIMED)) as stream,
            watchdog.phase("training"),
            signals.at_once(),
        ):
            for n, batch in enumerate(stream):
                arrays = self.layout.place(batch.arrays)
                if n == 0:
                    with watchdog.phase("compile"):
                        compiled = _compile(self.update, state, self.frozen, arrays, signals)
                if n == WARM:
                    jax.block_until_ready(state)
                    started = time.perf_counter()
                before, (state, values) = values, compiled(state, self.frozen, arrays)
                jax.block_until_ready(before)  # one step ahead of the devices
            jax.block_until_ready(state)
            seconds = time.perf_counter() - started
        whole = self.config.log_every
        steps = round(60 * self.config.minutes * TIMED / seconds / whole) * whole
        steps = distributed.as_first(max(whole, steps))
        logging.info(
            "%d steps took %.1f s: training for %g minutes is %d steps",
            *(TIMED, seconds, self.config.minutes, steps),
        )
        del state, compiled
        run = Run(_with_steps(self.config, steps), self.workdir, restart=self._restart)
        run.frozen, run._frozen_digests, run._prepared = self.frozen, self._frozen_digests, True
        run.batches.extra = self.batches.extra
        return run

    def _prepare(self, signals) -> None:
        """Fills the frozen nets and encodes the captions, once."""
        if self._prepared:
            return
        with watchdog.phase("reading frozen nets"), signals.at_once():
            failpoints.hit("frozen.before")
            self.load_frozen()
        if self.config.cache:
            with watchdog.phase("captions"), signals.at_once():
                states = self.caption_states()
                self.batches.extra = cache.extra(self.workdir / cache.FOLDER, *states)
        self._prepared = True

    def caption_states(self):
        """What `cache.extra` and `cache.write` ask for after the folder."""
        config, predictor = self.config, self.predictor
        if not config.cache:
            raise errors.ConfigError(
                "it names no prediction",
                where="config.cache",
                fix="set --config.cache=encode; states of an encoder that learns cannot be kept",
            )
        encode = functools.partial(predictor.run, config.cache, self.frozen)
        tokenize = predictor.tokenize
        identity = functools.partial(cache.identity, config, self.frozen, self.source, tokenize)
        return encode, self.source, tokenize, identity

    def load_frozen(self) -> None:
        """Fills the frozen nets, of which there are only shapes so far."""
        self.frozen = weights.frozen(self.predictor.objective, self.config, self.layout.nets)
        self._frozen_digests = weights.digests(self.frozen)

    def check_frozen(self) -> None:
        """Raises ConfigError where this workdir's run was trained with other frozen nets."""
        if (self.workdir / "checkpoints").is_dir():
            checkpoints = checkpoint.Checkpoints(self.workdir, create=False)
            if steps := checkpoints.steps():
                known = checkpoints.meta(steps[-1]).get("frozen")
                weights.check_frozen(self.frozen, known, self._frozen_digests)

    def trace(self):
        """The step, traced for abstract arguments that lie as in training; see `plan.needs`."""
        batch = self._example
        if self.config.cache:
            encode = self.predictor.objective.predict[self.config.cache]
            batch |= jax.eval_shape(lambda n, b: cache.arrays(encode(n, b)), self.frozen, batch)
        batch = sharding.on(batch, jax.tree.map(lambda _: self.layout.batch, batch))
        frozen = sharding.on(self.frozen, self.layout.nets(self.frozen))
        return self.update.trace(sharding.on(self.shapes, self._placed), frozen, batch)

    def _first_state(self, checkpoints):
        """A state, its step, and whether that step's hooks have run.

        The newest sound checkpoint's, else fresh nets, perhaps from config.init_from.
        """
        config = self.config
        failpoints.hit("restore.before")
        target = sharding.on(self.shapes, self._placed)
        if found := checkpoints.restore_newest(target):
            state, start = found
            logging.info("resuming %s after %d steps", self.workdir, start)
            meta = checkpoints.meta(start)
            weights.check_frozen(self.frozen, meta.get("frozen"), self._frozen_digests)
            return state, start, meta.get("evaluated", meta.get("hooked"))  # its older name
        if config.init_from:
            logging.info("no checkpoint in %s: starting from %s", self.workdir, config.init_from)
        else:
            logging.info("no checkpoint in %s: starting from scratch", self.workdir)
        return self._fresh_state(), 0, True

    def _fresh_state(self):
        """The state before the first step."""
        config, key = self.config, jax.random.key(self.config.seed)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self._example)
        if config.init_from:
            source = weights.locate(config.init_from)
            nets, _ = weights.load_trained(source, self.shapes.nets, step=None)
        else:
            family = self.predictor.objective
            nets = weights.pretrained(family, config, self.layout.nets)
            if not nets:
                return jax.jit(self._init, out_shardings=self._placed)(key, zeros)
            logging.info("but for pretrained %s", sorted(nets))
            lacking = [name for name in family.trained if name not in nets]
            placed = self.layout.nets({name: self.shapes.nets[name] for name in lacking})
            fresh = lambda *args: {name: family.init(*args)[name] for name in lacking}
            nets |= jax.jit(fresh, out_shardings=placed)(key, zeros)
        begin = functools.partial(step.start, self.optimisers, dict(config.ema))
        return jax.jit(begin, out_shardings=self._placed)(nets)

    def _late(self, n: int, since: float) -> bool:
        """Whether config.save_minutes have passed since the last save; alike on every process."""
        if not self.config.save_minutes or (jax.process_count() > 1 and n % self.config.log_every):
            return False  # asking the first process takes time
        return distributed.as_first(time.monotonic() - since > 60 * self.config.save_minutes)

    def settle(self) -> None:
        """Waits for a save that an error has overtaken; what fails there has been told.

        With several processes it does not wait, as the others may be dead.
        """
        if self._opened and jax.process_count() == 1:
            with contextlib.suppress(Exception), watchdog.phase("save"):
                self._opened[0].wait()

    def _flush(self, writer, skips, watch) -> dict:
        """Writes the rows of metrics; returns the newest."""
        with watchdog.phase("step"):  # waits for the devices
            rows = writer.flush()
        for row in rows:
            if skips.over(row):
                self._give_up(row, skips)
            watch.check(row)
        return rows[-1] if rows else {}

    def goes_back(self, e: errors.NonFiniteError) -> bool:
        """Whether a run that diverged may begin again at a checkpoint from before; sets later ones
        aside. It never begins from scratch: where none is older, all stay.
        """
        if self._rollbacks >= self.config.rollbacks:
            return False
        checkpoints, writer, start = self._opened
        with watchdog.phase("save"):
            writer.close()
            checkpoints.close()
        # Without one sound step since this start, the checkpoint it came from is at fault, too.
        first = e.step if e.step > start + 1 else min(e.step, start)
        older = sum(step < first for step in checkpoints.steps())
        if not distributed.as_first(older):
            logging.warning("no checkpoint is older than step %d: none is set aside", first)
            return False
        step = checkpoints.set_aside_from(first, "diverged")
        if jax.process_index() == 0:
            rundir.note_rollback(self.workdir, {"step": step, "why": str(e)})
        distributed.barrier("rollback")
        logging.warning("%s; going back to step %d", e, step)
        return True

    def _give_up(self, row, skips):
        """Ends the run; leaves behind which examples and which arrays were not finite."""
        n, arrays = row["step"], []
        records = [int(i) for i in self.batches.batch(n - 1).records]
        for name, net in self.shapes.nets.items():
            if (place := row[f"{name}/{step.FAULTY}"]) >= 0:
                path, _ = jax.tree_util.tree_leaves_with_path(net["params"])[place]
                arrays.append(f"{name}/params/{fingerprint.path_of(path)}")
        found = {"step": n, "records": records, "arrays": arrays, "skipped": skips.steps[-10:]}
        if jax.process_index() == 0:
            try:
                images.write_whole(self.workdir / "nonfinite.json", json.dumps(found).encode())
            except OSError as e:
                logging.warning("cannot write %s: %s", e.filename, e.strerror)
        e = errors.NonFiniteError(
            f"{len(skips.steps)} of the last thousand steps were not finite, the last in the "
            f"gradient or update of {arrays or 'none, but in the loss'} with records "
            f"{records[:8]}{' …' if len(records) > 8 else ''}",
            where=f"step {n}",
            fix=f"see nonfinite.json; {errors.NonFiniteError.ADVICE}",
        )
        e.step = min(s for s in skips.steps if s > n - health.SKIPS_IN_A_ROW)
        raise e


def _with_steps(config, steps: int):
    """The config with that many steps."""
    if config.steps == steps:
        return config
    config = config.copy_and_resolve_references()
    config.steps = steps
    return config


def _measured_before(config, workdir) -> int:
    """The steps that an earlier start made of config.minutes; 0 if there was none."""
    before = rundir.config_before(workdir) if config.minutes else None
    if not before:
        return 0
    if before.get("minutes") != config.minutes:
        raise errors.ConfigError(
            f"the run there is of {before.steps} steps, fixed for another time than "
            f"{config.minutes:g} minutes",
            where="config.minutes",
            fix="say how many steps it is to have: --config.steps=…",
        )
    return before.steps


def make_source(config, **overrides):
    """The training data that config.data describes."""
    options = dict(config.data) | overrides
    module = plugins.load("data", options.pop("source"))
    return fields.build(module.make, {"res": config.res, **options}, where="config.data")


def _read(n: int, batch) -> dict:
    records = [int(record) for record in batch.records]
    return {"step": n, "first_slot": int(batch.arrays["index"][0]), "records": records}


def _compile(update, state, frozen, arrays, signals):
    logging.info("compiling the first step …")
    started = time.perf_counter()
    lowered = update.lower(state, frozen, arrays)

    def compiled():
        failpoints.hit("compile")
        return lowered.compile()

    compiled = signals.awaited(compiled)
    logging.info("compiled in %.1f s", time.perf_counter() - started)
    return compiled


def _tell_broken(n: int, record: int, reason: str) -> None:
    logging.warning("step %d: example %d is broken and counts nothing: %s", n, record, reason)
