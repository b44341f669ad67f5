"""A trained flow model becomes a generator of one step: shapes_gan from builtin:shapes.

The generator begins as the flow network at its noisiest time; the discriminator's heads look
through the same network, frozen.

python train.py --config=configs/shapes_gan_from_flow.py --workdir=runs/gan_from_flow
(:debug for seconds)
"""

from configs import common, shapes_builtin, shapes_gan

FLOW = "builtin:shapes#model"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    flow, config = shapes_builtin.get_config(), shapes_gan.get_config()
    config.load = dict(text="minilm", gen=FLOW, eye=FLOW)
    net = dict(flow.model)
    config.model = dict(
        gen=dict(net, prediction=flow.loss.prediction), eye=net, disc=dict(width=128)
    )
    config.loss.update(penalty="estimate", mismatch=0.25)
    config.optim.gen.learning_rate = 2e-4
    return common.shrink(config) if arg.debug else config
