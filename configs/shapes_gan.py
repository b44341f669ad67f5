"""A conditional GAN on shapes, 32 px: text in, a picture out in one pass.

python train.py --config=configs/shapes_gan.py --workdir=runs/gan   (:debug for seconds)

Hardware: 2 CPU cores, some 80 minutes. Expected: full_match .584 of 512 pictures,
measured before a change of Muon.

`:guided` adds how far pictures lie from their captions by the dual encoder builtin:shapes-clip.
With `:projected` the discriminator is heads on the frozen image tower of that encoder.
"""

from configs import common, shapes_clip, shapes_flow

CLIP = "builtin:shapes-clip"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, guided=False, projected=False)
    config = shapes_flow.get_config()
    config.objective = "gan"
    config.data.size = 65_536
    config.steps = 2600
    sizes = dict(width=128, heads=2)
    config.model = dict(gen=dict(sizes, reads=2), disc=sizes)
    config.loss = dict(game="relativistic", gamma=(0.5, 0.1), penalty_stride=4)
    config.loss.update(mismatch=0.5, sentence=0.1, word=0.1)
    muon = dict(
        **dict(name="muon", consistent_rms=0.25, adam_b1=0.0, adam_b2=0.95, weight_decay=0.0),
        **dict(warmup=20, decay="cosine", final=0.02),
    )
    config.optim = dict(
        disc=dict(muon, learning_rate=2.5e-3, beta=0.5),
        gen=dict(muon, learning_rate=2e-3, beta=0.5),
    )
    config.ema = dict(gen=0.998)
    config.sample = dict(truncation=1.0)
    guide = shapes_clip.get_config().model
    if arg.projected:
        config.load.eye = f"{CLIP}#image"
        config.model = dict(gen=config.model.gen, disc=dict(width=64), eye=guide.image.to_dict())
        config.loss.penalty = "estimate"
    if arg.guided:
        config.load.update(clip_image=f"{CLIP}#image", clip_caption=f"{CLIP}#caption")
        config.model.clip = guide
        config.loss.update(clip=1.0, adversarial=1.0)
    return common.shrink(config) if arg.debug else config
