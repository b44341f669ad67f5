"""Every family of text encoders against what transformers and torch compute.

Stored results need no torch; where it is importable, it computes them again, and with
--update-golden stores them.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from t2i_jax.pretrained import gpt2, opener, text_encoder

GOLDEN = pathlib.Path(__file__).parent / "goldens"
SPEAKER = "gpt-2, speaking"
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
    SPEAKER: ("GPT2LMHeadModel", GPT2 | dict(n_positions=80, n_layer=3)),
}


def torch_model(case):
    """A network of transformers with its own first weights."""
    transformers = pytest.importorskip("transformers")
    name, options = CASES[case]
    if name == "CLIPModel":
        vision = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, image_size=8)
        vision |= dict(num_attention_heads=3, patch_size=4)
        config = transformers.CLIPConfig(
            text_config=options, vision_config=vision, projection_dim=options["projection_dim"]
        )
    else:
        config = getattr(transformers, name).config_class(**options)
    return getattr(transformers, name)(config)


def numbers(shapes):
    """Weights of which each counts, biases and norms, too: the same wherever they are made."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    return {
        name: 0.15 * draw(shape) + (len(shape) == 1 and name.endswith("weight"))
        for name, shape in sorted(shapes.items())
    }


def write(folder, config, shapes):
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: np.asarray(v, np.float32) for k, v in numbers(shapes).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def batch():
    """Captions of unequal length: 9, 4 and 1 tokens, the last of each the end."""
    lengths = np.array([9, 4, 1])
    text_BL = np.random.default_rng(0).integers(3, VOCAB - 1, (3, LENGTH)).astype(np.int32)
    mask_BL = np.arange(LENGTH) < lengths[:, None]
    text_BL[np.arange(3), lengths - 1] = END
    return text_BL, mask_BL


def by_torch(case, folder):
    """Saves a network as transformers does, gives it our numbers; what it then computes."""
    torch = pytest.importorskip("torch")
    model = torch_model(case)
    model.save_pretrained(folder)
    saved = safetensors.numpy.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: x.shape for name, x in saved.items() if x.dtype.kind == "f"}
    write(folder, config, shapes)
    model = type(model).from_pretrained(folder).eval()
    name, options = CASES[case]
    text_BL, mask_BL = batch()
    text_BL = np.where(mask_BL, text_BL, options.get("pad_token_id", 0))
    with torch.inference_mode():
        if case == SPEAKER:
            return config, shapes, {"said": torch_says(model, text_BL, mask_BL)}
        inner = model
        for part in ("encoder",) if "T5" in name else ("roberta", "transformer", "text_model"):
            inner = getattr(inner, part, inner) if name != "DistilBertModel" else model
        out = inner(
            input_ids=torch.tensor(text_BL).long(),
            attention_mask=torch.tensor(mask_BL).long(),
            output_hidden_states=True,
        )
        want = {f"state_{i:02}": x.numpy() for i, x in enumerate(out.hidden_states)}
        if "CLIP" in name:
            want[f"state_{len(want):02}"] = out.last_hidden_state.numpy()
            project = getattr(model, "text_projection", lambda x: x)
            want["pooled"] = project(out.pooler_output).numpy()
    return config, shapes, want


def torch_says(model, text_BL, mask_BL):
    """The likeliest 64 tokens after each caption, one caption at a time."""
    torch = pytest.importorskip("torch")
    options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    said = []
    for ids, mask in zip(text_BL, mask_BL, strict=True):
        ids = torch.tensor(ids[mask][None]).long()
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        said.append(whole[0, ids.shape[1] :].numpy())
    return np.array(said)


def by_golden(case, folder):
    stored = json.loads((GOLDEN / "text_families.json").read_text())[case]
    write(folder, stored["config"], stored["shapes"])
    with np.load(GOLDEN / "text_families.npz") as arrays:
        return {k.split("/")[1]: v for k, v in arrays.items() if k.split("/")[0] == case}


def update(case, config, shapes, want):
    path = GOLDEN / "text_families.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stored | {case: {"config": config, "shapes": shapes}}, indent=1))
    path = path.with_suffix(".npz")
    arrays = dict(np.load(path)) if path.exists() else {}
    np.savez_compressed(path, **arrays | {f"{case}/{k}": v for k, v in want.items()})


@pytest.fixture(scope="module", params=CASES)
def stored(request, tmp_path_factory):
    """A network's folder and what torch computed with it, as it was stored."""
    folder = tmp_path_factory.mktemp("encoder")
    return str(folder), by_golden(request.param, folder)


@pytest.fixture(scope="module", params=CASES)
def computed(request, tmp_path_factory, update_golden):
    """A network's folder and what torch computes with it now."""
    folder = tmp_path_factory.mktemp("encoder")
    config, shapes, want = by_torch(request.param, folder)
    if update_golden:
        update(request.param, config, shapes, want)
    return str(folder), want


@functools.cache
def program(source, dtype):
    """Variables of an encoder, and its jitted function: variables, tokens -> states, Cond."""
    text_BL, mask_BL = batch()
    net = text_encoder.make(source, dtype=dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    both = lambda v, *tokens: (net.apply(v, *tokens, method="states"), net.apply(v, *tokens))
    return opener.load(source, shapes), jax.jit(both)


def compute(source, text_BL, mask_BL, dtype="float32"):
    variables, apply = program(source, dtype)
    return apply(variables, text_BL, mask_BL)


def check_states(source, want):
    text_BL, mask_BL = batch()
    got, cond = compute(source, text_BL, mask_BL)
    states = [want[k] for k in sorted(want) if k.startswith("state")]
    assert len(got) == len(states)
    for ours, theirs in zip(got, states, strict=True):
        scale = np.abs(theirs[mask_BL]).max()
        np.testing.assert_allclose(ours[mask_BL], theirs[mask_BL], atol=1e-5 * scale, rtol=0)
    if "pooled" in want:
        scale = np.abs(want["pooled"]).max()
        np.testing.assert_allclose(cond.pooled_BD, want["pooled"], atol=1e-5 * scale, rtol=0)


def check_said(source, want):
    """Rows of unequal length at once."""
    text_BL, mask_BL = batch()
    net = text_encoder.make(source)
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    says = lambda v, t, m: gpt2.generate(
        net, v, t, m, jax.random.key(0), new=64, end=VOCAB, temperature=0
    )
    got_BN, alive_BN = jax.jit(says)(opener.load(source, shapes), text_BL, mask_BL)
    assert alive_BN.all()
    np.testing.assert_array_equal(got_BN, want)
    assert len(np.unique(got_BN)) > 3  # not one word for ever


def check(source, want):
    check_said(source, want["said"]) if "said" in want else check_states(source, want)


def test_every_layer_is_what_torch_computed(stored):
    check(*stored)


def test_every_layer_is_what_torch_computes(computed):
    check(*computed)


def test_bfloat16_is_near(stored):
    source, _ = stored
    text_BL, mask_BL = batch()
    got, _ = compute(source, text_BL, mask_BL, "bfloat16")
    exact, _ = compute(source, text_BL, mask_BL)
    error = np.abs(np.asarray(got[-1], np.float32) - exact[-1])[mask_BL]
    assert error.mean() <= 2e-2 * np.abs(exact[-1][mask_BL]).mean()


def test_padding_changes_no_valid_state(stored):
    source, _ = stored
    text_BL, mask_BL = batch()
    other_BL = np.where(mask_BL, text_BL, 5)
    for ours, theirs in zip(
        *(compute(source, t, mask_BL)[0] for t in (text_BL, other_BL)), strict=True
    ):
        np.testing.assert_array_equal(ours[mask_BL], theirs[mask_BL])


def test_gpt2_draws_only_what_it_may_and_stops_at_the_end(tmp_path):
    by_golden(SPEAKER, tmp_path)
    text_BL, _ = batch()
    mask_BL = np.ones(text_BL.shape, bool)
    net = text_encoder.make(str(tmp_path))
    shapes = jax.eval_shape(net.init, jax.random.key(0), text_BL, mask_BL)
    variables, options = opener.load(str(tmp_path), shapes), dict(new=20, end=3)
    draw = lambda seed, **more: jax.device_get(
        gpt2.generate(net, variables, text_BL, mask_BL, jax.random.key(seed), **options, **more)
    )
    greedy, _ = draw(0, temperature=0)
    np.testing.assert_array_equal(draw(1, top_k=1)[0], greedy)
    all_of = draw(4, top_k=10**6)[0]  # more than there are
    np.testing.assert_array_equal(all_of, draw(4, top_k=0)[0])
    np.testing.assert_array_equal(draw(2, top_p=1e-6)[0], greedy)
    text_BN, alive_BN = draw(3, temperature=3.0)
    assert (text_BN != greedy).any()
    assert (alive_BN[:, 1:] <= alive_BN[:, :-1]).all()
    assert (text_BN[~alive_BN] == 3).all()
    assert (text_BN[alive_BN] != 3).all()
