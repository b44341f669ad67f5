"""Teaches a pretrained pipeline your own pictures with low-rank adapters (LoRA).

python train.py --config=configs/finetune_lora.py:source=DIR,path=DATA --workdir=runs/lora
(:debug for seconds, with a tiny pipeline of random weights)

Options are those of configs/finetune.py, and `rank`. Targets are the projections of attention;
another choice is a pattern: --config.lora.model.match='attn|ff'. With `text_rank` the text encoders
get adapters, too.

Hardware: not tried with published weights; the frozen nets take what their files do. Expected:
depends on the pictures; look at samples/.
"""

from configs import common, finetune

TARGETS = r"attn.*/(q|k|v|qkv|kv|out)"  # of attention, as PEFT's scripts choose them


def get_config(arg=None):
    arg = common.parse_arg(arg, **finetune.KNOWN | dict(steps=1000, rank=16, text_rank=0))
    config = finetune.get_config(",".join(f"{name}={arg[name]}" for name in finetune.KNOWN))
    config.lora.model = dict(rank=arg.rank, match=TARGETS)
    config.optim = dict(model_lora=dict(name="adamw", learning_rate=1e-4, decay="cosine", clip=1.0))
    config.optim.model_lora.warmup = min(50, arg.steps // 10)
    if arg.text_rank:
        config.lora.text = dict(rank=arg.text_rank, match="")
        config.optim.text_lora = dict(config.optim.model_lora, learning_rate=5e-5)
    config.ema, config.strategy = {}, "data"
    return config
