"""Tokens written one after another, against transformers' `generate` on the same decoder.

python -m benchmarks.tokens [batch1] [guided] [lengths] [--check]

batch1   256 tokens of a GPT-2 with 25 M parameters, greedily. Parity: the tokens.
guided   the same for 8 rows, guided: both compute as many rows of a negative prompt beside them.
lengths  1,024 tokens against 256, both ours: `ratio` is how many times as long they take.

Ours is the loop that the token models draw with; transformers' is eager, with its dynamic cache.
"""

import functools
import pathlib

import numpy as np

from benchmarks import harness

VOCAB, PROMPT, SCALE = 1024, 8, 3.0
SIZES = dict(n_embd=64, n_layer=2, n_head=2) if harness.CHECK else {}
SIZES = dict(n_embd=512, n_layer=8, n_head=8) | SIZES
SHORT, LONG = (16, 64) if harness.CHECK else (256, 1024)


def make(folder: pathlib.Path) -> None:
    """A checkpoint as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(0)
    known = dict(vocab_size=VOCAB, n_positions=PROMPT + LONG, initializer_range=0.1)
    config = transformers.GPT2Config(**SIZES, **known, bos_token_id=0, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def prompts(batch: int):
    """Of each row its own, and one to be guided away from."""
    rng = np.random.default_rng(0)
    return rng.integers(0, VOCAB, (2, batch, PROMPT)).astype(np.int32)


def ours(batch: str, new: str, guided: str, folder: pathlib.Path) -> None:
    import jax
    import jax.numpy as jnp

    from t2i_jax.models import blocks
    from t2i_jax.pretrained import opener
    from t2i_jax.sampling import guidance, tokens

    given, negative = prompts(int(batch))
    rows = (lambda x, y: guidance.interleave(x, y)) if guided == "guided" else (lambda x, y: x)
    checkpoint = opener.open(str(folder))
    net = checkpoint.module()
    mask_BL = np.ones(given.shape, bool)
    variables = checkpoint.load(jax.eval_shape(net.init, jax.random.key(0), given, mask_BL))

    @jax.jit
    def write(variables, given, negative):
        text_RL = rows(given, negative)
        read = functools.partial(net.apply, variables, method="extend")
        empty = blocks.empty_cache(net, len(text_RL), PROMPT - 1)
        place_RL = jnp.broadcast_to(jnp.arange(PROMPT - 1), (len(text_RL), PROMPT - 1))
        _, cache = read(text_RL[:, :-1], place_RL, empty)

        def extend(token_B, i, cache):
            # The rows that lead away end as their own prompt says, and then go on as the others.
            last_B = jnp.where(i == PROMPT, negative[:, -1], token_B)
            logits_R1V, cache = read(rows(token_B, last_B)[:, None], i - 1, cache)
            logits_RV = logits_R1V[:, 0]
            return (guidance.mixed(logits_RV, SCALE) if guided == "guided" else logits_RV), cache

        choose = lambda logits_BV, i: jnp.argmax(logits_BV, -1).astype(jnp.int32)
        row_BN = jnp.pad(given, ((0, 0), (0, int(new))))
        return tokens.go_on(extend, choose, row_BN, cache, PROMPT)[:, PROMPT:]

    run = lambda: write(variables, given, negative)
    np.savez(folder / "ours.npz", tokens=run())
    harness.serve(run, "jax")


def peer(batch: str, new: str, guided: str, folder: pathlib.Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(harness.THREADS)
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    given, negative = (torch.from_numpy(x).long() for x in prompts(int(batch)))
    options = dict(max_new_tokens=int(new), do_sample=False, pad_token_id=0)
    if guided == "guided":
        options |= dict(guidance_scale=SCALE, negative_prompt_ids=negative)

    @torch.inference_mode()
    def run():
        mask = torch.ones_like(given)
        return model.generate(given, attention_mask=mask, **options)[:, PROMPT:]

    np.savez(folder / "peer.npz", tokens=run().numpy())
    harness.serve(run, "torch")


def against(batch: int, guided: str):
    arguments = str(batch), str(SHORT), guided
    amount = batch * SHORT
    yield harness.Case(
        f"tokens/batch{batch}{'/guided' * (guided == 'guided')}",
        *(("ours", *arguments), ("peer", *arguments), amount, ("make",)),
        tolerance=0.0,  # numbers of tokens: all are equal
    )


def lengths():
    arms = (("ours", "1", str(new), "alone") for new in (SHORT, LONG))
    yield harness.Case("tokens/1024 to 256", *arms, SHORT, ("make",), tolerance=None)


ARMS = {"make": make, "ours": ours, "peer": peer}
PARTS = {
    "batch1": functools.partial(against, 1, "alone"),
    "guided": functools.partial(against, 8, "guided"),
    "lengths": lengths,
}

if __name__ == "__main__":
    harness.main(PARTS, ARMS)
