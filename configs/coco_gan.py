"""A conditional GAN on photographs with captions, 64 or 128 px.

python train.py --config=configs/coco_gan.py:res=64 --workdir=runs/coco64
python train.py --config=configs/coco_gan.py:res=128,path=DIR --workdir=runs/coco128
(:debug for seconds)

Hardware: accelerators. Expected: not trained yet, so there is no number.

The data are COCO as TFDS prepares it, or a folder of pictures with captions (see folder_flow).
`holdout`, such as 0.05, keeps that share of the pictures out of training. `held_out_loss/mean` is
then how far the discriminator puts them above drawn ones. Where the training's `disc/gap` grows
beyond it, the discriminator knows its pictures by heart.
As for R3GAN (arXiv:2501.05441), rates, penalties, Adam's second moment and augmentation go from
their first to their last value on one cosine.
"""

from configs import common, shapes_gan


def get_config(arg=None):
    arg = common.parse_arg(arg, res=64, path="", holdout=0.0, debug=False)
    config = shapes_gan.get_config()
    config.data = dict(source="tfds", name="coco_captions", split="train", captions=5)
    config.data.update(data_dir="", image_key="", caption_key="")  # the usual ones
    if arg.path:
        config.data = dict(source="folder", path=arg.path)
    config.res, config.batch_size, config.steps = arg.res, 256, 80_000
    config.text_length, config.cache = 48, ""
    sizes = dict(width=512, least=64, depth=2, heads=8)
    config.model = dict(gen=sizes, disc=dict(sizes))
    config.loss.update(gamma=(1.0, 0.1), augment=("colour", "translation", "cutout"))
    adam = dict(name="adam", learning_rate=2e-4, b1=0.0, b2=(0.9, 0.99), clip=10.0)
    adam.update(decay="cosine", final=0.25)
    config.optim = dict(disc=adam, gen=dict(adam))
    config.ema = dict(gen=0.999)
    config.watch, config.rollbacks = {"disc/gap": 50.0}, 2
    config.evaluators, config.save_every, config.sample_every = {}, 1000, 1000
    config.prompts = (
        "a man riding a wave on a surfboard",
        "a plate of food with broccoli",
        "a red double decker bus on a street",
        "two giraffes standing in a field",
    )
    if arg.path:
        config.prompts = ()  # the folder's own
    if arg.holdout:
        config.data.holdout = arg.holdout
        config.evaluators = dict(held_out_loss=dict(prediction="gap"))
    return common.shrink(config) if arg.debug else config
