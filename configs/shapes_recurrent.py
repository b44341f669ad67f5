"""A recurrent generator on shapes, 32 px: LSTMs that read captions and paint strip by strip.

python train.py --config=configs/shapes_recurrent.py --workdir=runs/recurrent   (:debug for seconds)

Hardware: 2 CPU cores. Expected: not measured yet.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config()
    config.objective = "recurrent"
    config.model = dict(model=dict(strip=2, width=384, depth=1, choices=8))
    config.loss = dict(edited=0.3, noise=0.05)
    config.sample = dict(temperature=1.0)
    adam = dict(name="adamw", learning_rate=1e-3, warmup=100, decay="cosine", clip=1.0)
    config.optim = dict(model=adam)
    config.evaluators.held_out_loss = dict(prediction="bits")
    return common.shrink(config) if arg.debug else config
