"""Trains the denoiser of a pretrained pipeline, whole, on your own pictures.

python train.py --config=configs/finetune.py:source=DIR,path=DATA --workdir=runs/tuned
(:debug for seconds, with a tiny pipeline of random weights)

source: a folder of diffusers, or hf:org/name@revision: Stable Diffusion 1 and 2, SDXL, PixArt-α
  and -Σ, SD 3, FLUX.1. path: pictures and captions, see configs/folder_flow.py. res: pixels a
  side, by default those that the pipeline was made for; width and height: of rectangles.
  prior: a folder with pictures of the subject's class, for prior preservation, see
  t2i_jax/data/subject.py; prior_weight: their λ.

Hardware: not tried with published weights; weights, gradients, moments and averages take 20 bytes
a parameter, spread over all devices. Expected: depends on the pictures; look at samples/.
Autoencoder and text encoders stay as they are, stored as in their files.
"""

from configs import common
from t2i_jax import errors
from t2i_jax.pretrained import folder

KNOWN = dict(source="", path="", res=0, width=0, height=0, steps=2000, holdout=0.0)
KNOWN |= dict(prior="", prior_weight=1.0, debug=False)


def get_config(arg=None):
    arg = common.parse_arg(arg, **KNOWN)
    source = arg.source or (str(folder.TINY) if arg.debug else "")
    # What is no pipeline is told when the run starts, with all that is wrong beside it.
    made = folder.described(source) if folder.is_pipeline(source) else folder.unknown(source)
    config = common.base()
    config.objective, config.text_length = made["objective"], made["text_length"]
    config.load, config.sample = made["load"], made["sample"]
    config.res, config.steps, config.batch_size = arg.res or made["res"], arg.steps, 8
    if bool(arg.width) != bool(arg.height):
        raise errors.ConfigError("only one of width and height", where="--config", fix="give both")
    if arg.width:
        config.size = (arg.height, arg.width)
    config.data = dict(source="folder", path=arg.path, holdout=arg.holdout, pad=False)
    if arg.prior:
        config.data.update(source="subject", prior=arg.prior, prior_weight=arg.prior_weight)
    config.text = dict(dtype="bfloat16")
    config.model.model = dict(dtype="bfloat16", remat="full", scan=True)
    config.loss = dict(text_dropout=0.1, snr_gamma=0.0, offset=0.0, guidance=1.0, train_text=False)
    config.optim.model = dict(
        name="adamw", learning_rate=1e-5, decay="constant", weight_decay=0.01, clip=1.0
    )
    config.optim.model.warmup = min(100, arg.steps // 10)
    config.ema.model = 0.999
    config.strategy = "fsdp"
    config.evaluators = dict(held_out_loss=dict()) if arg.holdout else {}
    config.eval_every = 500 if arg.holdout else 0
    config.save_every, config.sample_every = 500, 250
    return debugged(config, made["load"]) if arg.debug else config


def debugged(config, load):
    """`common.shrink` with the pipeline's own nets, on pictures of shapes, whatever the path."""
    length = config.text_length
    config = common.shrink(config)
    config.load, config.text_length, config.data = load, length, dict(source="shapes", size=64)
    config.model.model.dtype = "float32"
    return config
