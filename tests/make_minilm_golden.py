"""What transformers and torch say of MiniLM, for tests without torch.

python -m tests.make_minilm_golden      (needs torch; rewrites tests/goldens/minilm.npz)
"""

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parent / "goldens/minilm.npz"
LENGTH = 14
STRIDE = 8  # every eighth feature is stored; norms and products mix them all
CAPTIONS = (
    "a red circle",
    "A large Blue square, left of two small (green) triangles — naïve café!",
    "猫 and 🎨, crème brûlée",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
)


def oracle(folder, captions=CAPTIONS, length=LENGTH):
    """Token numbers, mask, and every hidden state, by transformers alone.   -> BL, BL, SBLD"""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    inputs = tokenizer(list(captions), **kind)
    with torch.inference_mode():
        model = transformers.AutoModel.from_pretrained(folder, dtype="float32").eval()
        states = model(**inputs, output_hidden_states=True).hidden_states
    text_BL, mask_BL = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    return text_BL, mask_BL.astype(bool), np.stack([state.numpy() for state in states])


if __name__ == "__main__":
    from t2i_jax.pretrained import hf

    text_BL, mask_BL, states_SBLD = oracle(hf.locate("minilm"))
    PATH.parent.mkdir(exist_ok=True)
    states = states_SBLD[..., ::STRIDE] * mask_BL[..., None]
    np.savez_compressed(PATH, text=text_BL.astype(np.int32), mask=mask_BL, states=states)
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
