"""Trains a tiny transformer under every strategy on eight simulated devices; prints one JSON line.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.on_eight_devices [--long]
"""

import functools
import json
import math
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from configs import (
    digits_mlp_gan,
    finetune,
    finetune_lora,
    shapes_ar,
    shapes_masked,
    shapes_recurrent,
    shapes_tokenizer,
    shapes_transformer,
    shapes_vae,
)
from t2i_jax import loop, losses, objective, optim, pipeline, sharding, step, weights
from t2i_jax.commands import plan
from t2i_jax.models import attention
from t2i_jax.models.types import Cond, Tokens
from t2i_jax.pretrained import folder, opener, text_encoder
from t2i_jax.quality import extractor
from t2i_jax.run import checkpoint, fingerprint
from tests import folders, runs, test_text_families, test_vits

QUICK = {
    "one": dict(mesh={"data": 1}),
    "pmap": dict(strategy="pmap"),
    "zero1": dict(strategy="zero1"),
    "fsdp": dict(strategy="fsdp"),
    "fsdp/2": dict(strategy="fsdp", accumulate=2),
    "tensor": dict(mesh={"data": 4, "tensor": 2}),
}
LONG = {
    "one": dict(mesh={"data": 1}),
    "data": {},
    "data/2": dict(accumulate=2),
    "zero1/2": dict(strategy="zero1", accumulate=2),
    "tensor fsdp": dict(mesh={"data": 4, "tensor": 2}, strategy="fsdp"),
    "bfloat16": dict(mesh={"data": 1}, dtype="bfloat16"),
    "uneven one": dict(mesh={"data": 1}, width=36),
    "uneven fsdp": dict(strategy="fsdp", width=36),  # 36 divides by 4, and a matrix by 4 × 2
    "uneven zero1": dict(strategy="zero1", width=36),
}

DENOISERS = {  # by what of theirs the tensor axis splits
    "unet": dict(
        _class_name="UNet2DConditionModel",
        block_out_channels=(8, 12),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "pixart": dict(
        _class_name="PixArtTransformer2DModel",
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=3,
        use_additional_conditions=False,
    ),
    "sd3": dict(
        _class_name="SD3Transformer2DModel",
        num_layers=3,
        attention_head_dim=6,
        num_attention_heads=2,
        caption_projection_dim=12,
        pos_embed_max_size=7,
        in_channels=3,
        out_channels=3,
    ),
    "flux": dict(
        _class_name="FluxTransformer2DModel",
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        axes_dims_rope=(2, 6, 4),
        guidance_embeds=True,
    ),
}


class Case:
    """A run's parts, without a loop."""

    def __init__(
        self,
        mesh=None,
        strategy="data",
        accumulate=1,
        batch_size=16,
        lora=None,
        abstract=False,
        start=None,
        **model,
    ):
        """start: a state in host memory, in place of a new one, which takes time to compile."""
        config = shapes_transformer.get_config("debug")
        config.lora = lora or {}
        config.batch_size = batch_size
        config.model.model.update({**dict(width=32, heads=4, mlp_ratio=2.0), **model})
        config.optim = {"model": {"name": "adamw", "learning_rate": 1e-3}}
        config.loss.time_std = 0.5
        family = objective.make(config)
        (self.net,) = family.trained
        optimisers = {self.net: optim.make(config.optim.model, steps=10, where="")}
        mesh = mesh or {"data": -1}
        alone = jax.devices()[:1] if mesh == {"data": 1} else None
        self.layout = sharding.Layout(mesh, strategy, devices=alone)
        init = functools.partial(step.init, family, optimisers, {self.net: 0.9})
        batch, key = (
            runs.abstract_batch(config),
            jax.random.key(0),
        )
        self.shapes = jax.eval_shape(init, key, batch)
        placed = self.layout.state(self.shapes)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), batch)
        frozen = _text() if not lora else weights.frozen(family, config)
        self.frozen = jax.device_put(frozen, self.layout.nets(frozen))
        if abstract:
            self.state = sharding.on(self.shapes, placed)
        elif start is None:
            self.state = jax.jit(init, out_shardings=placed)(key, zeros)
        else:
            self.state = jax.device_put(start, placed)
        rng = np.random.default_rng(0)
        n, size, length = config.batch_size, batch["image"].shape, batch["text"].ids_BL.shape
        self.batch = self.layout.place(
            {
                "image": rng.normal(size=size).astype(np.float32),
                "text": Tokens(
                    rng.integers(1, 200, length).astype(np.int32),
                    np.arange(length[1])[None] < rng.integers(1, 16, n)[:, None],
                ),
                "index": np.arange(n, dtype=np.int32),
                "weight": np.r_[0, np.ones(n - 1)].astype(np.float32),  # a broken example
            }
        )
        update = step.make_update(
            family, optimisers, ema={self.net: 0.9}, accumulate=accumulate, layout=self.layout
        )
        update = jax.jit(update, donate_argnums=0, out_shardings=(placed, self.layout.whole))
        self.compiled = update.lower(self.state, self.frozen, self.batch).compile()

    def train(self, steps=3):
        """The first step's metrics and the parameters in the end."""
        first = None
        for _ in range(steps):
            self.state, values = self.compiled(self.state, self.frozen, self.batch)
            first = first or {k: float(v) for k, v in values.items()}
        return first, jax.device_get(self.state.nets[self.net]["params"])


@functools.cache
def _text():
    """The text encoder of debug configs, with random weights, in host memory."""
    config = shapes_transformer.get_config("debug")
    return jax.device_get(weights.frozen(objective.make(config), config))


def main():
    sharding.SMALL = 0  # so that these small arrays are split over two axes, too
    fingerprint.SMALL = 0  # and summed where they lie
    found, oracles, starts = {}, {}, {}
    long = "--long" in sys.argv
    for name, options in (LONG if long else QUICK).items():
        alike = name in ("one", "zero1", "fsdp")  # to the bit, wherever they are drawn
        case = Case(**options, start=None if alike else starts.get(str(options.get("width"))))
        starts.setdefault(
            str(options.get("width")), jax.tree.map(np.array, jax.device_get(case.state))
        )
        arrays = jax.tree.leaves(case.state)
        held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        memory = case.compiled.memory_analysis()
        moved = plan.traffic(case.compiled.as_text())
        prints = fingerprint.of(case.state.nets)[0] if alike else {}
        kernels = jax.tree_util.tree_leaves_with_path(case.state.nets["model"]["params"])
        tensor = [fingerprint.path_of(p) for p, x in kernels if "tensor" in x.sharding.spec]
        types = sorted({str(x.dtype) for x in jax.tree.leaves(case.state)})
        first, params = case.train()
        oracle = oracles.setdefault(options.get("width"), params)
        parameters = sum(x.nbytes for x in jax.tree.leaves(params))
        found[name] = {
            "loss": first["model/loss"],
            "grad_norm": first["model/grad_norm"],
            "difference": _difference(params, oracle),
            "held": held / sum(x.nbytes for x in arrays),
            "donated": memory.alias_size_in_bytes,
            "state_bytes": held,
            "parameter_bytes": parameters,
            "collectives": {kind: found.bytes for kind, found in moved.items()},
            "reductions": moved["all-reduce"].count if "all-reduce" in moved else 0,
            "fingerprint": prints,
            "split_kernels": sorted(path.removesuffix("/Dense_0/kernel") for path in tensor),
            "types": types,
        }
    if long:
        found |= _remat("fsdp ", strategy="fsdp") | _remat(mesh={"data": 1}, run=False)
        found |= _denoisers() | _scan() | _draw() | _pipeline() | _lora() | _features()
        found |= _contrast() | _families() | _finetune()
        found |= _encoders("roberta", "t5 1.1", "clip, projected", "gpt-2")
    else:
        found |= _encoders("umt5") | _guided() | _attention()
    print(json.dumps(found))


def _remat(place="", *, run=True, **options) -> dict:
    """The step of eight layers, with and without; without `run` it is only compiled."""
    found, deep = {}, dict(batch_size=16, depth=8, patch=1, scan=True)
    for name, policy in (("no remat", "none"), ("remat", "full")):
        case = Case(**options, **deep, remat=policy, abstract=not run)
        gathered = plan.traffic(case.compiled.as_text()).get("all-gather")
        seen = found[place + name] = {
            "temporaries": case.compiled.memory_analysis().temp_size_in_bytes,
            "gathered": gathered.bytes if gathered else 0,
            "parameter_bytes": sum(
                math.prod(x.shape) * 4 for x in jax.tree.leaves((case.shapes.nets, case.frozen))
            ),
        }
        if run:
            seen["loss"] = case.train(1)[0]["model/loss"]
    return found


def _lora() -> dict:
    """Adapters of a scanned net under remat, on one device and split over all."""
    found = {}
    for name, options in {"one": dict(mesh={"data": 1}), "fsdp": dict(strategy="fsdp")}.items():
        case = Case(**options, depth=4, scan=True, remat="full", lora={"model": {"rank": 2}})
        moved = plan.traffic(case.compiled.as_text())
        values, params = case.train()
        found[name] = {
            "loss": values["model_lora/loss"],
            "reduced": sum(moved[k].bytes for k in ("all-reduce", "reduce-scatter") if k in moved),
            "frozen_bytes": sum(x.nbytes for x in jax.tree.leaves(case.frozen["model"])),
        }
        found[name]["difference"] = _difference(params, first := found.setdefault("params", params))
    del found["params"], first
    return {"lora": found}


def _encoders(*cases) -> dict:
    """Pretrained encoders, loaded in parts and computed on all devices and on one."""
    found, layout = {}, sharding.Layout({"data": -1}, "fsdp")
    rows = lambda x: np.resize(x, (8, *x.shape[1:]))
    text_BL, mask_BL = map(rows, test_text_families.batch())
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            test_text_families.by_golden(case, pathlib.Path(folder))
            net = text_encoder.make(folder)
            shapes = {"text": jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)}
            split = sharding.on(shapes, layout.nets(shapes))
            nets = {"text": opener.load(folder, split["text"])}
            whole = {"text": opener.load(folder, shapes["text"])}
        apply = lambda nets, *batch, net=net: net.apply(nets["text"], *batch)
        spread = lambda nets, *batch, run=apply: run(layout.gather(nets), *layout.spread(batch))
        one, all_ = (
            jax.device_get(jax.jit(f)(n, text_BL, mask_BL)._replace(mask_BL=0))
            for f, n in ((apply, whole), (spread, nets))
        )
        arrays = jax.tree.leaves(nets)
        found[case] = {
            "difference": _difference(all_, one),
            "held": sum(x.addressable_shards[0].data.nbytes for x in arrays)
            / sum(x.nbytes for x in arrays),
            "equal": fingerprint.of(nets)[0] == fingerprint.of(jax.device_put(whole))[0],
        }
    return {"encoders": found}


def _features() -> dict:
    """Of pictures, shared out over the devices, and of each by one device."""
    pictures = [np.full((14, 14, 3), 30 * i, np.uint8) for i in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        test_vits.by_golden("clip", pathlib.Path(folder))
        all_ = extractor.Extractor(folder)(pictures, ["pooled"])["pooled"]
        net = opener.open(folder).module()
        image_BHWC = np.stack(pictures) / np.float32(127.5) - 1
        shapes = jax.eval_shape(net.init, jax.random.key(0), image_BHWC)
        one = jax.jit(net.apply)(opener.load(folder, shapes), image_BHWC).pooled_BD
    return {"features": {"difference": _difference(all_, np.asarray(one))}}


def _attention() -> dict:
    """Gradients through kernels for many tokens, each device with its examples and heads."""
    found, rng = {}, np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 8, 40, 2, 8)).astype(np.float32)
    given = q, k, v, np.arange(40)[None] < rng.integers(1, 40, (8, 1))
    fn = lambda q, k, v, mask: jnp.sin(attention.attention(q, k, v, mask_BS=mask)).sum()
    gradients = jax.grad(fn, (0, 1, 2))
    plain = jax.device_get(jax.jit(gradients)(*given))
    attention.LARGE, attention._splash = 0, functools.partial(attention._splash, interpret=True)
    layouts = {
        "data": sharding.Layout({"data": -1}),
        "tensor fsdp": sharding.Layout({"data": 4, "tensor": 2}, "fsdp"),
        "pmap": sharding.Layout({"data": 4, "tensor": 2}, "pmap"),
    }
    for name, layout in layouts.items():
        spec = layout.batch.spec
        by_hand = functools.partial(
            jax.shard_map, mesh=layout.mesh, axis_names=set(layout.batch_axes), check_vma=False
        )
        run = by_hand(gradients, in_specs=spec, out_specs=spec) if name == "pmap" else gradients
        for kernel in ("by_head", "splash"):
            attention.BEST = {"cpu": kernel}
            placed = jax.device_put(given, layout.batch)
            compiled = jax.jit(layout.context()(run)).lower(*placed).compile()
            found[f"{name}, {kernel}"] = {
                "difference": _difference(jax.device_get(compiled(*placed)), plain),
                "moved": sorted(plan.traffic(compiled.as_text())),
            }
    return {"attention": found}


def _contrast() -> dict:
    """InfoNCE over the global batch, split over all devices and on one."""
    rng, layout = np.random.default_rng(0), sharding.Layout({"data": -1})
    given = {"image": rng.normal(size=(16, 8)), "text": rng.normal(size=(16, 8))}
    given = {name: x.astype(np.float32) for name, x in given.items()}
    batch = given | {"weight": np.arange(16, dtype=np.float32) % 3}

    def value(batch):
        apart = ~np.eye(16, dtype=bool)
        return losses.info_nce(batch["image"] @ batch["text"].T, apart, batch["weight"])

    one = jax.jit(jax.value_and_grad(value))(batch)
    all_ = jax.jit(jax.value_and_grad(value))(layout.place(batch))
    return {"contrast": {"difference": _difference(jax.device_get(all_), jax.device_get(one))}}


def _families() -> dict:
    """Two steps of each family, split over eight devices, and on one."""
    gan = digits_mlp_gan.get_config("debug")
    gan.loss.update(game="relativistic", spectral_norm=True, penalty="exact", mismatch=0.5)
    gan.loss.sentence = 0.0
    configs = {"gan": gan, "vae": shapes_vae.get_config("debug")}
    configs["recurrent"] = shapes_recurrent.get_config("debug")
    for kind in ("kl", "vq"):
        configs[kind] = shapes_tokenizer.get_config(f"debug,{kind}")
    for name, option in (("ar", ""), ("joint", ",joint")):
        configs[name] = shapes_ar.get_config(f"debug{option}")
    configs["masked"] = shapes_masked.get_config("debug")
    return {name: {"difference": _split(config)} for name, config in configs.items()}


def _split(config) -> float:
    """How far trained nets and averages are from one device's after two steps of fsdp."""
    config.batch_size = 16
    family, states = objective.make(config), []
    spec = dict(name="sgd", learning_rate=1e-2)
    optimisers = {name: optim.make(spec, steps=10, where="") for name in family.trained}
    ema = dict.fromkeys(family.trained[:1], 0.9)
    init = functools.partial(step.init, family, optimisers, ema)
    rng = np.random.default_rng(0)
    drawn = {"float32": lambda shape: rng.normal(size=shape), "bool": lambda shape: np.ones(shape)}
    drawn["int32"] = lambda shape: rng.integers(1, 200, shape)
    batch = jax.tree.map(
        lambda x: drawn[str(x.dtype)](x.shape).astype(x.dtype),
        runs.abstract_batch(config),
    )
    index = np.arange(16, dtype=np.int32)
    batch |= {"index": index, "weight": (index != 5).astype(np.float32)}
    frozen = jax.device_get(weights.frozen(family, config))
    for layout in (
        sharding.Layout({"data": 1}, devices=jax.devices()[:1]),
        sharding.Layout({"data": -1}, "fsdp"),
    ):
        placed = layout.state(jax.eval_shape(init, jax.random.key(0), batch))
        state = jax.jit(init, out_shardings=placed)(jax.random.key(0), batch)
        nets = jax.device_put(frozen, layout.nets(frozen))
        update = step.make_update(family, optimisers, ema=ema, layout=layout)
        update = jax.jit(update, out_shardings=(placed, layout.whole))
        for _ in range(2):
            state, values = update(state, nets, layout.place(batch))
        losses_ = [values[name] for name in sorted(values) if name.endswith("/loss")]
        states.append(jax.device_get((state.nets, state.ema, losses_)))
    return _difference(*states)


def _finetune() -> dict:
    """Two steps of a pretrained pipeline, whole and by adapters: what they change under each
    strategy against one device; and whether the state that one saved is, under the next, the same.
    """
    found = {}
    for kind, module, strategies in (
        ("whole", finetune, ("one", "data", "zero1", "fsdp")),
        ("adapters", finetune_lora, ("one", "fsdp")),
    ):
        runs_, states, changes = {}, {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for name in strategies:
                config = module.get_config("debug")
                config.strategy = "data" if name == "one" else name
                for spec in config.optim.values():
                    # Adam would take the sign of gradients that are noise.
                    spec.update(name="sgd", learning_rate=1.0, decay="constant", warmup=0)
                    if "weight_decay" in spec:
                        del spec["weight_decay"]
                devices = jax.devices()[:1] if name == "one" else None
                run = runs_[name] = loop.Run(config, pathlib.Path(folder, name), devices)
                run.load_frozen()
                state = run.fresh_state()
                start = jax.tree.map(np.array, state.nets)
                for n in range(2):
                    batch = run.layout.place(run.batches.batch(n).arrays)
                    state, values = run.update(state, run.frozen, batch)
                changes[name] = jax.tree.map(lambda x, y: np.array(x) - y, state.nets, start)
                checkpoints = checkpoint.Checkpoints(run.workdir)
                checkpoints.save(state, {})
                checkpoints.close()
                states[name] = jax.tree.map(np.array, state)
                arrays = jax.tree.leaves(state)
                held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
                found[f"{kind} {name}"] = {
                    "loss": next(float(v) for k, v in values.items() if k.endswith("/loss")),
                    "difference": _difference(changes[name], changes["one"]),
                    "held": held / sum(x.nbytes for x in arrays),
                }
            for (name, run), other in zip(runs_.items(), [*runs_][1:] + ["one"], strict=True):
                there = runs_[other]
                target = sharding.on(there.shapes, there.layout.state(there.shapes))
                checkpoints = checkpoint.Checkpoints(run.workdir)
                state = checkpoints.restore(2, target)
                checkpoints.close()
                same = jax.tree.map(lambda x, y: np.array_equal(x, y), state, states[name])
                placed = all(
                    x.sharding.is_equivalent_to(s.sharding, x.ndim)
                    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True)
                )
                found[f"{kind} {name}"]["restored"] = all(jax.tree.leaves(same)) and placed
    return {"finetune": found}


def _draw() -> dict:
    """Pictures of one device and of a net split over eight."""
    config = shapes_transformer.get_config("debug")
    config.loss.prediction = "v"
    pictures = []
    for layout in (None, sharding.Layout({"data": -1}, "fsdp")):
        predictor = pipeline.Predictor(config, layout=layout)
        zeros = jax.tree.map(
            lambda s: np.zeros(s.shape, s.dtype),
            runs.abstract_batch(config),
        )
        nets = jax.jit(predictor.objective.init)(jax.random.key(0), zeros)
        nets = jax.tree.map(lambda x: x + 0.02, nets)  # as after some training
        nets = jax.device_put(nets, layout.nets(nets)) if layout else nets
        pictures.append(predictor.sample(nets, ["a red circle"] * 8, steps=3).astype(int))
    a, b = pictures
    return {"draw": {"difference": int(np.abs(a - b).max()), "spread": int(np.ptp(a))}}


def _pipeline() -> dict:
    """A pretrained pipeline's pictures of one device, of all, and of one split over all."""
    captions = ["a red circle", "a ring"] * 4
    config, options = weights.config_at(str(folder.TINY)), dict(steps=3, guidance=4.0)
    one = pipeline.Predictor(config)
    batch, found = one.batch(caption=captions), {}
    nets = dict(weights.imported(one.objective, config))
    alone = np.asarray(one.run("sample", nets, batch, **options))
    few = one.sample(nets, captions[:3], **options).astype(int)
    for strategy in ("data", "fsdp"):
        pipe = pipeline.Pipeline.load(str(folder.TINY), strategy=strategy)
        drawn = pipe(captions[:3], **options).astype(int)
        together = pipe.predictor.run("sample", pipe.nets, batch, seed=[0] * 8, **options)
        arrays, placed = jax.tree.leaves(pipe.nets), pipe.predictor.batch(caption=captions)
        compiled = pipe.predictor.trace("sample", pipe.nets, placed, **options).lower().compile()
        found[strategy] = {
            "difference": float(np.abs(together - alone).max()),
            "few": int(np.abs(drawn - few).max()),
            # A batch of as many as there are devices: the program of eight captions.
            "programs": pipe.predictor._bind("sample", options)[0]._cache_size(),
            "held": sum(x.addressable_shards[0].data.nbytes for x in arrays)
            / sum(x.nbytes for x in arrays),
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "bytes": sum(x.nbytes for x in arrays),
        }
    found["watched"] = _watched(captions, options)
    frugal = pipeline.Pipeline.load(str(folder.TINY), strategy="fsdp", low_memory=True)
    found["low memory"] = int(np.abs(frugal(captions[:3], **options).astype(int) - few).max())
    sliced = pipe.predictor.trace("sample", pipe.nets, placed, **options, sliced=True)
    found["sliced"] = plan.traffic(sliced.lower().compile().as_text())["all-gather"].bytes
    found["at once"] = plan.traffic(compiled.as_text())["all-gather"].bytes
    return {"pipeline": found | {"spread": float(np.ptp(alone))}}


def _watched(captions, options) -> int:
    """How far pictures drawn step by step are from those of one program.

    What a scanned network prepares begins with its two layers, which eight devices do not divide.
    """
    with tempfile.TemporaryDirectory() as name:
        folders.save(folders.pixart, name)
        pipe = pipeline.Pipeline.load(name, strategy="data")
        draw = functools.partial(pipe.predictor.sample, pipe.nets, captions, **options)
        once, steps = draw().astype(int), []
        watched = draw(watch=lambda step, z_BHWC: steps.append(step))
    assert steps == [1, 2, 3]
    return int(np.abs(watched - once).max())


def _guided() -> dict:
    """Collectives of whole draws from a batch that is split, by the options."""
    found, layout = {}, sharding.Layout({"data": -1})
    config = shapes_transformer.get_config("debug")
    predictor = pipeline.Predictor(config, layout=layout)
    nets = weights.abstract_nets(predictor.objective, config)
    batch = weights.abstract_batch(predictor.objective, 16)
    nets = sharding.on(nets, layout.nets(nets))
    batch = sharding.on(batch, jax.tree.map(lambda _: layout.batch, batch))
    for name, options in {"always": {}, "at times": {"interval": (0.2, 0.7)}}.items():
        compiled = predictor.trace("sample", nets, batch, **options).lower().compile()
        moved = plan.traffic(compiled.as_text())
        found[name] = {kind: [m.count, m.bytes] for kind, m in moved.items()}
    found["picture_bytes"] = 16 * config.res**2 * 3 * 4
    return {"guided": found}


def _denoisers() -> dict:
    """Gradients of pretrained denoisers on 4 × 2 devices, the second the tensor axis."""
    layout = sharding.Layout({"data": 4, "tensor": 2})
    return {"denoisers": {name: _denoiser(config, layout) for name, config in DENOISERS.items()}}


def _denoiser(config, layout) -> dict:
    module = opener.families()[config["_class_name"]].from_config(config, scan=True)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    cond = Cond(normal(8, 5, 12), np.ones((8, 5), bool), normal(8, 9), normal(8, 1))
    data = (normal(8, 8, 8, module.channels), np.linspace(10, 900, 8, dtype=np.float32), cond)
    shapes = jax.eval_shape(module.init, jax.random.key(1), *data)
    params = jax.tree.map(lambda s: 0.3 * normal(*s.shape), shapes)
    loss = lambda params, *data: (module.apply(params, *data) ** 2).mean()
    where = layout.nets({"model": params})["model"]
    placed = jax.device_put((params, *data), (where, *[layout.batch] * len(data)))
    wanted, found = (jax.device_get(jax.jit(jax.grad(loss))(*x)) for x in ((params, *data), placed))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / largest), wanted, found)
    split = sum("tensor" in s.spec for s in jax.tree.leaves(where))
    return {"difference": max(jax.tree.leaves(apart)), "split": split}


def _scan() -> dict:
    """The same weights, stacked: one step's parameters against those of separate layers."""
    plain, scanned = Case({"data": 1}, depth=2), Case({"data": 1}, depth=2, scan=True)

    def stack(params):
        rest = {k: v for k, v in params.items() if not k.startswith(("blocks_", "kvs_"))}
        for name in ("blocks", "kvs"):
            layers = [params[f"{name}_{i}"] for i in range(2)]
            rest[f"{name}_0"] = jax.tree.map(lambda *xs: np.stack(xs), *layers)
        return rest

    stacked = {"model": {"params": stack(jax.device_get(plain.state.nets["model"]["params"]))}}
    nets = jax.device_put(stacked, scanned.layout.whole)
    scanned.state = scanned.state._replace(nets=nets, ema={"model": nets["model"]["params"]})
    scanned.state = jax.tree.map(jax.numpy.copy, scanned.state)
    _, one = plain.train(1)
    _, two = scanned.train(1)
    return {"scan": {"difference": _difference(two, stack(one))}}


def _difference(params, oracle) -> float:
    """The largest difference, as a share of the largest weight."""
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(oracle), strict=True))
    return float(
        max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)
    )


if __name__ == "__main__":
    main()
