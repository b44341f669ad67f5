"""Flow matching on shapes in the latents of an autoencoder trained here: 8 × 8 × 4 for 32 px.

python train.py --config=configs/shapes_tokenizer.py:kl --workdir=runs/kl
python train.py --config=configs/shapes_latents.py:autoencoder=runs/kl --workdir=runs/latents
(:debug for seconds)

Latents are computed once. Those of the autoencoder should be about as large as noise: set
config.model.autoencoder.scaling_factor to 1/latent_rms, a metric of its training.

Hardware: 2 CPU cores. Expected: not measured yet.
"""

from configs import common, shapes_flow, shapes_tokenizer


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, autoencoder="runs/kl")
    config = shapes_flow.get_config()
    network = dict(backbone="transformer", patch=1, width=192, depth=6, heads=6)
    own = shapes_tokenizer.get_config("kl,debug" if arg.debug else "kl").model.autoencoder
    config.model = dict(model=network, autoencoder=own)
    config.load.autoencoder = arg.autoencoder
    config.cache = "encode,moments"
    config.optim.model.learning_rate = 1e-3
    return common.shrink(config) if arg.debug else config
