"""Text encoders: against torch, in length buckets, cached, and what loading takes.

python -m benchmarks.text_encoders [torch] [buckets] [cached] [load]     (default: all four)

torch    captions a second of ours and of transformers' models with torch's fused attention (SDPA),
         at the same padded shape, half of the tokens valid; random weights but for MiniLM's.
         Parity: the last states of valid tokens.
buckets  captions of shapes (10 to 30 tokens, as long as COCO's) encoded at their length as
         `data.cache` does, against all of them padded to 256 (T5) or 77 tokens (CLIP).
cached   a training step that brings caption states from files, against one that needs no encoder as
         its states are always the same; the loader's work is part of both.
load     the peak of a process's memory over what it was before, over the checkpoint's size.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import harness

COUNT = 64  # captions encoded in buckets
BASE = dict(vocab_size=30522, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
CASES = {  # name -> class of transformers (None: a checkpoint by name), its sizes, batch, tokens
    "minilm": (None, "minilm", 64, 32),
    "bert": ("BertModel", dict(**BASE, num_hidden_layers=4), 16, 64),
    "clip": (
        "CLIPTextModel",
        dict(**BASE | dict(vocab_size=49408), num_hidden_layers=4, hidden_act="quick_gelu"),
        16,
        77,
    ),
    "t5": (
        "T5EncoderModel",
        dict(**dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_heads=12), num_layers=4)
        | dict(feed_forward_proj="gated-gelu"),
        8,
        256,
    ),
    "gpt2": ("GPT2Model", dict(n_embd=768, n_head=12, n_layer=4), 16, 64),
}


WHOLE = {"t5_base": ("T5EncoderModel", CASES["t5"][1] | dict(num_layers=12))}  # for loading


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
    """An encoder's jitted function of tokens, its weights loaded."""
    import jax

    from t2i_jax.text import encoder

    net = encoder.make(name)
    abstract = [jax.ShapeDtypeStruct((1, length), dtype) for dtype in ("int32", "bool")]
    shapes = jax.eval_shape(net.init, jax.random.key(0), *abstract)
    variables = jax.device_put(encoder.load(name, shapes))
    apply = jax.jit(net.apply)
    return lambda text_BL, mask_BL: apply(variables, text_BL, mask_BL)


def ours(case: str, folder: pathlib.Path) -> None:
    import jax

    text_BL, mask_BL = tokens(case)
    encode = prepared(source(case, folder), text_BL.shape[1])
    seq_BLD = np.asarray(encode(text_BL, mask_BL).seq_BLD)
    np.savez(folder / "ours.npz", states=seq_BLD[mask_BL])
    run = lambda: jax.block_until_ready(encode(text_BL, mask_BL)) and None
    harness.serve({"versions": {"jax": jax.__version__}}, run)


def peer(case: str, folder: pathlib.Path) -> None:
    import torch
    import transformers

    from t2i_jax import hf

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
    harness.serve({"versions": {"torch": torch.__version__}}, lambda: run() is None or None)


def against_torch() -> None:
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            if CASES[case][0]:
                harness.call("benchmarks.text_encoders", "--make", case, name)
            a, b = (
                harness.Arm("benchmarks.text_encoders", x, case, name) for x in ("--ours", "--peer")
            )
            same = harness.parity(folder / "ours.npz", folder / "peer.npz")
            harness.compare(f"text_encoders/{case}", a, b, same, amount=CASES[case][2])
            a.close()
            b.close()


def captions_arm(case: str, folder: pathlib.Path, *, bucketed: bool) -> None:
    """Encodes COUNT captions; padded to the case's length, or in buckets."""
    import jax

    from t2i_jax.data import cache, shapes
    from t2i_jax.text import tokenize

    length = CASES[case][3]
    given = tokenize.open("minilm", length)  # its numbers are valid for every vocabulary here
    encode = prepared(str(folder), length)
    texts = list(dict.fromkeys(shapes.make(size=320, res=32).captions()))[:COUNT]

    class Data:
        """What the cache wants of a source."""

        captions = staticmethod(lambda: texts)
        __len__ = lambda self: len(texts)

    def run():
        pooled = np.empty((len(texts), net_width(case)), np.float16)
        if bucketed:
            found = cache._Captions(Data(), given)
            both = lambda b: encode(b["text"], b["mask"])
            for row, _, pooled_P in found.states(both, found.order, 32):
                pooled[row] = pooled_P
        else:
            text_NL, mask_NL, _ = given(texts)
            for i in range(0, len(texts), 32):
                found = cache.arrays(encode(text_NL[i : i + 32], mask_NL[i : i + 32]))
                pooled[i : i + 32] = jax.device_get(found)["cond_pooled"]
        return pooled

    np.savez(folder / f"{'ours' if bucketed else 'peer'}.npz", pooled=run())
    harness.serve({"versions": {"jax": jax.__version__}}, lambda: run() is None or None)


def net_width(case: str) -> int:
    sizes = CASES[case][1]
    return sizes.get("projection_dim") or sizes.get("hidden_size") or sizes.get("d_model")


def in_buckets() -> None:
    for case in ("t5", "clip"):
        with tempfile.TemporaryDirectory() as name:
            harness.call("benchmarks.text_encoders", "--make", case, name)
            a, b = (
                harness.Arm("benchmarks.text_encoders", x, case, name)
                for x in ("--bucketed", "--padded")
            )
            folder = pathlib.Path(name)
            same = harness.parity(folder / "ours.npz", folder / "peer.npz", 5e-3)  # of float16
            harness.compare(f"text_encoders/{case}/buckets", a, b, same, amount=COUNT)
            a.close()
            b.close()


def step_arm(folder: pathlib.Path, *, cached: bool) -> None:
    """Eight steps of configs/shapes_flow.py, loader and all."""
    import jax

    from configs import shapes_flow
    from t2i_jax import loop
    from t2i_jax.data import cache

    config = shapes_flow.get_config()
    config.data.size, config.steps = 2048, 100_000
    run = loop.Run(config, folder / "run")
    run.load_frozen()
    stored = cache.extra(folder / "run" / cache.FOLDER, *run.caption_states())
    captions = [run.source[i]["caption"] for i in range(64)]
    fixed = stored(np.arange(64), run.predictor.tokenize(captions).mask_BL)
    run.batches.extra = stored if cached else None
    always = run.layout.place(fixed)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), run._example)
    state = jax.jit(run._init)(jax.random.key(0), zeros)
    stream = run.batches.iterate(0)
    compiled = None

    def steps():
        nonlocal state, compiled
        for _ in range(8):
            batch = run.layout.place(next(stream).arrays)
            batch = batch if cached else batch | always
            compiled = compiled or run.update.lower(state, run.frozen, batch).compile()
            state, _ = compiled(state, run.frozen, batch)
        jax.block_until_ready(state)

    steps()
    harness.serve({"versions": {"jax": jax.__version__}}, steps)


def cached_step() -> None:
    with tempfile.TemporaryDirectory() as name:
        harness.call(
            "t2i_jax.data.cache",
            "--config=configs/shapes_flow.py",
            "--config.data.size=2048",
            f"--workdir={name}/run",
        )
        a, b = (
            harness.Arm("benchmarks.text_encoders", x, "step", name)
            for x in ("--cached", "--without")
        )
        harness.compare("text_encoders/cached_step", a, b, None, amount=8 * 64)
        a.close()
        b.close()


LOAD = """
import pathlib, sys, jax
from t2i_jax.text import encoder
net = encoder.make(sys.argv[1])
tokens = [jax.ShapeDtypeStruct((1, 8), dtype) for dtype in ("int32", "bool")]
shapes = jax.eval_shape(net.init, jax.random.key(0), *tokens)
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
jax.block_until_ready(jax.numpy.zeros(8) + 1)
shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
status = lambda key: int(pathlib.Path("/proc/self/status").read_text().split(key)[1].split()[0])
before = status("VmRSS:")
jax.block_until_ready(encoder.load(sys.argv[1], shapes))
print(status("VmHWM:") - before)
"""


def loading() -> None:
    with tempfile.TemporaryDirectory() as name:
        harness.call("benchmarks.text_encoders", "--make", "t5_base", name)
        size = (pathlib.Path(name) / "model.safetensors").stat().st_size
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", LOAD, name],
            env=harness.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        peak = int(done.stdout.split()[-1]) * 1024
        print(
            json.dumps(
                {
                    "name": "text_encoders/load",
                    "megabytes": round(size / 1e6, 1),
                    "peak": round(peak / size, 3),
                    "seconds": round(time.perf_counter() - started, 1),
                }
            ),
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] and sys.argv[1].startswith("--"):
        arm, case, folder = sys.argv[1].removeprefix("--"), sys.argv[2], pathlib.Path(sys.argv[3])
        if arm in ("cached", "without"):
            step_arm(folder, cached=arm == "cached")
        elif arm in ("bucketed", "padded"):
            captions_arm(case, folder, bucketed=arm == "bucketed")
        else:
            {"make": make, "ours": ours, "peer": peer}[arm](case, folder)
        return
    parts = {
        "torch": against_torch,
        "buckets": in_buckets,
        "cached": cached_step,
        "load": loading,
    }
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
