"""The model that ships as builtin:shapes: shapes_flow, trained for longer on more examples.

python train.py --config=configs/shapes_builtin.py --workdir=runs/builtin   (:debug for seconds)

Hardware: 2 CPU cores, 65 minutes. Expected: full_match .963 of 512 pictures.
The shipped weights had another learning rate schedule (docs/results.md).
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config()
    config.data = dict(source="shapes", size=65_536)
    config.steps = 7500
    config.sample.guidance = 2.0
    config.ema = dict(model=0.999)
    config.save_every = 250
    return common.shrink(config) if arg.debug else config
