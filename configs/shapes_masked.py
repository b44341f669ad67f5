"""Shapes guessed in twelve passes, 32 px: 64 codes of a frozen tokenizer, the surest first.

python train.py --config=configs/shapes_tokenizer.py --workdir=runs/tokenizer
python train.py --config=configs/shapes_masked.py --workdir=runs/masked   (:debug for seconds)

`:tokenizer=RUN` names another run of the first.

Hardware: 2 CPU cores. Expected: not measured yet.
"""

from configs import common, shapes_ar


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, tokenizer="runs/tokenizer")
    config = shapes_ar.get_config(f"{'debug,' * arg.debug}tokenizer={arg.tokenizer}")
    config.objective = "masked"
    config.loss = dict(text_dropout=0.1, smoothing=0.1)
    config.sample = dict(guidance=3.0, steps=12, temperature=4.5)
    if "held_out_loss" in config.evaluators:
        del config.evaluators.held_out_loss.prediction  # the usual one
    return config
