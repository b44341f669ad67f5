"""Text encoders: against torch, in length buckets, cached, and what loading takes.

python -m benchmarks.text_encoders [torch] [buckets] [cached] [load] [--check]

torch    captions a second of ours and of transformers' models with torch's fused attention (SDPA),
         at the same padded shape, half of the tokens valid; random weights but for MiniLM's.
         Parity: the last states of valid tokens.
buckets  captions of shapes (10 to 30 tokens, as long as COCO's) encoded at their length as
         `data.cache` does, against all of them padded to 256 (T5) or 77 tokens (CLIP). The work is
         as many captions of their mean length.
cached   a training step that brings caption states from files, against one that needs no encoder as
         its states are always the same; the loader's work is part of both.
load     the peak of a process's memory over what it was before, over the checkpoint's size.
"""

import functools
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import cases, harness

COUNT = 8 if harness.CHECK else 64  # captions encoded in buckets
LAYERS = 1 if harness.CHECK else 4
RECORDS, STEPS_A_ROUND = (128, 1) if harness.CHECK else (2048, 8)
BASE = dict(vocab_size=30522, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
CASES = {  # name -> class of transformers (None: a checkpoint by name), its sizes, batch, tokens
    "minilm": (None, "minilm", 64, 32),
    "bert": ("BertModel", dict(**BASE, num_hidden_layers=LAYERS), 16, 64),
    "clip": (
        "CLIPTextModel",
        dict(**BASE | dict(vocab_size=49408), num_hidden_layers=LAYERS, hidden_act="quick_gelu"),
        16,
        77,
    ),
    "t5": (
        "T5EncoderModel",
        dict(
            **dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_heads=12),
            num_layers=LAYERS,
        )
        | dict(feed_forward_proj="gated-gelu"),
        8,
        256,
    ),
    "gpt2": ("GPT2Model", dict(n_embd=768, n_head=12, n_layer=LAYERS), 16, 64),
}


WHOLE = {"t5_base": ("T5EncoderModel", CASES["t5"][1] | dict(num_layers=3 * LAYERS))}  # for loading


def make(case: str, folder: pathlib.Path) -> None:
    """A checkpoint as transformers saves it."""
    import torch
    import transformers

    name, sizes, *_ = (CASES | WHOLE)[case]
    torch.manual_seed(0)
    model = getattr(transformers, name)
    model(model.config_class(**sizes)).save_pretrained(folder)


def source(case: str, folder: pathlib.Path) -> str:
    return CASES[case][1] if CASES[case][0] is None else str(folder)


def tokens(case: str):
    *_, batch, length = CASES[case]
    rng = np.random.default_rng(0)
    text_BL = rng.integers(5, 30000, (batch, length)).astype(np.int32)
    mask_BL = np.arange(length)[None] < rng.integers(1, length + 1, (batch, 1))
    return np.where(mask_BL, text_BL, 0), mask_BL


def prepared(name: str, length: int):
    """An encoder's jitted function of tokens, its weights loaded, and that of its operations."""
    import jax

    from t2i_jax.commands import plan
    from t2i_jax.pretrained import opener, text_encoder

    net = text_encoder.make(name)
    abstract = [jax.ShapeDtypeStruct((1, length), dtype) for dtype in ("int32", "bool")]
    shapes = jax.eval_shape(net.init, jax.random.key(0), *abstract)
    variables = jax.device_put(opener.load(name, shapes))
    apply = jax.jit(net.apply)
    count = lambda *tokens: plan.flops(jax.make_jaxpr(apply)(variables, *tokens))
    return functools.partial(apply, variables), count


def ours(case: str, folder: pathlib.Path) -> None:
    text_BL, mask_BL = tokens(case)
    encode, count = prepared(source(case, folder), text_BL.shape[1])
    seq_BLD = np.asarray(encode(text_BL, mask_BL).seq_BLD)
    np.savez(folder / "ours.npz", states=seq_BLD[mask_BL])
    harness.serve(lambda: encode(text_BL, mask_BL), "jax", flops=count(text_BL, mask_BL))


def peer(case: str, folder: pathlib.Path) -> None:
    import torch
    import transformers

    from t2i_jax.pretrained import hf

    torch.set_num_threads(harness.THREADS)
    name = CASES[case][0] or "AutoModel"
    path = hf.locate(source(case, folder))
    model = getattr(transformers, name).from_pretrained(path, attn_implementation="sdpa").eval()
    text_BL, mask_BL = tokens(case)
    batch = dict(
        input_ids=torch.from_numpy(text_BL).long(), attention_mask=torch.from_numpy(mask_BL).long()
    )

    def run():
        with torch.inference_mode():
            return model(**batch).last_hidden_state

    np.savez(folder / "peer.npz", states=run().numpy()[mask_BL])
    harness.serve(run, "torch")


def against_torch():
    for case, (model, *_, batch, _) in CASES.items():
        prepare = ("make", case) if model else ()
        arms = ("ours", case), ("peer", case)
        yield harness.Case(f"text_encoders/{case}", *arms, batch, prepare)


def captions_arm(case: str, folder: pathlib.Path, *, bucketed: bool) -> None:
    """Encodes COUNT captions; padded to the case's length, or in buckets."""
    import jax

    from t2i_jax.data import cache, shapes
    from t2i_jax.text import tokenize

    length = CASES[case][3]
    given = tokenize.open("minilm", length)  # its numbers are valid for every vocabulary here
    encode, count = prepared(str(folder), length)
    texts = list(dict.fromkeys(shapes.make(size=320, res=32).captions()))[:COUNT]

    class Data:
        """What the cache wants of a source."""

        captions = staticmethod(lambda: texts)
        __len__ = lambda self: len(texts)

    def run():
        pooled = np.empty((len(texts), net_width(case)), np.float16)
        if bucketed:
            rows = cache.Captions(Data(), given, batch=32)
            both = lambda b: encode(*b["text"])
            for row, found in zip(rows.order, rows.computed(both, rows.order), strict=True):
                pooled[row] = found["cond_pooled"]
        else:
            (text_NL, mask_NL), _ = given(texts)
            for i in range(0, len(texts), 32):
                found = cache.arrays(encode(text_NL[i : i + 32], mask_NL[i : i + 32]))
                pooled[i : i + 32] = jax.device_get(found)["cond_pooled"]
        return pooled

    np.savez(folder / f"{'ours' if bucketed else 'peer'}.npz", pooled=run())
    mean = round(given(texts)[0].mask_BL.sum(1).mean())
    shape = lambda dtype: jax.ShapeDtypeStruct((len(texts), mean), dtype)
    harness.serve(run, "jax", flops=count(shape("int32"), shape("bool")))


def net_width(case: str) -> int:
    sizes = CASES[case][1]
    return sizes.get("projection_dim") or sizes.get("hidden_size") or sizes.get("d_model")


def in_buckets():
    for case in ("t5", "clip"):
        name, arms = f"text_encoders/{case}/buckets", (("bucketed", case), ("padded", case))
        # the states are kept as float16
        yield harness.Case(name, *arms, COUNT, ("make", case), tolerance=5e-3)


def store(folder: pathlib.Path) -> None:
    """Writes the caption states that `step_arm` reads."""
    command = [sys.executable, "-m", "t2i_jax", "cache", "--config=configs/shapes_flow.py"]
    command += [f"--config.data.size={RECORDS}", f"--workdir={folder}/run"]
    subprocess.run(command, check=True)


def step_arm(folder: pathlib.Path, *, cached: bool) -> None:
    """Some steps of configs/shapes_flow.py, loader and all."""
    import jax

    from configs import shapes_flow
    from t2i_jax import loop
    from t2i_jax.commands import plan
    from t2i_jax.data import cache, inputs

    config = shapes_flow.get_config()
    config.model.model.update(cases.SIZES)
    config.data.size, config.steps = RECORDS, 100_000
    run = loop.Run(config, folder / "run")
    run.load_frozen()
    (kept,) = run.cached.values()
    states = cache.states(folder / "run" / kept.folder, *run.kept_rows())
    both, some = (*run.batches.inputs, states), [run.source[i] for i in range(64)]
    fixed = inputs.arrays(both, some, [None] * 64, np.arange(64))
    if cached:
        run.batches.inputs = both
    always = run.layout.place({key: fixed[key] for key in states.shapes})
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), run._example)
    state = jax.jit(run._init)(jax.random.key(0), zeros)
    stream = run.batches.iterate(0)

    def batch():
        arrays = run.layout.place(next(stream).arrays)
        return arrays if cached else arrays | always

    arguments = state, run.frozen, batch()
    products = plan.flops(jax.make_jaxpr(run.update)(*arguments))
    update = run.update.lower(*arguments).compile()

    def steps():
        nonlocal state
        for _ in range(STEPS_A_ROUND):
            state, _ = update(state, run.frozen, batch())
        return state

    harness.serve(steps, "jax", flops=products * STEPS_A_ROUND)


def cached_step():
    arms = ("cached",), ("without",)
    amount = STEPS_A_ROUND * 64
    yield harness.Case("text_encoders/cached_step", *arms, amount, ("store",), tolerance=None)


def load(folder: pathlib.Path) -> None:
    """Prints by how much loading raises a process's memory at most, bytes."""
    import jax

    from t2i_jax.pretrained import opener, text_encoder

    net = text_encoder.make(str(folder))
    tokens = [jax.ShapeDtypeStruct((1, 8), dtype) for dtype in ("int32", "bool")]
    shapes = jax.eval_shape(net.init, jax.random.key(0), *tokens)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
    status = pathlib.Path("/proc/self/status")
    kilobytes = lambda key: int(status.read_text().split(key)[1].split()[0])
    before = kilobytes("VmRSS:")
    jax.block_until_ready(opener.load(str(folder), shapes))
    print((kilobytes("VmHWM:") - before) * 1024)


def loading():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        harness.call(("make", "t5_base"), folder)
        size = (folder / "model.safetensors").stat().st_size
        started = time.perf_counter()
        peak = int(harness.call(("load",), folder).split()[-1])
        row = {"name": "text_encoders/load", "megabytes": round(size / 1e6, 1)}
        row |= {"peak": round(peak / size, 3), "seconds": round(time.perf_counter() - started, 1)}
        harness.report(row)
    yield from ()


ARMS = {
    "make": make,
    "ours": ours,
    "peer": peer,
    "bucketed": functools.partial(captions_arm, bucketed=True),
    "padded": functools.partial(captions_arm, bucketed=False),
    "store": store,
    "cached": functools.partial(step_arm, cached=True),
    "without": functools.partial(step_arm, cached=False),
    "load": load,
}
PARTS = {"torch": against_torch, "buckets": in_buckets, "cached": cached_step, "load": loading}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
