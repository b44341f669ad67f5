"""A variational autoencoder on shapes, 32 px, whose prior reads the caption.

python train.py --config=configs/shapes_vae.py --workdir=runs/vae   (:debug for seconds)

Hardware: 2 CPU cores. Expected: after 350 steps of 64, reconstructions of PSNR 26. Of 256 pictures
all backgrounds are right, colours are right in an eighth, and full_match is 0.
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
