"""A conditional GAN on OpenMoji drawings and their names, 32 px.

pip install -e ".[emoji]"
python train.py --config=configs/openmoji_gan.py --workdir=runs/openmoji_gan   (:debug for seconds)

Hardware: CPU cores do. Expected: not trained yet, so there is no number.

The drawings are few: the discriminator sees them augmented, ever more of them.
"""

from configs import common, openmoji_flow, shapes_gan


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    config, flow = shapes_gan.get_config(), openmoji_flow.get_config()
    for key in ("data", "text_length", "evaluators", "prompts"):
        config[key] = flow[key]
    config.steps = 8000
    config.loss.update(augment=("colour", "translation", "cutout"), augment_share=(0.0, 0.3))
    config.ema = dict(gen=0.999)
    return common.shrink(config) if arg.debug else config
