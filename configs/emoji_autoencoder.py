"""An autoencoder of named drawings in five styles, 64 px to 16 × 16 places of four numbers.

pip install -e ".[emoji]"
python train.py --config=configs/emoji_autoencoder.py --workdir=runs/emoji_autoencoder
(:debug for seconds)

:large reads 128 px and has the same latents. It is written as diffusers has it by
`t2i_jax export --workdir=… --output=… --format=diffusers`.

Hardware: 2 CPU cores. Expected: not measured yet.
"""

from configs import common, shapes_tokenizer

WIDTHS = {64: (16, 32, 64), 128: (16, 32, 64, 64)}  # one factor of 2 between two of them


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, large=False)
    config = shapes_tokenizer.get_config("kl")
    config.data = dict(source="emoji")
    config.res = 128 if arg.large else 64
    config.model.autoencoder.widths = WIDTHS[config.res]
    config.augment = ("flip",)
    config.steps = 8000
    held_out = dict(source="emoji", split="test", captions=1)
    config.evaluators = dict(reconstruction=dict(data=held_out, num_images=512))
    config.eval_every = 1000
    return common.shrink(config) if arg.debug else config
