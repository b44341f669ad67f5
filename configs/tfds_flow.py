"""Flow matching on any prepared TFDS data set with an image and a text feature.

python train.py --config=configs/tfds_flow.py:name=coco_captions,res=64 --workdir=runs/coco
"""

from configs import common, folder_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, name="", res=32, steps=20_000, debug=False)
    config = folder_flow.get_config(f"res={arg.res},steps={arg.steps}")
    config.data = dict(source="tfds", name=arg.name, split="train", captions=1)
    config.data.update(data_dir="", image_key="", caption_key="")  # the usual ones
    return common.shrink(config) if arg.debug else config
