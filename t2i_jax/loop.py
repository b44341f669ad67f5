"""The one training loop: evaluate, save, take a batch, step, log. It knows no family.

In the file's order: `train` owns a workdir, `Run` builds what a config describes, restores its
state, and loops; what happens when steps go wrong, or between steps, is in `run`.
"""

import collections
import contextlib
import functools
import pathlib
import time

import jax
import ml_collections
import numpy as np
from absl import logging

from t2i_jax import errors, optim, pipeline, sharding, step, weights
from t2i_jax.data import cache, loader
from t2i_jax.run import (
    checkpoint,
    checks,
    compile_cache,
    distributed,
    failpoints,
    health,
    hooks,
    interrupt,
    logs,
    metrics,
    minutes,
    owner,
    rundir,
    watchdog,
)

MAX_IN_FLIGHT = 2  # steps whose results are not waited for yet: a signal waits that long, too
SEEDS_APART = 1_000_003  # what a rollback adds to the seed


def train(config: ml_collections.ConfigDict, workdir, *, restart: bool = False) -> dict:
    """Trains what the config says in `workdir`, going on from its newest sound checkpoint.

    Returns the last step's metrics. Everything is checked before anything is written or compiled.

    Args:
      restart: set this workdir's checkpoints aside and begin again.
    Raises:
      ConfigError, DataError, StorageError: see each message for the fix.
      NonFiniteError: too many steps were not finite, or a metric went beyond its limit in
        config.watch. Before that the run goes back as often as config.rollbacks says.
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
    with owner.held(workdir, signals) as guard:
        try:
            if run.unmeasured:
                run = run.measured(signals)
            while True:
                try:
                    return run.train(signals, guard, restart)
                except errors.NonFiniteError as e:
                    if not run.goes_back(e):
                        raise
                # Since the checkpoint nothing new was trained that a sudden end could lose.
                signals.begun = False
                run, restart = Run(config, workdir), False
        finally:
            run.settle()  # its save ends under our lock


class Run:
    """One start of one experiment: all that a config describes, checked and bound together.

    `devices` (default: all there are) may be those of another machine, to compile for. `restart`:
    as if it had not begun.
    """

    # ---- Build: nothing is written or compiled here, so that all errors come at once. ----

    def __init__(self, config, workdir: pathlib.Path, devices=None, restart: bool = False):
        steps = config.steps or (0 if restart else minutes.steps_before(config, workdir))
        self.unmeasured = bool(config.minutes) and not steps
        # A stand-in for steps not measured yet: with it all else can be checked and compiled.
        config = minutes.with_steps(config, steps or (1000 if self.unmeasured else 0))
        checks.check(config)
        compile_cache.enable()
        self.config, self.workdir, self._restart, self._prepared = config, workdir, restart, False
        self._opened = None  # once it trains: checkpoints, writer, first step
        self.layout = sharding.Layout(
            config.mesh, config.strategy, devices=devices, attention=config.attention
        )
        self.layout.check_batch(config.batch_size, config.accumulate)
        self.predictor = pipeline.Predictor(config, layout=self.layout)
        self.family = family = self.predictor.objective
        self.cached = cache.named(config, family)
        nets = weights.abstract_nets(family, config)
        if "sample" in family.predict:
            # Only traced: a wrong option of config.sample would else strike at the first picture.
            self.predictor.trace("sample", nets)
        self.optimisers = optim.make_all(config, family.trained)
        # The first process decides: with other seeds the processes would train on different noise.
        self._rollbacks = 0 if restart else distributed.as_first(rundir.rollbacks(workdir))
        seed = config.seed + SEEDS_APART * self._rollbacks  # other noise, other order of data
        self.source = loader.make_source(config)
        self._changed = rundir.check_same_run(workdir, config, self.source.fingerprint)
        prompts = list(config.prompts)
        if not prompts and config.sample_every and "sample" in family.predict:
            prompts = loader.some_captions(self.source)
        self.hooks = hooks.Hooks(self.predictor, workdir, prompts)
        # Nets that only drawing and judging need. Without both they need not stay in memory.
        self._idle = {net for kept in self.cached.values() for net in kept.nets}
        if (config.sample_every and prompts) or (config.eval_every and config.evaluators):
            self._idle = set()
        read, source = family.inputs, self.source
        if any(kept.reads == "image" for kept in self.cached.values()):
            read, source = cache.without_pictures(read), cache.Captioned(source)
        self.batches = loader.Loader(
            source,
            read,
            batch_size=config.batch_size,
            seed=seed,
            share=self.layout.share if devices is None else (0, 1),
            bad_budget=config.bad_budget,
        )
        begun = not restart and (workdir / "checkpoints").is_dir()
        # A run that has begun holds its trained nets itself. Their sources may be gone by now.
        held = family.trained if begun else ()
        # See load_frozen.
        self.frozen = weights.frozen_shapes(family, config, except_nets=held, shapes=nets)

        self._init = functools.partial(step.init, family, self.optimisers, dict(config.ema))
        self._example = weights.abstract_batch(family, config.batch_size)
        start = functools.partial(step.start, self.optimisers, dict(config.ema))
        self.shapes = jax.eval_shape(start, {name: dict(nets[name]) for name in family.trained})
        if config.init_from and not begun:
            source = weights.locate(config.init_from)
            weights.check_trained(source, self.shapes.nets, where="config.init_from")
        self._placed = self.layout.state(self.shapes)
        update = step.make_update(
            *(family, self.optimisers),
            ema=dict(config.ema),
            seed=seed,
            accumulate=config.accumulate,
            layout=self.layout,
        )
        # The state is donated: a step writes the new one where the old one lay.
        self.update = jax.jit(
            update, donate_argnums=0, out_shardings=(self._placed, self.layout.whole)
        )
        if config.watch:
            health.check_watched(config.watch, self.trace().out_info[1])

    def trace(self):
        """The step, traced for abstract arguments that lie as in training; see `plan.needs`."""
        read, frozen = self.batches.inputs, self.frozen
        batch = weights.abstract_batch(self.family._replace(inputs=read), self.config.batch_size)
        for name in self.cached:
            predict = lambda n, b, name=name: cache.arrays(self.family.predict[name](n, b, None))
            found = jax.eval_shape(predict, self.frozen, self._example)
            batch |= found
            one = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), found)
            frozen = self._in_step(frozen, name, one)
        batch = sharding.on(batch, jax.tree.map(lambda _: self.layout.batch, batch))
        frozen = sharding.on(frozen, self.layout.nets(frozen))
        return self.update.trace(sharding.on(self.shapes, self._placed), frozen, batch)

    def _in_step(self, frozen, name: str, empty) -> dict:
        """The frozen nets that a step reads beside what is kept of a prediction.

        empty: the arrays of the empty caption.
        """
        kept = self.cached[name]
        left = {net: x for net, x in frozen.items() if net not in self._idle & {*kept.nets}}
        if kept.reads == "caption" and kept.nets:
            left[kept.nets[0]] = {**left.get(kept.nets[0], {}), "empty": empty}
        return left

    # ---- Restore: frozen nets and captions once, then the newest checkpoint or a first state. ----

    def _prepare(self, signals) -> None:
        """Fills the frozen nets, and reads or computes what config.cache keeps, once."""
        self.predictor.poll = signals.poll
        if self._prepared:
            return
        with watchdog.phase("reading frozen nets"), signals.at_once():
            failpoints.hit("frozen.before")
            files = [cache.manifest(self.workdir / kept.folder) for kept in self.cached.values()]
            known = [found.get("nets", {}) for found in files if found]
            known = {net: digest for nets in known for net, digest in nets.items()}
            self.load_frozen({net: known[net] for net in self._idle & known.keys()})
        used = {self.workdir / kept.folder for kept in self.cached.values()}
        for path in self.workdir.glob(f"*/{cache.MANIFEST}"):
            if path.parent not in used:
                logging.warning("the cache in %s is not read: set --config.cache", path.parent)
        asked = {name: self.kept_rows(name) for name in self.cached}
        for name, (predict, rows, identity) in asked.items():
            with watchdog.phase("caches"), signals.at_once():
                folder = self.workdir / self.cached[name].folder
                self.batches.inputs += (cache.states(folder, predict, rows, identity),)
                placed = jax.device_put(getattr(rows, "empty", None), self.layout.whole)
                self.frozen = self._in_step(self.frozen, name, placed)
        self._prepared = True

    def load_frozen(self, known=()) -> None:
        """Fills the frozen nets, of which there are only shapes so far.

        known: net -> digest of nets that are left out.
        """
        self.frozen = weights.frozen(
            self.family, self.config, self.layout.nets, except_nets=tuple(known)
        )
        self._frozen_digests = weights.digests(self.frozen) | dict(known)

    def kept_rows(self, name: str = ""):
        """What `cache.states` and `cache.write` ask for after the folder, of a prediction that
        config.cache names.
        """
        loaded = {net: self._frozen_digests[net] for net in self.frozen}
        known = self.config, self.predictor, self.frozen, self.source
        return cache.asked(*known, name, loaded, weights.mark)

    def measured(self, signals):
        """This start of the run with as many steps as fit into config.minutes."""
        self._prepare(signals)
        steps = minutes.measure(self, signals)
        run = Run(minutes.with_steps(self.config, steps), self.workdir, restart=self._restart)
        # What was read and encoded for the measurement is not read again.
        run.frozen, run._frozen_digests, run._prepared = self.frozen, self._frozen_digests, True
        run.batches.inputs = self.batches.inputs
        return run

    def _first_state(self, checkpoints):
        """A state and its step: the newest sound checkpoint's, else `fresh_state`."""
        failpoints.hit("restore.before")
        target = sharding.on(self.shapes, self._placed)
        if restored := checkpoints.restore_newest(target):
            state, start = restored
            logging.info("resuming %s after %d steps", self.workdir, start)
            known = checkpoints.meta(start).get("frozen")
            nets = {**dict.fromkeys(self._frozen_digests), **self.frozen}
            weights.check_frozen(nets, known, self._frozen_digests)
            return state, start
        begins = f"as in {self.config.init_from}" if self.config.init_from else "anew"
        trained = ", ".join(self.family.trained)
        logging.info("no checkpoint in %s: %s begins %s", self.workdir, trained, begins)
        sizes = {key: jax.tree.leaves(arrays)[0].shape for key, arrays in self._example.items()}
        texts = (f"{key} {' × '.join(map(str, shape))}" for key, shape in sizes.items())
        logging.info("a batch: %s", ", ".join(texts))
        return self.fresh_state(), 0

    def fresh_state(self):
        """The state before the first step: nets of config.init_from or config.load, or random."""
        config, key = self.config, jax.random.key(self.config.seed)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self._example)
        if config.init_from:
            source = weights.locate(config.init_from)
            target = sharding.on(self.shapes.nets, self._placed.nets)
            nets, _ = weights.load_trained(source, target, step=None)
        else:
            nets = weights.pretrained(self.family, config, self.layout.nets)
            if not nets:
                return jax.jit(self._init, out_shardings=self._placed)(key, zeros)
            logging.info("but for pretrained %s", sorted(nets))
            lacking = [name for name in self.family.trained if name not in nets]
            placed = self.layout.nets({name: self.shapes.nets[name] for name in lacking})
            # All nets share one key, as in `_init`. jit drops what computes the nets that nobody
            # asks for.
            fresh = lambda *args: {name: self.family.init(*args)[name] for name in lacking}
            nets |= jax.jit(fresh, out_shardings=placed)(key, zeros)
        begin = functools.partial(step.start, self.optimisers, dict(config.ema))
        return jax.jit(begin, out_shardings=self._placed)(nets)

    # ---- Loop ----

    def train(self, signals, guard, restart: bool) -> dict:
        """Steps from the newest checkpoint to config.steps. Returns the last row of metrics.

        guard: called before a checkpoint is committed; raises where another process took over.
        """
        config, row = self.config, {}
        self._prepare(signals)
        state = self._open(signals, guard, restart)
        checkpoints, writer, start = self._opened
        # A batch follows from its number, so nobody has to note which records a step has read.
        examples = lambda n: [int(i) for i in self.batches.batch(n - 1).records]
        # A thousand: the window over which skipped steps are counted, so that starts share it.
        before, shapes = writer.before(1000), self.shapes.nets
        well = health.Health(self.workdir, before, config.watch, examples, shapes)
        meta = rundir.meta(config, self.source, self._frozen_digests)

        def flush():
            """Writes the rows of metrics and looks whether the run is well; the newest row."""
            with watchdog.phase("step"):  # waits for the devices
                rows = writer.flush()
            well.check(rows)
            return rows[-1] if rows else row

        compiled, in_flight = None, collections.deque()
        n = saved = start
        evaluated, since = False, time.monotonic()  # the last save
        with (
            contextlib.closing(self.batches.iterate(start, config.steps)) as stream,
            watchdog.phase("training"),
            writer.bar,
        ):
            while True:
                # Evaluate what is due after n steps, before the state of step n is gone.
                if not evaluated:
                    # A stop may cut the drawing short. The next start sees that no file is there.
                    with contextlib.suppress(interrupt.Stop), watchdog.phase("hooks"):
                        failpoints.hit("hooks.before", n)
                        self.hooks.run(n, state, self.frozen, writer, resumed=n == start)
                        evaluated = True
                self.hooks.collect(writer, checkpoints)
                # Save: by steps, by time, and where the run ends or is asked to.
                last = signals.requested_at(n) or n == config.steps
                # A step that is rated is saved as well: to be the best, it must lie on the disk.
                due = n % config.save_every == 0 or self.hooks.rates(n) or self._late(n, since)
                if n > saved and (last or due):
                    row = flush()
                    self._save(n, state, meta)
                    saved, since = n, time.monotonic()
                if last:
                    break
                # Take a batch; a signal here need not wait, as nothing has changed yet.
                try:
                    arrays = self._next_batch(stream, n, writer, signals)
                    # Compiled here and not by the first call: a wait in C would hold a signal back.
                    if compiled is None:
                        args = state, self.frozen, arrays
                        compiled = compile_cache.compile_step(self.update, *args, signals=signals)
                        writer.pause()
                        # Only now, as a death while compiling tells nothing about the checkpoint.
                        checkpoints.begins(start)
                except interrupt.Stop:
                    continue  # asked to stop by now: first the state is saved
                # Step: the host runs ahead of the devices, but not far.
                failpoints.hit("step.before", n + 1)
                # From here on a sudden end would lose a step, so a signal waits for a save.
                signals.begun = True
                # Any transfer that nobody asked for would be paid in every step, so it is an error.
                with watchdog.phase("step"), jax.transfer_guard("disallow"):
                    state, values = compiled(state, self.frozen, arrays)
                    in_flight.append(values)
                    # The first step is awaited at once: the start has progressed only behind it.
                    if len(in_flight) > MAX_IN_FLIGHT or n == start:
                        jax.block_until_ready(in_flight.popleft())
                n, evaluated = n + 1, False
                # Log.
                writer.step(n, values)
                if n == start + 1:
                    checkpoints.progressed()
                checkpoints.poll()
                if n % config.log_every == 0:
                    row = flush()
        row = flush()
        self._close(n, signals)
        return row

    def _open(self, signals, guard, restart: bool):
        """The first state. From here on the workdir is written to."""
        config, workdir = self.config, self.workdir
        checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep, guard=guard)
        # The first process has made the folder and swept it. The others must not list it before.
        distributed.barrier("workdir")
        if jax.process_index() == 0:
            rundir.describe(workdir, config, self.source, self.family.inputs)
        if self._changed:
            logging.info("the config changed: %s", "; ".join(self._changed))
        self.layout.report(self.shapes)
        if restart:
            checkpoints.set_all_aside()
            rundir.forget_rollbacks(workdir)
        with watchdog.phase("restore"), signals.at_once():
            state, start = self._first_state(checkpoints)
        self.hooks.forget(start)
        writer = metrics.Writer(
            workdir, start=start, stop=config.steps, batch_size=config.batch_size
        )
        self._opened = (checkpoints, writer, start)
        return state

    def _save(self, n: int, state, meta) -> None:
        """Begins to save the state of step n."""
        checkpoints, writer, _ = self._opened
        # A save removes old checkpoints. Before, all ratings must be known, as the best stays.
        with watchdog.phase("hooks"):
            self.hooks.collect(writer, checkpoints, before=n)
        with watchdog.phase("save"):
            failpoints.hit("save.before", n)
            checkpoints.save(state, meta)
            failpoints.hit("save.started", n)

    def _next_batch(self, stream, n: int, writer, signals):
        """The arrays of step n + 1, placed on the devices; broken examples are written down."""
        with watchdog.phase("reading data"), signals.at_once():
            failpoints.hit("data.before", n + 1)
            batch = next(stream)
        failpoints.trace(self.workdir, jax.process_index(), n + 1, batch)
        for slot, record, reason in batch.bad:
            if self.batches.quarantine[record][:2] == (n, slot):  # told once a start
                logging.warning(
                    "step %d: example %d is broken and counts nothing: %s", n + 1, record, reason
                )
            writer.broken(n + 1, int(slot), int(record), reason)
        if failpoints.hit("batch.nan", n + 1):
            batch.arrays["weight"][0] = np.nan  # images are bytes
        return self.layout.place(batch.arrays)

    def _late(self, n: int, since: float) -> bool:
        """Whether config.save_minutes have passed since the last save; alike on every process."""
        # All processes must save after the same step, though their clocks differ.
        if not self.config.save_minutes or (jax.process_count() > 1 and n % self.config.log_every):
            return False  # asking the first process takes time
        return distributed.as_first(time.monotonic() - since > 60 * self.config.save_minutes)

    # ---- Close ----

    def _close(self, n: int, signals) -> None:
        """Waits for the last save and, at the end of the run, the last evaluation."""
        checkpoints, writer, _ = self._opened
        checkpoints.progressed()  # a signal before the first step is no death
        with watchdog.phase("save"):
            checkpoints.close()
        if not signals.requested or n == self.config.steps:
            with watchdog.phase("hooks"):
                self.hooks.collect(writer, checkpoints, before=n + 1)
        writer.close()
        if signals.requested and n < self.config.steps:
            raise interrupt.preempted(signals.requested, self.workdir, f"after step {n}")
        logging.info("done: %d steps in %s", n, self.workdir)

    def settle(self) -> None:
        """Waits for a save that an error has overtaken; what fails there has been told.

        With several processes it does not wait, as the others may be dead.
        """
        if self._opened and jax.process_count() == 1:
            with contextlib.suppress(Exception), watchdog.phase("save"):
                self._opened[0].wait()

    def goes_back(self, e: errors.NonFiniteError) -> bool:
        """Whether a run that diverged may begin again at a checkpoint from before."""
        if self._rollbacks >= self.config.rollbacks:
            return False
        checkpoints, writer, start = self._opened
        with watchdog.phase("save"):
            writer.close()
            checkpoints.close()
        return health.goes_back(e, self.workdir, checkpoints, start)
