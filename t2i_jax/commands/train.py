"""Trains a model.   python train.py --config=configs/shapes_flow.py --workdir=runs/flow"""

from t2i_jax.run import interrupt

if __name__ == "__main__":
    interrupt.listen()  # first, as the other imports take seconds in which a signal can come

from absl import flags, logging
from ml_collections import config_flags

from t2i_jax.commands import cli
from t2i_jax.run import distributed

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, configs/<name>.py[:options]."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; an unfinished run goes on.")
RESTART = flags.DEFINE_bool(
    "restart_from_scratch", False, "Set the workdir's checkpoints aside and begin again."
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile, print memory, FLOPs and traffic, write nothing."
)
PLAN = {
    "topology": flags.DEFINE_string(
        "topology", None, "Dry run for a TPU slice that is not at hand, such as v5e:2x4."
    ),
    "memory_gb": flags.DEFINE_float(
        "memory_gb", None, "Dry run that says whether the step fits one device's memory."
    ),
}
PROCESSES = cli.process_flags()


def main():
    from t2i_jax import loop, objective
    from t2i_jax.commands import plan

    # Before anything asks for a device: that would start JAX for this process alone.
    distributed.start(**cli.given(PROCESSES))
    asked, config = cli.given(PLAN), CONFIG.value
    by_net = objective.model_by_net(config)  # a file for an older version still trains
    if by_net.keys() != config.model.keys():
        sizes = ", ".join(sorted({*config.model} - {*by_net}))
        logging.warning("config.model without its nets is the old form; read by net: %s", sizes)
    config.model = by_net
    if DRY_RUN.value or asked:
        plan.check_fits(plan.show(config, WORKDIR.value, **asked))
    else:
        loop.train(config, WORKDIR.value, restart=RESTART.value)
    distributed.wait_for_first()


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
