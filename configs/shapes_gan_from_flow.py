"""A trained flow model becomes a generator of one step: shapes_gan from builtin:shapes.

python train.py --config=configs/shapes_gan_from_flow.py --workdir=runs/gan_from_flow
(:debug for seconds)

Hardware: one CPU core, 64 minutes. Expected: full_match .797 of 512 pictures.

The generator begins as the flow network at its noisiest time (adversarial post-training,
arXiv:2501.08316). For some pictures it also learns how the flow model goes on from them
(docs/adr/0014-a-flow-model-teaches.md).
"""

from configs import common, shapes_builtin, shapes_gan

FLOW = "builtin:shapes"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    flow, config = shapes_builtin.get_config(), shapes_gan.get_config("guided")
    net = dict(flow.model.model, prediction=flow.loss.prediction)
    del config.model.gen
    config.model.update(gen=net, teacher=dict(net))
    config.load.update(gen=f"{FLOW}#model", teacher=f"{FLOW}#model")
    config.loss.update(distil=8.0, distil_stride=4)
    config.optim.gen.update(learning_rate=1e-3, beta=0.9)
    config.optim.gen.final = config.optim.disc.final = 0.1
    config.loss.teacher = dict(guidance=2.0, steps=4, sampler="euler", shift=2.0)
    config.loss.gamma, config.ema.gen = (0.5, 0.05), 0.995
    config.data.size = 16_384
    config.steps = 1800
    return common.shrink(config) if arg.debug else config
