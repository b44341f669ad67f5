"""Every family of text encoders against transformers and torch; skipped where torch is missing."""

import jax
import numpy as np
import pytest

from t2i_jax.text import encoder, gpt2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, END = 37, 9, 36
T5 = dict(vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3)
CLIP = dict(
    **dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2),
    **dict(num_attention_heads=3, max_position_embeddings=LENGTH, projection_dim=10),
    **dict(eos_token_id=END, bos_token_id=1, pad_token_id=0),
)
GPT2 = dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=LENGTH)
BERT = dict(
    **dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3),
    **dict(intermediate_size=40, max_position_embeddings=LENGTH, pad_token_id=0),
)
DISTIL = dict(vocab_size=VOCAB, dim=24, n_layers=2, n_heads=3, hidden_dim=40)
ROBERTA = BERT | dict(pad_token_id=1, max_position_embeddings=LENGTH + 2, type_vocab_size=1)

CASES = {  # name -> torch's class, its config
    "roberta": ("RobertaModel", ROBERTA),
    "xlm-r": ("XLMRobertaModel", ROBERTA),
    "xlm-r with a head": ("XLMRobertaForMaskedLM", ROBERTA),
    "distilbert": ("DistilBertModel", DISTIL | dict(max_position_embeddings=LENGTH)),
    "t5 1.0": ("T5EncoderModel", T5 | dict(feed_forward_proj="relu")),
    "t5 1.1": ("T5EncoderModel", T5 | dict(feed_forward_proj="gated-gelu")),
    "t5 with its decoder": ("T5ForConditionalGeneration", T5 | dict(feed_forward_proj="relu")),
    "t5, few buckets": ("T5EncoderModel", T5 | dict(relative_attention_num_buckets=8)),
    "mt5": ("MT5EncoderModel", T5),
    "umt5": ("UMT5EncoderModel", T5),
    "clip, quick": ("CLIPTextModel", CLIP | dict(hidden_act="quick_gelu")),
    "clip, projected": ("CLIPTextModelWithProjection", CLIP | dict(hidden_act="gelu")),
    "clip, old end": ("CLIPTextModelWithProjection", CLIP | dict(eos_token_id=2)),
    "clip, both towers": ("CLIPModel", CLIP),
    "gpt-2": ("GPT2Model", GPT2),
    "gpt-2 with a head": ("GPT2LMHeadModel", GPT2),
}


def config_of(name, options):
    if name == "CLIPModel":
        vision = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, image_size=8)
        vision |= dict(num_attention_heads=3, patch_size=4)
        return transformers.CLIPConfig(
            text_config=options, vision_config=vision, projection_dim=options["projection_dim"]
        )
    return getattr(transformers, name).config_class(**options)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """A random network as transformers saves it, what it computes, and a batch of captions."""
    name, options = CASES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config_of(name, options)).eval()
    with torch.no_grad():  # biases and norms start as constants: make each count
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    lengths = np.array([9, 4, 1])
    text_BL = np.random.default_rng(0).integers(3, VOCAB - 1, (3, LENGTH)).astype(np.int32)
    mask_BL = np.arange(LENGTH) < lengths[:, None]
    text_BL[np.arange(3), lengths - 1] = END
    text_BL[~mask_BL] = options.get("pad_token_id", 0)
    inner = model
    for part in ("encoder",) if "T5" in name else ("roberta", "transformer", "text_model"):
        inner = getattr(inner, part, inner)
    if name == "DistilBertModel":
        inner = model
    tokens = dict(
        input_ids=torch.tensor(text_BL).long(), attention_mask=torch.tensor(mask_BL).long()
    )
    with torch.inference_mode():
        out = inner(**tokens, output_hidden_states=True)
        states = [x.numpy() for x in out.hidden_states]
        pooled = None
        if "CLIP" in name:
            states.append(out.last_hidden_state.numpy())
            pooled = out.pooler_output
            if hasattr(model, "text_projection"):
                pooled = model.text_projection(pooled)
            pooled = pooled.numpy()
    return str(folder), text_BL, mask_BL, states, pooled


def compute(source, text_BL, mask_BL, dtype="float32"):
    net = encoder.make(source, dtype=dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    both = lambda v, *tokens: (net.apply(v, *tokens, method="states"), net.apply(v, *tokens))
    return jax.jit(both)(encoder.load(source, shapes), text_BL, mask_BL)


def test_every_layer_is_what_torch_computes(saved):
    source, text_BL, mask_BL, want, pooled = saved
    got, cond = compute(source, text_BL, mask_BL)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        scale = np.abs(theirs[mask_BL]).max()
        np.testing.assert_allclose(ours[mask_BL], theirs[mask_BL], atol=1e-5 * scale, rtol=0)
    if pooled is not None:
        scale = np.abs(pooled).max()
        np.testing.assert_allclose(cond.pooled_BD, pooled, atol=1e-5 * scale, rtol=0)


def test_bfloat16_is_near(saved):
    source, text_BL, mask_BL, want, _ = saved
    got, _ = compute(source, text_BL, mask_BL, "bfloat16")
    error = np.abs(np.asarray(got[-1], np.float32) - want[-1])[mask_BL]
    assert error.mean() <= 2e-2 * np.abs(want[-1][mask_BL]).mean()


def test_padding_changes_no_valid_state(saved):
    source, text_BL, mask_BL, _, _ = saved
    other_BL = np.where(mask_BL, text_BL, 5)
    for ours, theirs in zip(
        *(compute(source, t, mask_BL)[0] for t in (text_BL, other_BL)), strict=True
    ):
        np.testing.assert_array_equal(ours[mask_BL], theirs[mask_BL])


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2 | dict(n_positions=80, n_layer=3))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("speaker")
    model.save_pretrained(folder)
    text_BL = np.random.default_rng(0).integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    net = encoder.make(str(folder))
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, text_BL > -1)
    return model, net, encoder.load(str(folder), shapes), text_BL


def test_gpt2_says_what_torch_says_token_for_token(speaker):
    """Rows of unequal length at once against torch's one at a time."""
    model, net, variables, text_BL = speaker
    lengths = np.array([9, 4, 1])
    mask_BL = np.arange(LENGTH) < lengths[:, None]
    said = jax.jit(
        lambda v, t, m: gpt2.generate(
            net, v, t, m, jax.random.key(0), new=64, end=VOCAB, temperature=0
        )
    )
    got_BN, alive_BN = said(variables, text_BL, mask_BL)
    assert alive_BN.all()
    for row, n in enumerate(lengths):
        ids = torch.tensor(text_BL[row : row + 1, :n]).long()
        options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        np.testing.assert_array_equal(got_BN[row], want[0, n:].numpy())
    assert len(np.unique(got_BN)) > 3  # not one word for ever


def test_gpt2_draws_only_what_it_may_and_stops_at_the_end(speaker):
    _, net, variables, text_BL = speaker
    mask_BL = np.ones(text_BL.shape, bool)
    options = dict(new=20, end=3)
    draw = lambda seed, **more: jax.device_get(
        gpt2.generate(net, variables, text_BL, mask_BL, jax.random.key(seed), **options, **more)
    )
    greedy, _ = draw(0, temperature=0)
    np.testing.assert_array_equal(draw(1, top_k=1)[0], greedy)
    np.testing.assert_array_equal(draw(2, top_p=1e-6)[0], greedy)
    text_BN, alive_BN = draw(3, temperature=3.0)
    assert (text_BN != greedy).any()
    assert (alive_BN[:, 1:] <= alive_BN[:, :-1]).all()
    assert (text_BN[~alive_BN] == 3).all()
    assert (text_BN[alive_BN] != 3).all()
