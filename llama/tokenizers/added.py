"""Pieces that were added to a vocabulary: where they stand in texts, and what they take away.

The rules are those of Hugging Face's library ``tokenizers`` (src/tokenizer/added_vocabulary.rs).
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llama.tokenizer import BaseTokenizer

# Unicode's White_Space lacks four characters that are white space to Python.
_SPACES = re.compile(r"[^\S\x1c-\x1f]*")
# Circled and squared letters and the characters that join letters: letters to Unicode, although
# of other categories.
_LETTERS = re.compile(
    "[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189\u200c\u200d]"
)


@dataclass(frozen=True)
class AddedPiece:
    """A piece that was added to a vocabulary.

    Attributes:
        content: its text.
        special: whether it is a control piece.
        lstrip, rstrip: whether it takes away the white space before and after it.
        single_word: whether it is found only where no letter or digit stands beside it.
        normalized: whether it is looked for after the others, in the texts between them.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "AddedPiece":
        """Return the piece that a JSON object with a ``content`` describes."""
        special = bool(spec.get("special"))
        flags = {name: bool(spec.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        normalized = bool(spec.get("normalized", not special))
        return cls(spec["content"], special, **flags, normalized=normalized)


def is_letter(text: str) -> bool:
    """Return whether a piece is at most one letter, besides white space.

    Of a piece that the vocabulary has anyhow, as "!" for padding, that is part of texts: they
    can't be without it.
    """
    return len(text.replace("▁", " ").strip()) < 2


class AddedWords:
    """Finds added pieces in texts."""

    def __init__(self, pieces: Mapping[int, AddedPiece]):
        """Prepare to find the pieces of these ids."""
        first = {i: piece for i, piece in pieces.items() if not piece.normalized}
        second = {i: piece for i, piece in pieces.items() if piece.normalized}
        self._passes = [_Pass(found) for found in (first, second) if found]

    def split(self, text: str) -> list[str | int]:
        """Return the ids of the pieces in a text, and the texts between them."""
        parts: list[str | int] = [text]
        for each in self._passes:
            parts = list(chain(*(each.split(p) if isinstance(p, str) else [p] for p in parts)))
        return parts


class _Pass:
    """Finds pieces from left to right, and of those that begin at a place the longest."""

    def __init__(self, pieces: Mapping[int, AddedPiece]):
        self._pieces = {piece.content: (i, piece) for i, piece in pieces.items()}
        self._begin = re.compile(f"[{''.join(re.escape(t) for t in {t[0] for t in self._pieces})}]")
        # There may be thousands. In alphabetical order, all pieces that a text begins with begin
        # the last one before the text, too.
        self._sorted = sorted(self._pieces)
        self._longest = max(map(len, self._sorted))
        self._shorter = {}  # the longest other piece that begins each one
        outer = [""]
        for text in self._sorted:
            while not text.startswith(outer[-1]):
                outer.pop()
            self._shorter[text] = outer[-1]
            outer.append(text)

    def _find(self, text: str, begin: int) -> str:
        """Return the longest piece at a place; "" if there is none."""
        at = bisect_right(self._sorted, text[begin : begin + self._longest])
        found = self._sorted[at - 1] if at else ""
        while not text.startswith(found, begin):
            found = self._shorter[found]
        return found

    def split(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        done = at = 0
        while match := self._begin.search(text, at):
            begin = match.start()
            found = self._find(text, begin)
            at = end = begin + (len(found) or 1)
            if not found:
                continue
            i, piece = self._pieces[found]
            if piece.single_word and not _is_alone(text, begin, end):
                continue
            while piece.lstrip and begin > done and _SPACES.fullmatch(text[begin - 1]):
                begin -= 1
            if piece.rstrip:
                end += _spaces(text, end)
            parts += [text[done:begin], i]
            done = end
        return [part for part in [*parts, text[done:]] if part != ""]


def set_flags(tokenizer: BaseTokenizer, pieces: Iterable[AddedPiece]) -> None:
    """Tell a tokenizer which of its control pieces take white space away, or have to stand alone.

    Of several descriptions of a piece the last one counts.
    """
    controls = tokenizer.control_ids
    found = {controls[piece.content]: piece for piece in pieces if piece.content in controls}
    tokenizer.lstrip_ids = frozenset(i for i, piece in found.items() if piece.lstrip)
    tokenizer.rstrip_ids = frozenset(i for i, piece in found.items() if piece.rstrip)
    tokenizer.single_word_ids = frozenset(i for i, piece in found.items() if piece.single_word)


def around_controls(
    parts: Sequence[str | int], tokenizer: BaseTokenizer, spelled: Mapping[int, str]
) -> list[str | int]:
    """Return a prompt's texts without the white space that control pieces take away.

    A piece that is found as a single word only is text where it isn't one.

    Args:
        parts: texts and ids of control pieces.
        tokenizer: says which pieces these are.
        spelled: the control pieces' texts by id.
    """
    lone, left, right = tokenizer.single_word_ids, tokenizer.lstrip_ids, tokenizer.rstrip_ids
    if (lone | left | right).isdisjoint(part for part in parts if isinstance(part, int)):
        return list(parts)
    texts = [part if isinstance(part, str) else spelled[part] for part in parts]
    whole, end = "".join(texts), 0
    kept: list[str | int] = []
    for part, text in zip(parts, texts, strict=True):
        begin, end = end, end + len(text)
        if isinstance(part, int) and part in lone and not _is_alone(whole, begin, end):
            part = text
        before = kept[-1] if kept else None
        if isinstance(part, int) and part in left and isinstance(before, str):
            kept[-1] = before[: len(before) - _spaces(before[::-1])]
        elif isinstance(part, str) and isinstance(before, int) and before in right:
            part = part[_spaces(part) :]
        elif isinstance(part, str) and isinstance(before, str):
            part = str(kept.pop()) + part
        kept.append(part)
    return kept


def _spaces(text: str, begin: int = 0) -> int:
    """Return the length of the white space at a place."""
    match = _SPACES.match(text, begin)
    return len(match[0]) if match else 0


def _is_alone(text: str, begin: int, end: int) -> bool:
    """Return whether no letter or digit stands beside a part of a text."""
    beside = text[max(begin - 1, 0) : begin] + text[end : end + 1]
    return not any(map(_is_letter, beside))


def _is_letter(char: str) -> bool:
    kind = unicodedata.category(char)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or bool(_LETTERS.match(char))
