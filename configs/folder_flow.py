"""Flow matching on your own pictures.

python train.py --config=configs/folder_flow.py:path=DIR,res=64 --workdir=runs/mine
(:debug for seconds)

DIR holds pictures with metadata.jsonl or metadata.csv (file_name, text), or a .txt beside each.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, path="", res=32, steps=20_000, debug=False)
    config = shapes_flow.get_config()
    config.data = dict(source="folder", path=arg.path, holdout=0.0, pad=False)
    config.res, config.steps = arg.res, arg.steps
    config.save_every = config.sample_every = 1000
    config.ema = dict(model=0.9995)
    config.evaluators = {}
    config.prompts = ()
    return common.shrink(config) if arg.debug else config
