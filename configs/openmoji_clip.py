"""A dual encoder of OpenMoji drawings and their names, 32 px.

pip install -e ".[emoji]"
python train.py --config=configs/openmoji_clip.py --workdir=runs/openmoji_clip
(:debug for seconds)

Hardware: one CPU core, 136 pairs a second. Expected after 750 steps: the right drawing is first of
64 for .195 of the captions that training never shows; chance is .016.
"""

from configs import common, openmoji_flow, shapes_clip


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config, flow = shapes_clip.get_config(), openmoji_flow.get_config()
    config.data, config.text_length = flow.data, flow.text_length
    config.steps = 1500
    held_out = dict(source="openmoji", split="test")
    config.evaluators = dict(retrieval=dict(data=held_out, candidates=64))
    return common.shrink(config) if arg.debug else config
