"""The transformer in the sizes of DiT-S/2 … DiT-XL/2 (arXiv:2212.09748, table 1), for pods.

python train.py --config=configs/dit.py:size=XL,data=folder --config.data.path=DIR --workdir=runs/xl
(:debug for seconds; --dry_run --topology=v5e:2x4 says what a slice would need)

Hardware: a TPU slice (docs/tpu.md). Expected: compiled only, never trained, so there is no number.

256 picture tokens: 32 px in patches of 2. Blocks are wider by their attention to the caption.
For thousands of tokens heads of 128 numbers fill a TPU's lanes: size=XL,heads=9 in place of 16.
"""

from configs import common, shapes_flow
from t2i_jax import errors

SIZES = {  # width, blocks, heads
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, size="B", heads=0, data="shapes", path="")
    config = shapes_flow.get_config()
    if arg.data != "shapes":
        config.data = dict(source=arg.data, path=arg.path)
        config.prompts, config.evaluators = (), {}  # those of shapes say nothing of other data
    if arg.size not in SIZES:
        raise errors.unknown("size", arg.size, SIZES, where="--config=…:size")
    width, depth, heads = SIZES[arg.size]
    config.model.model = dict(
        backbone="transformer",
        **dict(width=width, depth=depth, heads=arg.heads or heads, patch=2),
        dtype="bfloat16",
        scan=True,
        remat="full",
    )
    config.strategy = "fsdp"
    config.batch_size, config.steps = 256, 400_000
    config.cache = ""
    config.loss.update(prediction="v", time_mean=0.0, time_std=1.0)
    config.optim.model = dict(name="adamw", learning_rate=1e-4, warmup=1000, clip=1.0)
    config.ema = dict(model=0.9999)
    config.log_every, config.save_every, config.sample_every = 100, 5000, 5000
    config.eval_every = 0
    return common.shrink(config) if arg.debug else config
