"""The tiny experiment that the faults strike: 24 steps of a transformer on 64 shapes."""

from configs import common, shapes_transformer


def get_config(arg=None):
    arg = common.parse_arg(arg, folder="")
    config = shapes_transformer.get_config("debug")
    config.data.size = 64
    if arg.folder:
        config.data = dict(source="folder", path=arg.folder)
    config.steps, config.log_every, config.save_every = 24, 1, 4
    config.loss.prediction = "v"
    return config
