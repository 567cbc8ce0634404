"""The descriptions of a vocabulary's pieces in the files next to it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama.tokenizers.added import AddedPiece, is_letter
from llama.tokenizers.control import END_PIECES, FORMAT_MARKS
from llama.tokenizers.files import Files, chat_templates, read_json

_ROLES = ("bos", "eos", "pad")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Texts that look like marks of a prompt's structure: as a whole, and in a template, where each has
# a beginning of its own, so that no template takes long.
_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_IN_TEMPLATE = [
    re.compile(pattern)
    for pattern in (
        *(r"<[^<>]+>", r"(?<!<)<+[^<>]+>+"),
        *(r"\[[^\[\]]+\]", r"(?<!\[)\[+[^\[\]]+\]+"),
    )
]
_MAX_DIGITS = 9  # of an id


@dataclass(frozen=True)
class Description:
    """The pieces in ``tokenizer_config.json`` and the files beside it.

    Attributes:
        roles: the pieces that begin, end and pad a sequence, by role.
        added: pieces that were added, by id.
        described: those of them whose flags are known.
        special: control pieces, by their texts.
        marks: texts in brackets that belong to the structure of prompts: those that chat
            formats and templates write, and added ones of which no file says what they are.
    """

    roles: Mapping[str, str]
    added: Mapping[int, AddedPiece]
    described: Mapping[int, AddedPiece]
    special: Mapping[str, AddedPiece]
    marks: frozenset[str]

    def is_control(self, text: str) -> bool:
        """Return whether a file calls an added piece special, or its name ends texts."""
        return text in self.special or text in END_PIECES

    def is_structure(self, text: str) -> bool:
        """Return whether another added piece belongs to the structure of prompts."""
        return self.as_mark(text) in self.marks

    def as_mark(self, text: str) -> str:
        """Return a piece as the marks of prompts spell it, with spaces or with ``▁`` for them."""
        spellings = (text, text.replace("▁", " "), text.replace(" ", "▁"))
        return next((spelled for spelled in spellings if spelled in self.marks), text)


def describe(files: Files, vocab_size: int | None = None) -> Description:
    """Read what the files say about pieces; added ones from the id ``vocab_size`` on are dropped.

    Raises:
        ValueError: a file is malformed.
    """
    config = read_json(files, "tokenizer_config.json")
    others = read_json(files, "special_tokens_map.json")
    special = {piece.content: piece for piece in [*_special(others), *_special(config)]}
    decoder = config.get("added_tokens_decoder")
    described = {
        int(i): AddedPiece.of(spec)
        for i, spec in (decoder.items() if isinstance(decoder, dict) else ())
        if i.isdecimal() and len(i) <= _MAX_DIGITS and isinstance(spec, dict) and _text(spec)
    }
    known = {piece.content for piece in described.values()}
    special |= {piece.content: piece for piece in described.values() if piece.special}
    # Older directories' file has no more than texts and ids.
    ids = read_json(files, "added_tokens.json")
    added = {
        i: special.get(text, AddedPiece(text, normalized=True))
        for text, i in ids.items()
        if type(i) is int and i >= 0 and text and text not in known
    }
    added |= described
    if vocab_size is not None:
        added = {i: piece for i, piece in added.items() if i < vocab_size}
    roles = {role: _text(config.get(f"{role}_token")) for role in _ROLES}
    return Description(
        roles={
            role: text
            for role, own in roles.items()
            if (text := own if own is not None else _text(others.get(f"{role}_token")))
        },
        added=added,
        described={i: piece for i, piece in added.items() if i in described},
        special=special,
        marks=FORMAT_MARKS
        | {text for text in ids if text not in known and _BRACKETED.fullmatch(text)}
        | _marks("".join(chat_templates(files).values())),
    )


def _marks(template: str) -> set[str]:
    """Return the texts in brackets in a template: all its marks, and some of its code."""
    return {text for pattern in _IN_TEMPLATE for text in pattern.findall(template)}


def _special(config: Mapping[str, Any]) -> Iterator[AddedPiece]:
    """Yield the pieces that a file calls special."""
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in _LISTS:
        listed = config.get(key)
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        named += listed if isinstance(listed, list) else []
    for value in named:
        text = _text(value)
        if text and not is_letter(text):
            spec = value if isinstance(value, dict) else {}
            yield AddedPiece.of({**spec, "content": text, "special": True})


def _text(token: object) -> str | None:
    """Return the text of a piece, which is either a string or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
