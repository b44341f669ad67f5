"""The model that ships as builtin:shapes-gan: shapes_gan_from_flow, trained further on more
examples. Its penalties are held at a little less than they were in the middle.

python train.py --config=configs/shapes_gan_builtin.py --workdir=runs/gan_builtin
(after configs/shapes_gan_from_flow.py with --workdir=runs/gan_from_flow; :debug for seconds)

Hardware: one CPU core, some 100 minutes. Expected: full_match .906 of 512 pictures.
"""

from configs import common, shapes_gan_from_flow

BEFORE = "runs/gan_from_flow"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_gan_from_flow.get_config()
    if not arg.debug:
        config.load.update(gen=f"{BEFORE}#gen", disc=f"{BEFORE}#disc")
    config.data.size = 65_536
    config.steps = 2600
    config.loss.gamma = (0.2, 0.2)
    config.ema.gen = 0.998
    config.optim.gen.final = config.optim.disc.final = 0.02
    config.save_every = 250
    return common.shrink(config) if arg.debug else config
