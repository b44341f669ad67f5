"""shapes_flow with the transformer, the backbone that scales.

python train.py --config=configs/shapes_transformer.py --workdir=runs/transformer
(:debug for seconds)

Hardware: CPU cores do. Expected: there is no number; docs/results.md has the speed of its steps.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config()
    config.model = dict(model=dict(backbone="transformer", width=192, depth=6, heads=6))
    config.loss.prediction = "x"
    config.optim.model.learning_rate = 1e-3
    return common.shrink(config) if arg.debug else config
