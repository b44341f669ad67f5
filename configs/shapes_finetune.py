"""shapes_flow with a text encoder that learns together with the generator, at a rate of its own.

python train.py --config=configs/shapes_finetune.py --workdir=runs/finetune   (:debug for seconds)

Hardware: CPU cores do. Expected: it shows how to train an encoder; there is no number.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config("debug" if arg.debug else None)
    config.cache = ""  # captions are encoded in every step: their states change
    config.loss.train_text = True
    config.optim.text = dict(
        name="adamw", learning_rate=2e-5, warmup=500, decay="cosine", weight_decay=0.01, clip=1.0
    )
    config.ema.text = 0.998
    return config
