"""A trained flow model becomes a generator of one step: shapes_gan from builtin:shapes.

The generator begins as the flow network at its noisiest time (adversarial post-training,
arXiv:2501.08316) and is told, of some pictures, how the flow model goes on from them
(docs/adr/0014-a-flow-model-teaches.md).

python train.py --config=configs/shapes_gan_from_flow.py --workdir=runs/gan_from_flow
(:debug for seconds)
"""

from configs import common, shapes_builtin, shapes_gan

FLOW = "builtin:shapes"


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False)
    flow, config = shapes_builtin.get_config(), shapes_gan.get_config()
    net = dict(flow.model, prediction=flow.loss.prediction)
    model = config.model
    config.model = dict(disc=model.disc, eye=model.eye, clip=model.clip, gen=net, teacher=dict(net))
    config.load.update(gen=f"{FLOW}#model", teacher=f"{FLOW}#model")
    config.loss.update(distil=4.0, distil_stride=4)
    config.loss.teacher = dict(guidance=2.0, steps=4, sampler="euler", shift=2.0)
    config.optim.gen = dict(
        **dict(name="muon", learning_rate=1e-3, consistent_rms=0.25, adam_b1=0.0, adam_b2=0.95),
        **dict(weight_decay=0.0, beta=0.9, warmup=20, decay="cosine", final=0.1),
    )
    config.steps = 2200
    return common.shrink(config) if arg.debug else config
