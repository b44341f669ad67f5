"""Trains a model.   python train.py --config=configs/shapes_flow.py --workdir=runs/flow"""

from absl import flags
from ml_collections import config_flags

from t2i_jax import cli, distributed

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, configs/<name>.py[:options]."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; an unfinished run goes on.")
RESTART = flags.DEFINE_bool(
    "restart_from_scratch", False, "Set the workdir's checkpoints aside and begin again."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile, print sizes and memory, write nothing.")

PROCESSES = cli.process_flags()


def main():
    from t2i_jax import loop

    distributed.start(**cli.given(PROCESSES))
    loop.train(CONFIG.value, WORKDIR.value, dry_run=DRY_RUN.value, restart=RESTART.value)


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
