"""Flow matching on any prepared TFDS data set with an image and a text feature.

python train.py --config=configs/tfds_flow.py:name=coco_captions,res=64 --workdir=runs/coco
(:debug for seconds)

Hardware: accelerators for photographs. Expected: depends on the data; look at samples/.

`holdout` is that of configs/folder_flow.py, of the split "train".
"""

from configs import common, folder_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, name="", res=32, steps=20_000, holdout=0.0, debug=False)
    options = f"res={arg.res},steps={arg.steps},holdout={arg.holdout}"
    config = folder_flow.get_config(options)
    config.data = dict(source="tfds", name=arg.name, split="train", captions=1)
    config.data.update(data_dir="", image_key="", caption_key="")  # the usual ones
    if arg.holdout:
        config.data.holdout = arg.holdout
    return common.shrink(config) if arg.debug else config
