"""A conditional GAN on shapes, 32 px: text in, a picture out in one pass.

python train.py --config=configs/shapes_gan.py --workdir=runs/gan   (:debug for seconds)

The discriminator's heads look through the image tower of builtin:shapes-clip, and that dual encoder
guides the generator, too. `:plain` has neither: a residual discriminator and the game alone.
"""

from configs import common, shapes_clip, shapes_flow

CLIP = "builtin:shapes-clip"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, plain=False)
    config = shapes_flow.get_config()
    config.objective = "gan"
    config.steps = 3000
    config.model = dict(width=128, heads=2)
    config.loss = dict(game="relativistic", gamma=(0.5, 0.05), penalty_stride=4, mismatch=0.5)
    adam = dict(name="adam", learning_rate=4e-4, b1=0.0, b2=0.95, decay="cosine", final=0.25)
    config.optim = dict(disc=adam, gen=dict(adam))  # two: a change to one is none to the other
    config.ema = dict(gen=0.995)
    config.sample = dict(truncation=1.0)
    if not arg.plain:
        guide = shapes_clip.get_config().model
        config.load.update(
            eye=f"{CLIP}#image", clip_image=f"{CLIP}#image", clip_caption=f"{CLIP}#caption"
        )
        config.model = dict(
            gen=config.model, disc=dict(width=64), eye=guide.image.to_dict(), clip=guide
        )
        config.loss.update(penalty="estimate", clip=1.0, adversarial=1.0)
        config.optim.disc.learning_rate = 1e-3
    return common.shrink(config) if arg.debug else config
