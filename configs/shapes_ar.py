"""Shapes written code by code, 32 px: 64 codes of a frozen tokenizer, row by row.

python train.py --config=configs/shapes_tokenizer.py --workdir=runs/tokenizer
python train.py --config=configs/shapes_ar.py --workdir=runs/ar   (:debug for seconds)

`:tokenizer=RUN` names another run of the first. `:joint` makes one row of tokens of caption and
picture, L = ½·CE_text + ½·CE_image, for a language model of bytes.

Hardware: 2 CPU cores. Expected: not measured yet.
"""

from configs import common, shapes_flow, shapes_tokenizer


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, joint=False, tokenizer="runs/tokenizer")
    config = shapes_flow.get_config()
    tokenizer = shapes_tokenizer.get_config("debug" if arg.debug else None)
    config.objective = "ar"
    config.load.autoencoder, config.cache = arg.tokenizer, "encode,codes"
    config.model = dict(model=dict(width=192, depth=6, heads=6))
    config.loss = dict(text_dropout=0.1)
    config.sample = dict(guidance=3.0, temperature=1.0)
    config.evaluators.held_out_loss = dict(prediction="loss_by_row")
    if arg.joint:
        _join(config)
    config = common.shrink(config) if arg.debug else config
    config.model.autoencoder = tokenizer.model.autoencoder
    return config


def _join(config):
    """The captions' bytes are the first tokens of the row, and no other net reads them."""
    del config.load.text
    config.cache, config.text_length = "codes", 128
    config.model = dict(text=dict(width=192, depth=6, heads=6))
    config.loss.joint = (0.5, 0.5)
    config.optim.text = dict(config.optim.model)
    config.ema.text = config.ema.model
