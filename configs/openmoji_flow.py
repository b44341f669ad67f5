"""Flow matching on OpenMoji drawings and their names, 32 px.

pip install -e ".[emoji]"
python train.py --config=configs/openmoji_flow.py --workdir=runs/openmoji   (:debug for seconds)

Hardware: 2 CPU cores, an hour. Expected: pictures as in docs/openmoji.png; there is no number.
"""

from configs import common, shapes_flow


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config = shapes_flow.get_config()
    config.data = dict(source="openmoji")
    config.text_length = 24
    config.steps = 4000
    config.ema = dict(model=0.999)
    config.sample.guidance = 2.0
    config.evaluators = {}
    config.prompts = (
        "red heart",
        "grinning face",
        "woman astronaut with dark skin tone",
        "slice of pizza",
    )
    return common.shrink(config) if arg.debug else config
