"""Tokenizers opened without transformers give what its AutoTokenizer gives, or are left to it."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from t2i_jax import errors, files
from t2i_jax.pretrained import hf
from t2i_jax.text import fast, tokenize

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["red", "circle", "on", "the", "left", "blue", "é", "猫", "a", "b", "c", "1", "2", "!"]
_letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
LETTERS = _letters + [chr(256 + i) for i in range(256 - len(_letters))]
MERGES = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("c", "i"), ("ci", "r")]


def numbered(words):
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


def byte_pairs(*special, end=""):
    merged = ["".join(pair) for pair in MERGES]
    return numbered([*special, *LETTERS, *(c + end for c in LETTERS), *merged])


def bert(**options):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *WORDS, *map(str.upper, WORDS), *("##" + w for w in WORDS), "▁"]
    return transformers.BertTokenizer(vocab=numbered(words), **options)


def clip(**options):
    ends = "<|startoftext|>", "<|endoftext|>"
    vocab = numbered([*byte_pairs(end="</w>"), "red</w>", *ends])
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r")]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, **options)


def roberta(**options):
    vocab = byte_pairs("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    return transformers.RobertaTokenizer(vocab=vocab, merges=MERGES, **options)


def gpt2(**options):
    vocab = byte_pairs("<|endoftext|>")
    return transformers.GPT2Tokenizer(vocab=vocab, merges=MERGES, **options)


def t5(**options):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(word, -3.0) for word in WORDS] + [("▁" + word, -2.5) for word in WORDS]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return transformers.T5Tokenizer(vocab=pieces, **options)


def plain(**options):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered(["[UNK]", *WORDS]), "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.normalizer = tokenizers.normalizers.NFKC()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="a", **options
    )


CASES = {
    "bert": ("bert", bert, {}),
    "bert, cased": ("bert", bert, dict(do_lower_case=False, tokenize_chinese_chars=False)),
    "bert, accents": ("distilbert", bert, dict(strip_accents=False)),
    "clip": ("clip", clip, {}),
    "clip, other padding": ("clip_text_model", clip, dict(pad_token="!")),
    "roberta": ("roberta", roberta, {}),
    "roberta, space": ("roberta", roberta, dict(add_prefix_space=True, trim_offsets=False)),
    "gpt-2": ("gpt2", gpt2, {}),
    "gpt-2, padding": ("gpt2", gpt2, dict(pad_token="<|endoftext|>", add_prefix_space=True)),
    "t5": ("t5", t5, {}),
    "umt5": ("umt5", t5, {}),
    "its file alone": ("bert", plain, {}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A folder, what we open of it and what transformers does, and the words it knows."""
    model_type, make, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    make(**options).save_pretrained(folder)
    (folder / hf.CONFIG).write_text(json.dumps({"model_type": model_type}))
    (folder / hf.WEIGHTS).write_bytes(b"")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return folder, fast.open(folder), theirs


SPECIAL = ("<pad>", "[PAD]", "[SEP]", "</s>", "<mask>", "<|endoftext|>", "<|STARTOFTEXT|>", "[UNK]")
any_text = strategies.lists(
    strategies.sampled_from([*WORDS, *SPECIAL, " ", "RED", "<extra_id_3>", "ﬁ", "e\u0301", "👩"])
    | strategies.text(max_size=5),
    max_size=12,
).map("".join)


def test_it_opens_without_transformers(pair):
    _, ours, theirs = pair
    assert ours is not None
    opened, pad, end = ours
    assert (pad, end) == (theirs.pad_token_id or 0, theirs.eos_token_id)
    assert opened.get_vocab_size() == len(theirs)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(text=any_text)
def test_any_text_becomes_what_transformers_makes_of_it(pair, text):
    folder, (opened, *_), theirs = pair
    for special in (True, False):
        got = opened.encode(text, add_special_tokens=special)
        want = theirs.backend_tokenizer.encode(text, add_special_tokens=special)
        assert (got.ids, got.offsets) == (want.ids, want.offsets)
    tokenizer = tokenize.open(str(folder), 200)
    tokens, _ = tokenizer([text, "red"])
    ids = [row[mask].tolist() for row, mask in zip(*tokens, strict=True)]
    wanted = [theirs.decode(row, skip_special_tokens=True) for row in ids]
    assert tokenizer.decode(*tokens) == tokenizer.decode(ids) == wanted


def test_the_end_is_what_stands_behind_a_caption(pair):
    folder, _, theirs = pair
    tokenizer = tokenize.open(str(folder), 9)
    ((row,), (mask,)), _ = tokenizer(["red"])
    assert tokenizer.vocab_size == len(theirs)
    if theirs("red")["input_ids"] != theirs("red", add_special_tokens=False)["input_ids"]:
        assert row[mask][-1] == tokenizer.end
    else:
        assert tokenizer.end == theirs.eos_token_id
    assert set(row[~mask].tolist()) == {tokenizer.pad}


def test_rows_are_cut_and_padded_as_transformers_does(pair):
    folder, _, theirs = pair
    captions = ["a red circle on the left", "red", "a b c 1 2 ! red blue circle a b c"]
    theirs.pad_token = theirs.pad_token or theirs.eos_token
    for length in range(3, 12):  # a cut may come behind the mark of a word's start
        tokens, _ = tokenize.open(str(folder), length)(captions)
        want = theirs(captions, max_length=length, truncation=True, padding="max_length")
        mask_BL = tokens.mask_BL
        np.testing.assert_array_equal(mask_BL, np.array(want["attention_mask"], bool))
        np.testing.assert_array_equal(tokens.ids_BL[mask_BL], np.array(want["input_ids"])[mask_BL])


@pytest.mark.parametrize(
    "change",
    [
        dict(do_lower_case=False),
        dict(tokenize_chinese_chars=False),
        dict(cls_token="red"),
        dict(unk_token="[MASK]"),
        dict(additional_special_tokens=["<new>"]),
        dict(split_special_tokens=True),
        dict(add_bos_token=True),
        dict(tokenizer_class="XLNetTokenizer"),
    ],
)
def test_what_the_file_does_not_say_is_left_to_transformers(tmp_path, change):
    """The config beside it asks for something that transformers would put into the tokenizer."""
    bert().save_pretrained(tmp_path)
    (tmp_path / hf.CONFIG).write_text('{"model_type": "bert"}')
    path = tmp_path / fast.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert fast.open(tmp_path) is None


REGEXES = {
    **dict.fromkeys(
        ["(a+)+$", "(a|aa)*b", "a*a*a*b", "(x*|y)(x*|y)z", r"(a)\1", "(?<=a+)b"], False
    ),
    **dict.fromkeys([r"\s+", " {2,}", "'(?:[sdmt]|ll)| ?\\p{L}+|\\s+(?!\\S)|\\s+"], True),
}


@pytest.mark.parametrize(("regex", "fine"), REGEXES.items())
def test_only_regular_expressions_that_end_soon_are_read(regex, fine):
    assert fast._linear(regex) == fine


def grown(steps):
    one = dict(type="Replace", pattern={"String": "a"}, content="aaaaaaaa")
    return dict(normalizer=dict(type="Sequence", normalizers=[one] * steps))


HOSTILE = {
    "a growing normalizer": (grown(12), "times longer"),
    "a text of bytes of bytes": (
        dict(normalizer=dict(type="Sequence", normalizers=[dict(type="ByteLevel")] * 12)),
        "times longer",
    ),
    "a regular expression": (
        dict(pre_tokenizer=dict(type="Split", pattern={"Regex": "(a+)+$"}, behavior="Isolated")),
        "may take for ever",
    ),
    "words cut at random": (
        dict(model=dict(type="BPE", dropout=0.5, vocab={}, merges=[])),
        "random",
    ),
    "no model": (dict(model=[]), "no model"),
    "a long prefix": (
        dict(model=dict(type="BPE", continuing_subword_prefix="a" * 10**6, vocab={}, merges=[])),
        "characters",
    ),
    "numbers that are none": (
        dict(added_tokens=[{"id": -1, "content": "a"}]),
        "no tokenizer works",
    ),
    "a processor of nothing": (
        dict(post_processor=dict(type="RobertaProcessing", sep=["a", 2**40], cls=["b", 1])),
        "no tokenizer works",
    ),
    "a table of nothing": (
        dict(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA")),
        "no tokenizer works",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_a_clear_error(tmp_path, case):
    change, match = HOSTILE[case]
    plain().save_pretrained(tmp_path)
    (tmp_path / hf.CONFIG).write_text('{"model_type": "bert"}')
    (tmp_path / hf.WEIGHTS).write_bytes(b"")
    path = tmp_path / fast.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(errors.DataError, match=match):
        tokenize.open(str(tmp_path), 9)


@pytest.mark.parametrize("name", tokenize.FILES)
def test_no_file_of_a_tokenizer_is_read_that_is_too_large(tmp_path, name):
    (tmp_path / hf.CONFIG).write_text('{"model_type": "bert"}')
    (tmp_path / hf.WEIGHTS).write_bytes(b"")
    with (tmp_path / name).open("wb") as file:
        file.truncate(files.LIMIT + 1)  # takes no room on the disk
    with pytest.raises(errors.DataError, match=rf"bytes, more than .*{name}"):
        tokenize.open(str(tmp_path), 9)


class Panic(BaseException):
    """As the library's Rust half raises it."""


Panic.__name__ = "PanicException"


def test_a_panic_of_the_library_is_a_clear_error(tmp_path):
    def panics(texts, **options):
        raise Panic("index out of bounds")

    broken = type("Broken", (), {"encode_batch": staticmethod(panics)})
    with pytest.raises(errors.DataError, match="no tokenizer works: index out of bounds"):
        list(tokenize._encode_subwords(broken, tmp_path, ["a"]))
