"""Flow matching on shapes, 32 px: the config that most others begin with.

python train.py --config=configs/shapes_flow.py --workdir=runs/flow   (:debug for seconds)

Hardware: 2 CPU cores. Expected: no number of its own; shapes_builtin and shapes_demo have one.
"""

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = common.base()
    config.objective = "flow"
    config.data = dict(source="shapes", size=16384)
    config.steps = 1650
    config.load = dict(text="minilm")
    config.cache = "encode"
    config.text_length = 32
    config.model = dict(model=dict(backbone="unet", stem=32, width=128, depth=2, heads=4))
    config.loss = dict(prediction="x", time_mean=0.8, time_std=1.4, text_dropout=0.1)
    config.sample = dict(guidance=3.0, steps=12, sampler="heun", shift=3.0)
    config.optim = dict(
        model=dict(
            name="muon",
            learning_rate=2e-3,
            warmup=50,
            decay="cosine",
            consistent_rms=0.25,
            adam_b2=0.95,
            weight_decay=0.0,
            clip=1.0,
        )
    )
    config.ema = dict(model=0.998)
    config.evaluators = dict(shapes=dict(num_images=128))
    config.eval_every = 1000
    config.prompts = (
        "a red circle above a blue square on a white background",
        "a small green star at the top left on a black background",
        "a large yellow ring on a grey background",
        "a purple triangle to the left of an orange cross",
    )
    return common.shrink(config) if arg.debug else config
