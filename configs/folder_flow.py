"""Flow matching on your own pictures.

python train.py --config=configs/folder_flow.py:path=DIR,res=64,holdout=0.05 --workdir=runs/mine
(:debug for seconds)

Hardware: CPU cores do for 32 px. Expected: depends on the pictures; look at samples/.

DIR holds pictures with metadata.jsonl or metadata.csv (file_name, text), or a .txt beside each.
Captions of the data are drawn into samples/ every 500 steps. `holdout` keeps that share of the
pictures out of training, by a hash of their names, and measures the loss on them.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, path="", res=32, steps=20_000, holdout=0.0, debug=False)
    config = shapes_flow.get_config()
    config.data = dict(source="folder", path=arg.path, holdout=arg.holdout, pad=False)
    config.res, config.steps = arg.res, arg.steps
    config.save_every, config.sample_every = 1000, 500
    config.ema = dict(model=0.9995)
    config.evaluators = dict(held_out_loss=dict()) if arg.holdout else {}
    config.eval_every = 500 if arg.holdout else 0
    config.prompts = ()
    return common.shrink(config) if arg.debug else config
