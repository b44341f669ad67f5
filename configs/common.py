"""Every key the training loop reads, and its default; a config adds its own assignments."""

import ml_collections

from t2i_jax import errors

SWITCHES = {"": True, **dict.fromkeys(("true", "1", "yes"), True)}  # text of an option -> value
SWITCHES |= dict.fromkeys(("false", "0", "no"), False)


def base() -> ml_collections.ConfigDict:
    """The default experiment: no objective, no data; a config file fills these in."""
    config = ml_collections.ConfigDict()
    config.objective = ""  # t2i_jax/objectives/<name>.py
    config.seed = 0
    config.res = 32  # pictures are res × res pixels
    config.size = ()  # or of this height and width, for families that learn rectangles
    config.steps = 1000  # optimiser steps in all; 0: what fits into `minutes` here, see loop.py
    config.minutes = 0.0  # of training, without compiling; the steps are fixed before the first
    config.batch_size = 64  # global, over all devices and processes
    config.accumulate = 1  # micro-batches per loss and step

    config.data = dict(source="shapes")  # t2i_jax/data/<source>.py and its options
    config.augment = ()  # names of t2i_jax/data/transforms.py
    config.bad_budget = 0.01  # share of broken examples that stops the run
    config.text_length = 32  # tokens a caption is padded or cut to
    config.load = dict()  # net -> where its weights come from: "minilm", or several with commas
    config.text = dict(dtype="float32")  # and a family's options: clip=dict(skip=1)
    config.lora = dict()  # net -> dict(rank=8): its adapter `<net>_lora` is trained, see lora.py
    config.int8 = ""  # frozen nets whose kernels are kept in eight bits: "text" or "text,vae"
    config.allow_random = False  # frozen nets without a source: only :debug configs
    config.cache = ""  # a prediction of the text alone, computed once per caption: "encode"

    config.model = dict()  # net -> its sizes: model=dict(backbone="unet", width=128)
    config.loss = dict()  # the objective's own numbers
    config.optim = dict()  # net -> dict(name=…, learning_rate=…, …), see t2i_jax/optim.py
    config.ema = dict()  # net -> decay of its parameters' moving average
    config.mesh = dict(data=-1)  # axis -> devices; -1: all that are left; "tensor" splits heads
    config.strategy = "data"  # pmap, data, zero1 or fsdp, see t2i_jax/sharding.py
    config.attention = "auto"  # over many tokens: xla, by_head, splash or cudnn, see sharding.py
    config.init_from = ""  # a run or exported model whose nets start this one

    config.sample = dict()  # default options of predict["sample"]
    config.prompts = ()  # drawn every sample_every steps into samples/; none: captions of the data
    config.evaluators = dict()  # t2i_jax/evaluators/<name>.py -> its options
    config.watch = dict()  # metric, such as "disc/gap" -> limit: beyond it a run has diverged
    config.rollbacks = 0  # how often a run that diverged may go back to a checkpoint before it
    config.log_every = 50
    config.save_every = 500
    config.save_minutes = 5.0  # save also when so many have passed since the last save; 0: never
    config.sample_every = 500
    config.eval_every = 0
    config.keep = 2  # checkpoints kept
    config.best = ""  # and that of the best evaluator/metric; "-evaluator/metric": of the least
    return config


def parse_arg(arg: str | None, **known) -> ml_collections.ConfigDict:
    """'debug,res=64' -> known options overwritten, each cast to its default's type.

    A comma that no option follows belongs to the text before it: "path=a,b" is a path.
    """
    options, parts = ml_collections.ConfigDict(known), []
    for part in filter(None, (arg or "").split(",")):
        before = parts[-1].partition("=")[0] if parts else ""
        if "=" not in part and part not in known and isinstance(known.get(before), str):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    for part in parts:
        name, _, value = part.partition("=")
        if name not in known:
            raise errors.unknown("config option", name, known, where=f"--config=…:{arg}")
        default = known[name]
        try:
            switch = isinstance(default, bool)
            options[name] = SWITCHES[value.lower()] if switch else type(default)(value)
        except (KeyError, ValueError) as e:
            raise errors.ConfigError(
                f"option {name}={value!r} is no {type(default).__name__}",
                where=f"--config=…:{arg}",
                fix=f"for example {name}={default!r}",
            ) from e
    return options


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same experiment on a laptop in seconds: tiny, random text encoder, nothing fetched."""
    config.steps, config.batch_size, config.res = 6, 8, min(config.res, 16)
    config.load = dict.fromkeys(config.load, "")  # a flag may name one
    config.text, config.allow_random, config.cache = dict(dtype="float32"), True, ""
    config.text_length, config.size = 16, ()
    small = dict(width=16, depth=1, reads=1, heads=2)
    for sizes in _parts(config.model):
        sizes.update({name: size for name, size in small.items() if name in sizes})
    config.log_every, config.save_every, config.sample_every = 2, 3, 0
    config.eval_every, config.evaluators, config.best = 0, {}, ""
    config.prompts = config.prompts[:2]
    return config


def _parts(sizes):
    """The dictionaries within one."""
    for part in sizes.values():
        if hasattr(part, "items"):
            yield part
            yield from _parts(part)
