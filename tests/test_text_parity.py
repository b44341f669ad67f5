"""Against transformers and torch, which share no code with us; skipped where torch is missing."""

import jax
import numpy as np
import pytest

from t2i_jax.pretrained import hf, opener, text_encoder
from tests import make_minilm_golden as golden

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KIND = dict(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=9,
    pad_token_id=0,
)


def states(source, text_BL, mask_BL):
    net = text_encoder.make(str(source))
    variables = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    both = lambda v, *tokens: (net.apply(v, *tokens, method="states"), net.apply(v, *tokens))
    return jax.jit(both)(opener.load(str(source), variables), text_BL, mask_BL)


def check(got_states, want_states, mask_BL):
    for got, want in zip(got_states, want_states, strict=True):
        np.testing.assert_allclose(got[mask_BL], want[mask_BL], atol=1e-5, rtol=0)


def test_every_layer_of_minilm():
    folder = hf.locate("minilm")
    text_BL, mask_BL, want_SBLD = golden.oracle(folder)
    assert len(set(mask_BL.sum(1))) > 2  # of unequal length
    got, cond = states("minilm", text_BL, mask_BL)
    check(got, want_SBLD, mask_BL)
    mean_BD = (want_SBLD[-1] * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdims=True)
    np.testing.assert_allclose(cond.pooled_BD, mean_BD, atol=1e-5, rtol=0)


def test_the_stored_golden_is_what_torch_says_today():
    text_BL, mask_BL, want_SBLD = golden.oracle(hf.locate("minilm"))
    stored = np.load(golden.PATH)
    np.testing.assert_array_equal(stored["text"], text_BL)
    want = want_SBLD[..., :: golden.STRIDE] * mask_BL[..., None]
    np.testing.assert_allclose(stored["states"], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("head", "dtype", "options"),
    [
        ("BertModel", "float32", {}),
        ("BertModel", "float16", dict(hidden_act="gelu_new", layer_norm_eps=1e-5)),
        ("BertModel", "bfloat16", dict(hidden_act="relu", type_vocab_size=1)),
        ("BertForMaskedLM", "float32", {}),
        ("BertForPreTraining", "float32", dict(num_hidden_layers=1)),
        ("BertForSequenceClassification", "float32", {}),
    ],
)
def test_random_bert_as_transformers_saves_it(tmp_path, head, dtype, options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**KIND | options)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():  # biases and norms start as constants: make each count
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / hf.INDEX).exists()
    text_BL = np.random.default_rng(0).integers(0, 31, (3, 9)).astype(np.int32)
    mask_BL = np.arange(9) < np.array([9, 4, 1])[:, None]
    with torch.inference_mode():
        want = getattr(model, "bert", model).float()(
            torch.tensor(text_BL), torch.tensor(mask_BL).long(), output_hidden_states=True
        )
    got, _ = states(tmp_path, text_BL, mask_BL)
    check(got, [state.numpy() for state in want.hidden_states], mask_BL)
