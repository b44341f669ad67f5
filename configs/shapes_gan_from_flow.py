"""A trained flow model becomes a generator of one step: shapes_gan from builtin:shapes.

The generator begins as the flow network at its noisiest time (adversarial post-training,
arXiv:2501.08316); the discriminator's heads look through the image tower of builtin:shapes-clip,
and that dual encoder guides, too.

python train.py --config=configs/shapes_gan_from_flow.py --workdir=runs/gan_from_flow
(:debug for seconds)
"""

from configs import common, shapes_builtin, shapes_clip, shapes_gan

FLOW, CLIP = "builtin:shapes", "builtin:shapes-clip"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    flow, config = shapes_builtin.get_config(), shapes_gan.get_config()
    guide = shapes_clip.get_config().model
    config.load = dict(
        **dict(text="minilm", gen=f"{FLOW}#model", eye=f"{CLIP}#image"),
        **dict(clip_image=f"{CLIP}#image", clip_caption=f"{CLIP}#caption"),
    )
    config.model = dict(
        gen=dict(flow.model, prediction=flow.loss.prediction),
        disc=dict(width=64),
        eye=guide.image,
        clip=guide,
    )
    config.loss.update(penalty="estimate", clip=1.0)
    config.optim.disc.learning_rate, config.optim.gen.learning_rate = 1e-3, 2e-4
    config.steps = 1500
    return common.shrink(config) if arg.debug else config
