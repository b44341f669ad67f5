"""Opens a tokenizer.json with the library `tokenizers` alone.

transformers takes seconds to import and brings torch along. It builds a tokenizer anew from its
vocabulary, by its class and tokenizer_config.json. Where the parts in tokenizer.json are the same,
the file alone gives the same tokens. This module decides whether they are.
"""

import base64
import json
import re

from t2i_jax import errors
from t2i_jax.pretrained import hf

FILE, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GROWTH = 1000  # largest factor by which a caption may grow before it is cut into tokens
# By normalizer, the largest factor by which a text can grow.
_GROWTHS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 4}
_GROWTHS["ByteLevel"] = 4  # each byte becomes a character of up to two bytes
_AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend")  # classes that use the file as it is
_REGISTERED = {  # model_type -> class, where the files name none
    **dict.fromkeys(("bert", "distilbert"), "BertTokenizer"),
    **{"roberta": "RobertaTokenizer", "gpt2": "GPT2Tokenizer", "umt5": "TokenizersBackend"},
    **dict.fromkeys(("clip", "clip_text_model"), "CLIPTokenizer"),
    **dict.fromkeys(("t5", "mt5"), "T5Tokenizer"),
}
_BPE = dict(dropout=None, continuing_subword_prefix="", fuse_unk=False, byte_fallback=False)


def open(folder):
    """The tokenizer that transformers' AutoTokenizer would make of a folder.

    Returns:
      (the library's tokenizer, the id of the padding token, that of the end of a text or None). It
      is None where only transformers itself can make the tokenizer.
    Raises:
      DataError: tokenizer.json is broken, or could take unbounded memory or time.
    """
    if not (folder / FILE).is_file():
        return None
    data = check(folder / FILE)
    own = hf.read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "added_tokens_decoder" not in own and (folder / SPECIAL).is_file():
        own |= hf.read_json(folder / SPECIAL)
    # In a pipeline the network's config.json lies elsewhere.
    config = hf.read_json(folder / hf.CONFIG) if (folder / hf.CONFIG).is_file() else {}
    name = _class(own, config)
    if name not in (*_AS_IT_IS, *_CLASSES) or own.get("split_special_tokens"):
        return None
    # With these transformers writes another post-processor than the file's.
    if any(own.get(key) is not None for key in ("add_bos_token", "add_eos_token")):
        return None
    parts, special = _CLASSES.get(name, (None, {}))
    named = {key: own[key] for key in own if key.endswith("_token") and _is_token(own[key])}
    special = {key: _text(token) for key, token in (special | named).items() if token is not None}
    if own.get("extra_ids", 100) != 100 or (folder / "added_tokens.json").is_file():
        return None
    if not _same_added(data, own, special):
        return None
    import tokenizers

    opened = tokenizers.Tokenizer.from_file(str(folder / FILE))
    if parts and not _same_parts(opened, data, parts(own, special, opened.token_to_id)):
        return None
    if "pad_token" not in special and opened.padding:
        special["pad_token"] = opened.padding["pad_token"]
    number = lambda kind: opened.token_to_id(special.get(kind, ""))
    return opened, number("pad_token") or 0, number("eos_token")


def check(path) -> dict:
    """Reads a tokenizer.json and checks that it takes bounded memory and time for any caption.

    The file may come from a stranger, and its parts are small programs.

    Raises:
      DataError: it is broken, or its parts are not bounded.
    """
    data = hf.read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(data.get("added_tokens", []), list):
        raise _unbounded(path, "it has no model")
    growth = 1.0
    for part in _walk([value for key, value in data.items() if key != "model"]):
        regex = part.get("Regex")
        if isinstance(regex, str) and not _linear(regex):
            raise _unbounded(path, f"its regular expression {regex[:100]!r} may take for ever")
    for part in _walk([data.get("normalizer"), data.get("pre_tokenizer")]):
        growth *= _growth(part)
        if growth > GROWTH:
            raise _unbounded(path, f"its parts make a caption over {GROWTH} times longer")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if len(str(model.get(name))) > 100:
            raise _unbounded(path, f"{name} has {len(str(model[name]))} characters")
    # WordPiece takes quadratic time in the length of a word.
    if (model.get("max_input_chars_per_word") or 0) > 1000 or model.get("dropout"):
        raise _unbounded(path, "its words are too long, or cut at random")
    return data | {"added_tokens": data.get("added_tokens", [])}


def _unbounded(path, what):
    return errors.DataError(
        what, where=str(path), fix="use the tokenizer.json that came with the published weights"
    )


def _walk(value):
    """Yields all objects inside a value of JSON, itself included."""
    rest = [value]  # a list and no recursion: the file decides how deep it goes
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield value
        rest += (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )


def _growth(part) -> float:
    """The largest factor by which a normalizer can make a text longer."""
    kind, content = part.get("type"), part.get("content")
    if kind == "Replace":
        # A pattern may match beside every character, and put the content there.
        return max(1.0, 1.0 + len(str(content)))
    if kind == "Prepend":
        return 1.0 + len(str(part.get("prepend")))
    if kind == "Precompiled":
        # SentencePiece's format: the length of a trie in four bytes, the trie, and the
        # replacements. Each of these ends with a zero byte, and the longest bounds the growth.
        blob = base64.b64decode(str(part.get("precompiled_charsmap")))
        table = blob[4 + int.from_bytes(blob[:4], "little") :]
        return max(map(len, table.split(b"\0")), default=1.0)
    return _GROWTHS.get(kind, 1.0)


def _linear(regex: str) -> bool:
    """Whether matching takes time in proportion to the text. True only where that is certain."""
    # A repetition inside another one, or two in one alternative, can take exponential or quadratic
    # time. Classes and escapes count as one character, and groups without repetition as well.
    plain = re.sub(r"\\p\{\w+\}|\\[^\d]", "x", regex)
    plain = re.sub(r"\[[^\[\]]*\]", "x", plain)
    if len(regex) > 300 or plain.count("|") > 20 or re.search(r"\)[*+{]|\\|\(\?<|\[", plain):
        return False
    while plain != (plain := re.sub(r"\([^()*+{]*\)", "x", plain)):
        pass  # from the innermost group outwards
    return "(" not in plain and all(len(re.findall("[*+{]", one)) <= 1 for one in plain.split("|"))


def _class(own, config) -> str | None:
    """The name of the class that AutoTokenizer would choose, without "Fast"."""
    registered = _REGISTERED.get(config.get("model_type"))
    name = own.get("tokenizer_class") or config.get("tokenizer_class") or registered
    if registered in _AS_IT_IS and name != registered:
        return registered
    name = str(name).removesuffix("Fast")
    return "BertTokenizer" if name == "DistilBertTokenizer" else name


def _is_token(value) -> bool:
    return value is None or isinstance(value, str | dict)


def _text(token) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _same_added(data, own, special) -> bool:
    """Whether transformers would have the same added tokens as the file."""
    # Names with an underscore in front, such as __type, are notes of transformers' own.
    flags = lambda token: {"special": False} | {k: v for k, v in token.items() if k[0] != "_"}
    added = {token["id"]: flags(token) for token in data["added_tokens"]}
    theirs = own.get("added_tokens_decoder")
    if (
        theirs is not None
        and {int(i): flags(t) | {"id": int(i)} for i, t in theirs.items()} != added
    ):
        return False
    wanted = set(special.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = own.get(key) or []
        wanted.update(map(_text, more.values() if isinstance(more, dict) else more))
    return wanted <= {token["content"] for token in added.values()}


def _same_parts(opened, data, wanted) -> bool:
    """Whether the file has the parts that transformers would make for its class."""
    model = wanted.pop("model")
    kind = model.pop("type")
    has = lambda name: getattr(opened.model, name, data["model"].get(name))
    if type(opened.model).__name__ != kind or any(has(k) != v for k, v in model.items()):
        return False
    for name, part in wanted.items():
        own = getattr(opened, name)
        own = json.loads(own.__getstate__()) if own else None  # with all defaults filled in
        # T5's table of characters comes from the vocabulary, so the file's own is the right one.
        if name == "normalizer" and part == "precompiled":
            part = own if not own or own["type"] == "Precompiled" else part
        if name == "post_processor" and part["type"] == "TemplateProcessing" and own:
            own.pop("pair", None)  # captions come alone
        if own != part:
            return False
    return True


def _template(number, *tokens):
    """The post-processor of single captions. None among the tokens stands for the caption."""
    special = [token for token in tokens if token]
    piece = lambda t: {"SpecialToken": {"id": t, "type_id": 0}}
    caption = {"Sequence": {"id": "A", "type_id": 0}}
    return dict(
        type="TemplateProcessing",
        single=[piece(token) if token else caption for token in tokens],
        special_tokens={t: dict(id=t, ids=[number(t)], tokens=[t]) for t in special},
    )


def _bytes(**options):
    return dict(type="ByteLevel", trim_offsets=True, use_regex=True) | options


# The parts that transformers makes for each class. Arguments: tokenizer_config.json, the special
# tokens by role, and a function from a token to its id.


def _bert(own, special, number):
    return dict(
        model=dict(
            type="WordPiece",
            continuing_subword_prefix="##",
            unk_token=special["unk_token"],
            max_input_chars_per_word=100,
        ),
        normalizer=dict(
            type="BertNormalizer",
            clean_text=True,
            handle_chinese_chars=own.get("tokenize_chinese_chars", True),
            strip_accents=own.get("strip_accents"),
            lowercase=own.get("do_lower_case", True),
        ),
        pre_tokenizer=dict(type="BertPreTokenizer"),
        post_processor=_template(number, special["cls_token"], None, special["sep_token"]),
    )


def _ends(special, number, before, after, **options):
    pair = lambda token: [special[token], number(special[token])]
    return dict(type="RobertaProcessing", sep=pair(after), cls=pair(before)) | options


def _gpt2(own, special, number):
    space = own.get("add_prefix_space", False)
    return dict(
        model=dict(type="BPE", end_of_word_suffix="", unk_token=None, **_BPE),
        normalizer=None,
        pre_tokenizer=_bytes(add_prefix_space=space),
    )


def _roberta(own, special, number):
    options = dict(trim_offsets=own.get("trim_offsets", True))
    options |= dict(add_prefix_space=own.get("add_prefix_space", False))
    ends = _ends(special, number, "cls_token", "sep_token", **options)
    return _gpt2(own, special, number) | dict(post_processor=ends)


def _clip(own, special, number):
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    words += r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    spaces = dict(type="Replace", pattern={"Regex": r"\s+"}, content=" ")
    split = dict(type="Split", pattern={"Regex": words}, behavior="Removed", invert=True)
    options = dict(trim_offsets=False, add_prefix_space=False)
    return dict(
        model=dict(type="BPE", end_of_word_suffix="</w>", unk_token=special["unk_token"], **_BPE),
        normalizer=dict(
            type="Sequence", normalizers=[{"type": "NFC"}, spaces, {"type": "Lowercase"}]
        ),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, _bytes(add_prefix_space=False)]),
        post_processor=_ends(special, number, "bos_token", "eos_token", **options),
    )


def _t5(own, special, number):
    words = dict(type="Metaspace", replacement="▁", prepend_scheme="always", split=True)
    return dict(
        model=dict(type="Unigram", unk_id=2, byte_fallback=False),
        normalizer="precompiled",
        pre_tokenizer=dict(type="Sequence", pretokenizers=[{"type": "WhitespaceSplit"}, words]),
        post_processor=_template(number, None, "</s>"),
    )


_ENDS = dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>")
_END = "<|endoftext|>"
_CLASSES = {  # name -> its parts, and its default special tokens
    "BertTokenizer": (
        _bert,
        dict(
            unk_token="[UNK]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            mask_token="[MASK]",
        ),
    ),
    "RobertaTokenizer": (
        _roberta,
        _ENDS | dict(unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"),
    ),
    "GPT2Tokenizer": (_gpt2, dict(unk_token=_END, bos_token=_END, eos_token=_END)),
    "CLIPTokenizer": (
        _clip,
        dict(unk_token=_END, bos_token="<|startoftext|>", eos_token=_END, pad_token=_END),
    ),
    "T5Tokenizer": (
        _t5,
        dict(unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
        | {f"extra_{i}_token": f"<extra_id_{i}>" for i in range(100)},
    ),
}
