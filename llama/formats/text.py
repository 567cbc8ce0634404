"""The tokenizer of a checkpoint, and its chat template, from the files beside the weights."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.chat_formats import FORMATS, ChatFormat
from llama.errors import printable
from llama.formats.extras import need
from llama.formats.json_tokenizer import JsonTokenizer
from llama.formats.template import ChatTemplate
from llama.prompts import Dialog, check_messages
from llama.tokenizer import BaseTokenizer, Tokenizer
from llama.weights import Checkpoint

Files = Mapping[str, Path | bytes]


def load_tokenizer(
    files: Files, vocab_size: int | None = None, where: object = "this checkpoint"
) -> BaseTokenizer:
    """The tokenizer that ``tokenizer.model`` or, without one, ``tokenizer.json`` holds.

    Args:
        files: those of ``Checkpoint.files``.
        vocab_size: how many ids the model knows; pieces beyond them are dropped.
        where: what errors call the checkpoint.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ImportError: a package is missing that this kind of tokenizer needs.
        ValueError: a file is malformed.
    """
    config = _read_json(files, "tokenizer_config.json")
    if vocab_size is not None and vocab_size < 1:
        vocab_size = None
    added = {i: spec for i, spec in _added(files, config).items() if i < (vocab_size or i + 1)}
    names = {
        role: text
        for role in ("bos", "eos", "pad")
        if (text := _content(config.get(f"{role}_token"))) is not None
        or (text := _content(_read_json(files, "special_tokens_map.json").get(f"{role}_token")))
    }
    template, named = chat_template(files) or "", {name for name in names.values() if name}

    def is_structure(text: str) -> bool:
        # White space and words may stand in any template without being pieces of its structure.
        marks = "".join(text.replace("▁", " ").split())
        return bool(marks) and not marks.isalnum() and text in template

    tokenizer: BaseTokenizer
    if "tokenizer.model" in files:
        for spec in added.values():
            text = spec["content"]
            spec["special"] = bool(spec.get("special")) or text in named or is_structure(text)
        tokenizer = Tokenizer(_name(files, "tokenizer.model"), _extended(files, added))
        # transformers' word for whether each text between control pieces begins with a space.
        tokenizer.spaced = config.get("legacy") is not False
        tokenizer.add_bos = config.get("add_bos_token") is not False
    elif "tokenizer.json" in files:
        tokenizer = JsonTokenizer(
            _read_json(files, "tokenizer.json"),
            _name(files, "tokenizer.json"),
            named.__contains__,
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
    for role, name in names.items():
        if name in tokenizer.control_ids:
            setattr(tokenizer, f"{role}_id", tokenizer.control_ids[name])
    stops = _read_json(files, "generation_config.json").get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    ids = {i for i in stops if type(i) is int and 0 <= i < tokenizer.n_words}
    if tokenizer.eos_id < 0 and ids:
        tokenizer.eos_id = min(ids)
    tokenizer.stop_ids = frozenset(ids | ({tokenizer.eos_id} if tokenizer.eos_id >= 0 else set()))
    tokenizer.add_bos = tokenizer.add_bos and tokenizer.bos_id >= 0
    return tokenizer


def replace_tokenizer(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint with the tokenizer at ``path``, a ``tokenizer.model`` or ``.json``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: give the path of a tokenizer.model or tokenizer.json"
        )
    name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
    others = {
        k: v for k, v in checkpoint.files.items() if k not in ("tokenizer.model", "tokenizer.json")
    }
    return dataclasses.replace(checkpoint, files={**others, name: path})


def choose_chat(wanted: str | None, files: Files, tokenizer: BaseTokenizer) -> ChatFormat:
    """How to write dialogs: as wanted, as the checkpoint's template says, or as Meta's models.

    Raises:
        ValueError: there is no format of the wanted name.
    """
    if wanted is None:
        template = chat_template(files)
        if template is not None:
            return template_format(template)
        wanted = "inst" if tokenizer.step_id is None else "turn-based"
    if wanted not in FORMATS:
        raise ValueError(f"chat_format is {wanted!r}: known are {', '.join(FORMATS)}")
    return FORMATS[wanted]


def template_format(source: str) -> ChatFormat:
    """The format that a chat template describes. It is read when it is first used."""
    template = functools.cache(lambda: ChatTemplate(source))

    def prompt(tokenizer: BaseTokenizer, dialog: Dialog) -> list[int]:
        check_messages(dialog)
        messages = [
            {key: tokenizer.protect(str(text)) for key, text in message.items()}
            for message in dialog
        ]
        names = {
            f"{role}_token": tokenizer.token_piece(i) if i >= 0 else ""
            for role, i in (
                ("bos", tokenizer.bos_id),
                ("eos", tokenizer.eos_id),
                ("pad", tokenizer.pad_id),
            )
        }
        return tokenizer.encode_rendered(template().render(messages, **names))

    return ChatFormat(prompt)


def chat_template(files: Files) -> str | None:
    """The checkpoint's own chat template, in Jinja's language; None if it has none."""
    if "chat_template.jinja" in files:
        return _read(files, "chat_template.jinja").decode()
    found = _read_json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read(files: Files, name: str) -> bytes:
    source = files[name]
    return source if isinstance(source, bytes) else source.read_bytes()


def _name(files: Files, name: str) -> str:
    source = files[name]
    return name if isinstance(source, bytes) else str(source)


def _read_json(files: Files, name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(_read(files, name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_name(files, name)} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_name(files, name)} holds a {type(value).__name__}, not an object")
    return value


def _content(token: object) -> str | None:
    """The text of a special token, which is written in two ways."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added(files: Files, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The pieces that were added to a vocabulary: by id their ``content`` and ``special``."""
    named = _read_json(files, "added_tokens.json")
    added = {i: {"content": c, "special": True} for c, i in named.items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for i, spec in decoder.items():
            if i.isdecimal() and isinstance(spec, dict) and isinstance(spec.get("content"), str):
                added[int(i)] = spec
    return added


def _extended(files: Files, added: Mapping[int, Mapping[str, Any]]) -> bytes:
    """A SentencePiece model with pieces added or renamed."""
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
    known = {plain.token_piece(i): i for i in range(n_words)}
    model = need("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(proto)
    for i, spec in changed.items():
        if i > len(model.pieces):
            raise ValueError(
                f"the piece {printable(spec['content'])} has the id {i}, but {len(model.pieces)} "
                "pieces stand before it: added_tokens.json or tokenizer_config.json lacks some"
            )
        name = spec["content"].replace(" ", "▁")
        if known.setdefault(name, i) != i:
            raise ValueError(f"the piece {printable(name)} has the ids {known[name]} and {i}")
        piece = model.pieces[i] if i < len(model.pieces) else model.pieces.add(score=0.0)
        piece.piece = name
        kinds = model.SentencePiece
        piece.type = kinds.CONTROL if spec.get("special") else kinds.USER_DEFINED
    data: bytes = model.SerializeToString()
    return data
