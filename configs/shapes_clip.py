"""A dual encoder of shapes and their captions, 32 px: what belongs together lies together.

python train.py --config=configs/shapes_clip.py --workdir=runs/clip   (:debug for seconds)

Hardware: 2 CPU cores, five minutes of training. Expected: a picture's caption is first of 64 for
.980 of the pictures, and for .955 of those whose pair of colour and shape training never shows.
It ships as builtin:shapes-clip.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config()
    config.objective = "clip"
    config.data.size = 32768
    config.steps, config.batch_size = 800, 128
    config.model = dict(
        image=dict(tower="convolutional", width=128, depth=1, projected=128),
        caption=dict(width=128, depth=2, heads=4),
    )
    config.loss = dict(kind="contrastive")
    adam = dict(name="adamw", learning_rate=1e-3, warmup=100, decay="cosine", weight_decay=1e-4)
    config.optim = dict(image=adam, caption=dict(adam))
    config.ema = dict(image=0.995, caption=0.995)
    config.sample, config.prompts = dict(), ()
    held_out = dict(source="shapes", split="test", size=1024)
    config.evaluators = dict(retrieval=dict(data=held_out, candidates=64))
    config.eval_every, config.best = 250, "retrieval/image_to_text_at_1"
    return common.shrink(config) if arg.debug else config
