"""What the files next to a vocabulary say about its pieces."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama.tokenizers.added import AddedPiece
from llama.tokenizers.control import END_PIECES
from llama.tokenizers.files import Files, chat_templates, read_json

_ROLES = ("bos", "eos", "pad")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""Texts that look like marks of a prompt's structure."""


@dataclass(frozen=True)
class Description:
    """What ``tokenizer_config.json`` and the files beside it say about pieces.

    Attributes:
        roles: the pieces that begin, end and pad a sequence, by role.
        added: pieces that were added, by id.
        described: those of them whose flags are known.
        special: control pieces, by their texts.
        marks: texts in brackets of which no file says what they are.
        template: the chat templates' text.
    """

    roles: Mapping[str, str]
    added: Mapping[int, AddedPiece]
    described: Mapping[int, AddedPiece]
    special: Mapping[str, AddedPiece]
    marks: frozenset[str]
    template: str

    def is_control(self, text: str) -> bool:
        """Return whether a file calls an added piece special, or its name ends texts."""
        return text in self.special or text in END_PIECES

    def is_structure(self, text: str) -> bool:
        """Return whether another added piece belongs to the structure of prompts."""
        # White space and words may be in any template without being pieces of its structure.
        visible = "".join(text.replace("▁", " ").split())
        in_template = bool(visible) and not visible.isalnum() and text in self.template
        return in_template or text in self.marks


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
        if i.isdecimal() and isinstance(spec, dict) and _text(spec)
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
        marks=frozenset(text for text in ids if text not in known and BRACKETED.fullmatch(text)),
        template="".join(chat_templates(files).values()),
    )


def _special(config: Mapping[str, Any]) -> Iterator[AddedPiece]:
    """Yield the pieces that a file calls special."""
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in _LISTS:
        listed = config.get(key)
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        named += listed if isinstance(listed, list) else []
    for value in named:
        text = _text(value)
        # Of one letter, as "!" for padding, it remains part of texts, which can't be without it.
        if text and len(text.strip()) > 1:
            spec = value if isinstance(value, dict) else {}
            yield AddedPiece.of({**spec, "content": text, "special": True})


def _text(token: object) -> str | None:
    """Return the text of a piece, which is either a string or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
