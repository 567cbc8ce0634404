"""A GGUF file's tokenizer, converted to the files that Hugging Face's directories have."""

import json
from collections.abc import Mapping
from typing import Any

from llama.errors import need, printable
from llama.tokenizers.control import END_PIECES
from llama.tokenizers.pre_tokenizers import Rule, find_rule

# The types of tokens, which are SentencePiece's.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_files(metadata: Mapping[str, Any], source: str = "the file") -> dict[str, bytes]:
    """Convert the tokenizer to files, by their names in a directory of Hugging Face's.

    Args:
        metadata: a GGUF file's metadata.
        source: the file's name in errors.

    Returns:
        ``tokenizer.model`` or ``tokenizer.json``, ``tokenizer_config.json`` and, if several
        tokens end a text, ``generation_config.json``; no file if there is no tokenizer.

    Raises:
        ImportError: a package is missing.
        ValueError: the tokenizer is of an unknown kind, or malformed.
    """
    model = metadata.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return {}
    if model not in ("llama", "gpt2"):
        raise ValueError(
            f"{source} has a tokenizer of the kind {printable(repr(model))}: known are llama, gpt2"
        )
    tokens = _column(metadata, "tokens", source)
    types = _column(metadata, "token_type", source, len(tokens))
    special = _special_ids(metadata, model, len(tokens), source)
    # Some files have them as plain tokens.
    control = {special[role] for role in ("bos", "eos", "eot", "eom") if role in special}
    # SentencePiece writes a space as ▁; llama.cpp writes it out in tokens that were added.
    names = [token.replace(" ", "▁") for token in tokens] if model == "llama" else tokens
    for i, (name, kind) in enumerate(zip(names, types, strict=True)):
        is_end = name in END_PIECES and kind in (_NORMAL, _USER_DEFINED)
        types[i] = _CONTROL if is_end or i in control or kind == _UNKNOWN else kind
    ids = {name: i for i, name in enumerate(names)}
    if len(ids) < len(names) or "" in ids:
        repeated = next((name for i, name in enumerate(names) if ids[name] != i), "")
        raise ValueError(f"{source} has the token {printable(repeated)!r} twice, or an empty one")
    rule = None if model == "llama" else find_rule(metadata.get("tokenizer.ggml.pre"), source)
    adds_bos = rule is None or rule.whole_words
    adds = {
        role: metadata.get(f"tokenizer.ggml.add_{role}_token", default) is True and role in special
        for role, default in (("bos", adds_bos), ("eos", False))
    }
    files = {}
    if rule is None:
        scores = _column(metadata, "scores", source, len(tokens))
        files["tokenizer.model"] = _sentencepiece(metadata, names, scores, types, special, source)
    else:
        merges = _merges(metadata, ids, source)
        data = _byte_level(rule, ids, merges, types)
        around = [[special[role]] if adds[role] else [] for role in ("bos", "eos")]
        data["post_processor"] = _template(names, *around) if any(around) else None
        files["tokenizer.json"] = _json(data)
    config = {f"{role}_token": names[i] for role, i in special.items() if role in _ROLES}
    config |= {f"add_{role}_token": add for role, add in adds.items()}
    config |= _chat_templates(metadata)
    if model == "llama":
        config["legacy"] = True
        # A chat template decides which of them are of the structure of prompts.
        added = [i for i, kind in enumerate(types) if kind == _USER_DEFINED]
        if added:
            spec = {str(i): _added(names[i].replace("▁", " "), False) for i in added}
            config["added_tokens_decoder"] = spec
    files["tokenizer_config.json"] = _json(config)
    ends = _ends(ids, types, special)
    if len(ends) > 1:
        files["generation_config.json"] = _json({"eos_token_id": ends})
    return files


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``chat_template`` of a ``tokenizer_config.json``; several have names."""
    key = "tokenizer.chat_template"
    templates = [
        {"name": name.removeprefix(key).removeprefix(".") or "default", "template": text}
        for name, text in metadata.items()
        if isinstance(text, str) and (name == key or name.startswith(f"{key}."))
    ]
    if len(templates) == 1 and templates[0]["name"] == "default":
        return {"chat_template": templates[0]["template"]}
    return {"chat_template": templates} if templates else {}


def _ends(ids: Mapping[str, int], types: list[int], special: Mapping[str, int]) -> list[int]:
    """Return the ids that end a text, ``eos`` first: those that the file names, and by name."""
    named = [special[role] for role in ("eos", "eot", "eom") if role in special]
    # Code Llama's files name the end of what is filled in, which ends no other text.
    named = [i for i in named if i != ids.get("▁<EOT>")]
    by_name = sorted(ids[end] for end in END_PIECES & ids.keys() if types[ids[end]] == _CONTROL)
    found = dict.fromkeys(named + by_name)
    return [i for i in found if i != special.get("bos") or i == special.get("eos")]


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# The types of the columns' entries.
_ENTRY_TYPES: dict[str, type | tuple[type, ...]] = {
    "tokens": str,
    "merges": str,
    "token_type": int,
    "scores": (float, int),
}


def _column(
    metadata: Mapping[str, Any], name: str, source: str, length: int | None = None
) -> list[Any]:
    """Return a list of the vocabulary, of ``length`` entries."""
    column = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(column, list) or not all(
        isinstance(entry, _ENTRY_TYPES[name]) for entry in column[:1]
    ):
        raise ValueError(f"{source} lacks the list tokenizer.ggml.{name}: convert the model again")
    if length is not None and len(column) != length:
        raise ValueError(
            f"{source} has {length} tokens, but tokenizer.ggml.{name} lists {len(column)}"
        )
    return column


def _special_ids(
    metadata: Mapping[str, Any], model: str, n_words: int, source: str
) -> dict[str, int]:
    """Return the ids of special tokens by role."""
    defaults = {"bos": 1, "eos": 2, "unk": 0} if model == "llama" else {}
    special = {}
    for role in ("bos", "eos", "unk", "pad", "eot", "eom"):
        key = f"tokenizer.ggml.{_ROLES.get(role, role)}_token_id"
        value = metadata.get(key, defaults.get(role))
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < n_words:
            raise ValueError(
                f"{source} has {key} = {printable(repr(value))}, but tokens 0 to {n_words - 1}"
            )
        special[role] = value
    return special


def _sentencepiece(
    metadata: Mapping[str, Any],
    names: list[str],
    scores: list[float],
    types: list[int],
    special: Mapping[str, int],
    source: str,
) -> bytes:
    """Return the content of a ``tokenizer.model``."""
    if types.count(_BYTE) not in (0, 256):
        raise ValueError(f"{source} has {types.count(_BYTE)} tokens for the 256 bytes")
    proto = need("sentencepiece.sentencepiece_model_pb2").ModelProto()
    for i, (name, score, kind) in enumerate(zip(names, scores, types, strict=True)):
        if i == special["unk"]:
            kind = _UNKNOWN  # a model can have one only
        if not _NORMAL <= kind <= _BYTE:
            raise ValueError(f"{source} has the token {printable(name)} of the type {kind}")
        proto.pieces.add(piece=name, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(names)
    trainer.byte_fallback = _BYTE in types
    trainer.pad_id = special.get("pad", -1)
    for role in ("unk", "bos", "eos", "pad"):
        if role in special:
            setattr(trainer, f"{role}_id", special[role])
            setattr(trainer, f"{role}_piece", names[special[role]])
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    trim = metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    normalizer.remove_extra_whitespaces = trim is True
    data: bytes = proto.SerializeToString()
    return data


def _merges(
    metadata: Mapping[str, Any], ids: Mapping[str, int], source: str
) -> list[tuple[str, str]]:
    """Return the pairs that are merged, in the order of priority."""
    pairs = []
    for merge in _column(metadata, "merges", source):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise ValueError(
                f"{source} merges {printable(merge)!r}, which isn't among its tokens: it is damaged"
            )
        pairs.append((left, right))
    return pairs


def _byte_level(
    rule: Rule,
    ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    types: list[int],
) -> dict[str, Any]:
    """Return the object of a ``tokenizer.json`` for a byte-level tokenizer."""
    splits = [
        {"type": "Split", "pattern": {"Regex": rx}, "behavior": "Isolated", "invert": False}
        for rx in rule.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": False}
    added = [
        {"id": i, **_added(token, types[i] == _CONTROL)}
        for token, i in ids.items()
        if types[i] in (_CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": rule.whole_words,
            "vocab": ids,
            "merges": merges,
        },
    }


def _added(content: str, special: bool) -> dict[str, Any]:
    """Return the description of an added piece."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": special}


def _template(names: list[str], before: list[int], after: list[int]) -> dict[str, Any]:
    """Return a post-processor that adds tokens before and after a text."""

    def entries(ids: list[int], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": names[i], "type_id": type_id}} for i in ids]

    single = [
        [*entries(before, i), {"Sequence": {"id": name, "type_id": i}}, *entries(after, i)]
        for i, name in enumerate("AB")
    ]
    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in before + after}
    return {
        "type": "TemplateProcessing",
        "single": single[0],
        "pair": single[0] + single[1],
        "special_tokens": tokens,
    }
