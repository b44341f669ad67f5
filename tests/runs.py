"""A :debug run that several tests look at, and what they read of it."""

import json
import sys

from configs import shapes_flow

COMMAND = [sys.executable, "train.py", "--config=configs/shapes_flow.py:debug"]
COMMAND += ["--config.log_every=1", "--config.loss.prediction=v"]  # the same, as a command
COMMAND += ["--config.optim.model.decay=constant"]


def config(**changes):
    config = shapes_flow.get_config("debug")
    config.log_every = 1
    config.optim.model.decay = "constant"  # one program, however many the steps
    config.loss.prediction = "v"  # of a hardly trained net, velocities show the noise's seed
    for key, value in changes.items():
        config[key] = value
    return config


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
