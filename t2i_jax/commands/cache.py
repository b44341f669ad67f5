"""Runs frozen nets once, into files that training reads in their place.

python -m t2i_jax cache --config=configs/shapes_flow.py --workdir=runs/flow

writes what config.cache names: of captions <workdir>/captions, of pictures <workdir>/pictures.
After a kill it goes on with the next file.
"""

import pathlib
import time

from absl import flags
from ml_collections import config_flags

from t2i_jax.commands import cli
from t2i_jax.data import cache
from t2i_jax.run import interrupt, owner, rundir

CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment, configs/<name>.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run that will train with them.")


def main():
    from t2i_jax import loop  # imports JAX: errors of flags should not wait for that

    run = loop.Run(CONFIG.value, pathlib.Path(WORKDIR.value))
    run.load_frozen()
    # Before the encoding: training with these nets would be refused afterwards.
    rundir.check_frozen(run.workdir, run.frozen)
    # The lock keeps a training of this workdir from starting on half of the files.
    with interrupt.Interrupt(run.workdir) as signals, owner.held(run.workdir, signals):
        for name in run.cached or [""]:  # without a name it is an error
            started, (predict, rows, identity) = time.perf_counter(), run.kept_rows(name)
            folder = run.workdir / run.cached[name].folder
            manifest = cache.write(folder, predict, rows, identity)
            size = sum(manifest["files"].values())
            seconds = time.perf_counter() - started
            print(f"{manifest['rows']} {rows.name}, {size / 1e6:.1f} MB, {seconds:.0f} s: {folder}")


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
