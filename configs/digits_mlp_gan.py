"""The plainest conditional GAN: dense layers, handwritten digits, the game of 2014, a text loss.

pip install -e ".[digits]"
python train.py --config=configs/digits_mlp_gan.py --workdir=runs/digits_mlp
python train.py --config=configs/digits_mlp_gan.py:modern --workdir=runs/digits_modern
(:debug for seconds)

Hardware: one CPU core, 4 minutes; `modern` 34 minutes.
Expected: 99.8 % of the digits are recognised, diversity .157; `modern` 97.8 % and .173.

`modern` is shapes_gan's networks and game on the same digits. Ten captions let a generator that
learns fast draw one picture for each (docs/adr/0015-both-nets-of-the-game-learn-by-muon.md).
"""

from configs import common, shapes_gan


def get_config(arg=None):
    arg = common.parse_arg(arg, debug=False, modern=False)
    config = shapes_gan.get_config()
    config.data = dict(source="digits")
    config.text_length = 8
    config.steps = 3000
    if arg.modern:
        config.steps = 2400
        sizes = dict(width=64, heads=2)
        config.loss.update(gamma=(4.0, 1.0), mismatch=0.0, sentence=0.0, word=0.0)
        adam = dict(b1=0.0, b2=0.95, warmup=20, decay="cosine", final=0.1)
        config.optim = dict(
            disc=dict(name="adam", learning_rate=4e-4, **adam),
            gen=dict(name="adam", learning_rate=1e-4, **adam),
        )
    else:
        config.res = 28
        sizes = dict(network="mlp", width=256, depth=3)
        config.loss = dict(game="nonsaturating", penalty="none", mismatch=0.0)
        config.loss.update(sentence=0.1, word=0.0)
        adam = dict(name="adam", learning_rate=2e-4, b1=0.5)
        config.optim = dict(disc=adam, gen=dict(adam))
    config.model = dict(gen=sizes, disc=dict(sizes))
    config.evaluators = dict(digits=dict(num_images=500))
    config.prompts = tuple(f"a handwritten {name}" for name in ("zero", "three", "five", "eight"))
    return common.shrink(config) if arg.debug else config
