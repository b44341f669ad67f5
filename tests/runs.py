"""A :debug run that several tests look at, and what they read of it."""

import json

from configs import shapes_flow


def config(**changes):
    config = shapes_flow.get_config("debug")
    config.log_every = 1
    for key, value in changes.items():
        config[key] = value
    return config


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
