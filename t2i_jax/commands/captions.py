"""Encodes a run's captions once, into files that training reads in place of the encoder.

python -m t2i_jax captions --config=configs/shapes_flow.py --workdir=runs/flow

writes <workdir>/captions. After a kill it goes on with the next file.
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
    started = time.perf_counter()
    folder = run.workdir / cache.FOLDER
    # The lock keeps a training of this workdir from starting on half of the files.
    with interrupt.Interrupt(run.workdir) as signals, owner.held(run.workdir, signals):
        manifest = cache.write(folder, *run.caption_states())
    size = sum(manifest["files"].values())
    print(
        f"{manifest['captions']} captions, {size / 1e6:.1f} MB, "
        f"{time.perf_counter() - started:.0f} s: {folder}"
    )


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
