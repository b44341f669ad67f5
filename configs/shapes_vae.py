"""A variational autoencoder on shapes, 32 px, whose latents the caption foresees.

python train.py --config=configs/shapes_vae.py --workdir=runs/vae   (:debug for seconds)

Hardware: 2 CPU cores. Expected: not measured yet.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config()
    config.objective = "vae"
    config.model = dict(model=dict(width=96, depth=2, heads=4, latents=8))
    config.loss = dict(free_bits=0.1, text_dropout=0.1)
    config.sample = dict(temperature=0.8, guidance=1.0)
    config.evaluators.held_out_loss = dict(prediction="bits")
    return common.shrink(config) if arg.debug else config
