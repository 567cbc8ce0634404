"""A checkpoint's tokenizer and chat template, from the files next to its weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.errors import need, printable
from llama.tokenizer import BaseTokenizer, Tokenizer
from llama.tokenizers.control import END_PIECES, end_ids
from llama.tokenizers.json_tokenizer import JsonTokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer, is_tiktoken

Files = Mapping[str, Path | bytes]
"""Files by Hugging Face's names: paths or contents (``Checkpoint.files``)."""

TEMPLATES = "additional_chat_templates"
"""The folder of chat templates besides the default one."""

_ROLES = ("bos", "eos", "pad")


def load_tokenizer(
    files: Files, vocab_size: int | None = None, where: object = "this checkpoint"
) -> BaseTokenizer:
    """Load the tokenizer from ``tokenizer.model`` or, without one, ``tokenizer.json``.

    Args:
        files: the files next to the weights.
        vocab_size: the number of ids that the model has; pieces beyond them are dropped.
        where: the checkpoint's name in errors.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ImportError: this kind of tokenizer needs a package that is missing.
        ValueError: a file is malformed.
    """
    config = _read_json(files, "tokenizer_config.json")
    if vocab_size is not None and vocab_size < 1:
        vocab_size = None
    added = _added(files, config, vocab_size)
    names = _special_names(files, config)
    special = {name for name in names.values() if name} | END_PIECES
    template = "".join(chat_templates(files).values())

    def is_structure(text: str) -> bool:
        # White space and words may be in any template without being pieces of its structure.
        visible = "".join(text.replace("▁", " ").split())
        return bool(visible) and not visible.isalnum() and text in template

    tokenizer: BaseTokenizer
    byte_pairs = "tokenizer.model" in files and is_tiktoken(_read(files, "tokenizer.model"))
    if byte_pairs and "tokenizer.json" not in files:  # which says more, and has the same pieces
        data = _read(files, "tokenizer.model")
        tokenizer = TiktokenTokenizer(data, _name(files, "tokenizer.model"), vocab_size)
    elif "tokenizer.model" in files and not byte_pairs:
        for spec in added.values():
            text = spec["content"]
            spec["special"] = bool(spec.get("special")) or text in special or is_structure(text)
        tokenizer = Tokenizer(_name(files, "tokenizer.model"), _extended(files, added))
        # transformers' name for whether each text between control pieces begins with a space.
        tokenizer.spaced = config.get("legacy") is not False
        tokenizer.add_bos = config.get("add_bos_token") is not False
    elif "tokenizer.json" in files:
        tokenizer = JsonTokenizer(
            _read_json(files, "tokenizer.json"),
            _name(files, "tokenizer.json"),
            special.__contains__,
            is_structure,
            vocab_size,
        )
        if isinstance(config.get("add_bos_token"), bool):
            tokenizer.add_bos = config["add_bos_token"]
    else:
        raise FileNotFoundError(
            f"no tokenizer.model or tokenizer.json in {where}: give the path of one as "
            "tokenizer_path"
        )
    _set_special_ids(tokenizer, names, files)
    return tokenizer


def chat_templates(files: Files) -> dict[str, str]:
    """Return the checkpoint's own chat templates, in Jinja's language, by name.

    "default" is one of them; the mapping is empty if there is none.
    """
    template = _read_json(files, "tokenizer_config.json").get("chat_template")
    named = template if isinstance(template, list) else [{"name": "default", "template": template}]
    templates = {t.get("name"): t.get("template") for t in named if isinstance(t, dict)}
    if "chat_template.jinja" in files:
        templates["default"] = _read(files, "chat_template.jinja").decode()
    for name in files:
        folder, _, file = name.partition("/")
        if folder == TEMPLATES:
            templates[file.removesuffix(".jinja")] = _read(files, name).decode()
    found = {n: t for n, t in templates.items() if isinstance(n, str) and isinstance(t, str)}
    return found if "default" in found else {}


def with_template(files: Files, template: str | Path) -> dict[str, Path | bytes]:
    """Return the files with another chat template in place of the checkpoint's own.

    Args:
        files: the files next to the weights.
        template: a file's path, or the template itself.

    Raises:
        FileNotFoundError: there is no such file, and the text can't be a template.
    """
    # A template has a tag, and hardly any path has one.
    source: Path | bytes = Path(template)
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        source = template.encode()
    elif not os.path.isfile(template):  # no error for a text that is too long
        raise FileNotFoundError(
            f"no chat template at {template}: give the path of a file, or a template in Jinja's "
            "language"
        )
    config = _read_json(files, "tokenizer_config.json")
    config.pop("chat_template", None)
    kept = {n: f for n, f in files.items() if n.partition("/")[0] != TEMPLATES}
    kept |= {"tokenizer_config.json": json.dumps(config).encode()} if config else {}
    return {**kept, "chat_template.jinja": source}


def _special_names(files: Files, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the pieces that begin, end and pad a sequence, by role."""
    return {
        role: text
        for role in _ROLES
        if (text := _content(config.get(f"{role}_token"))) is not None
        or (text := _content(_read_json(files, "special_tokens_map.json").get(f"{role}_token")))
    }


def _content(token: object) -> str | None:
    """Return the text of a special token, which is either a string or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _set_special_ids(tokenizer: BaseTokenizer, names: Mapping[str, str], files: Files) -> None:
    """Set the ids that begin, end and pad a sequence, and those that end an answer."""
    for role, name in names.items():
        if name in tokenizer.control_ids:
            setattr(tokenizer, f"{role}_id", tokenizer.control_ids[name])
    ids = _ids(tokenizer, _read_json(files, "generation_config.json"))
    if tokenizer.eos_id < 0 and ids:
        tokenizer.eos_id = min(ids)
    config = _read_json(files, "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            # Of another tokenizer than the present one, such an id may be any word.
            ids |= _ids(tokenizer, part) & set(tokenizer.control_ids.values())
    tokenizer.stop_ids = end_ids(tokenizer, ids)
    tokenizer.add_bos = tokenizer.add_bos and tokenizer.bos_id >= 0


def _ids(tokenizer: BaseTokenizer, config: Mapping[str, Any]) -> set[int]:
    """Return the ids that a configuration says end a text."""
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return {i for i in ends if type(i) is int and 0 <= i < tokenizer.n_words}


def _read(files: Files, name: str) -> bytes:
    source = files[name]
    return source if isinstance(source, bytes) else source.read_bytes()


def _name(files: Files, name: str) -> str:
    """Return a file's name in errors."""
    source = files[name]
    return name if isinstance(source, bytes) else str(source)


def _read_json(files: Files, name: str) -> dict[str, Any]:
    """Return a JSON file's object; an empty one if the file is missing."""
    if name not in files:
        return {}
    try:
        value = json.loads(_read(files, name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_name(files, name)} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_name(files, name)} holds a {type(value).__name__}, not an object")
    return value


def _added(
    files: Files, config: Mapping[str, Any], vocab_size: int | None
) -> dict[int, dict[str, Any]]:
    """Return the pieces added to a vocabulary, by id: their ``content`` and ``special``."""
    ids = _read_json(files, "added_tokens.json")
    added = {i: {"content": c, "special": True} for c, i in ids.items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for i, spec in decoder.items():
            if i.isdecimal() and isinstance(spec, dict) and isinstance(spec.get("content"), str):
                added[int(i)] = spec
    return {i: spec for i, spec in added.items() if vocab_size is None or i < vocab_size}


def _extended(files: Files, added: Mapping[int, Mapping[str, Any]]) -> bytes:
    """Return ``tokenizer.model`` with pieces added or renamed."""
    proto = _read(files, "tokenizer.model")
    plain = Tokenizer(_name(files, "tokenizer.model"), proto)
    n_words = plain.n_words
    changed = {
        i: spec
        for i, spec in sorted(added.items())
        if i >= n_words or plain.token_piece(i) != spec["content"].replace(" ", "▁")
    }
    if not changed:
        return proto
    ids = {plain.token_piece(i): i for i in range(n_words)}
    model = need("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(proto)
    for i, spec in changed.items():
        if i > len(model.pieces):
            raise ValueError(
                f"the piece {printable(spec['content'])} has the id {i}, but {len(model.pieces)} "
                "pieces stand before it: added_tokens.json or tokenizer_config.json lacks some"
            )
        name = spec["content"].replace(" ", "▁")
        if ids.setdefault(name, i) != i:
            raise ValueError(f"the piece {printable(name)} has the ids {ids[name]} and {i}")
        piece = model.pieces[i] if i < len(model.pieces) else model.pieces.add(score=0.0)
        piece.piece = name
        types = model.SentencePiece
        piece.type = types.CONTROL if spec.get("special") else types.USER_DEFINED
    data: bytes = model.SerializeToString()
    return data
