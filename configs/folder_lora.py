"""Teaches builtin:shapes your own pictures with adapters of a few hundred kB (LoRA).

python train.py --config=configs/folder_lora.py:path=DIR --workdir=runs/lora   (:debug for seconds)

Hardware: CPU cores do. Expected: depends on the pictures; look at samples/.

DIR and `holdout` are those of configs/folder_flow.py.

python -m t2i_jax export --workdir=runs/lora --output=models/lora

writes the adapters alone, with --merge a model like any other; sample.py draws with either.
"""

from configs import common, folder_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, path="", steps=1000, holdout=0.0, debug=False)
    options = f"path={arg.path},steps={arg.steps},holdout={arg.holdout}"
    config = folder_flow.get_config(options)
    config.load.model = "builtin:shapes"  # its sizes are those of shapes_flow
    config.lora = dict(model=dict(rank=8))
    config.optim = dict(
        model_lora=dict(name="adamw", learning_rate=1e-3, warmup=50, decay="cosine", clip=1.0)
    )
    config.ema = dict(model_lora=0.99)
    config.save_every = config.sample_every = 250
    return common.shrink(config) if arg.debug else config
