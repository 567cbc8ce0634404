"""Marks that stand for control pieces in a prompt's text, which no content can write.

The structure of a prompt, a format's pieces or a template's own text, gets marks where it spells
control pieces. A mark is a few characters that Unicode reserves for internal use
(noncharacters, https://www.unicode.org/faq/private_use.html), and they are taken out of all
contents before. In the finished prompt marks become ids; all else is text, whatever it spells.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from llama.tokenizer import BaseTokenizer
from llama.tokenizers.added import around_controls

_BEGIN, _END, _CUT = "\ufdd0", "\ufde1", "\ufde2"
_DIGITS = [chr(0xFDD1 + digit) for digit in range(16)]
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_MARK = re.compile(f"{_BEGIN}([{_DIGITS[0]}-{_DIGITS[-1]}]+){_END}")

Value = TypeVar("Value")


def clean(value: Value) -> Value:
    """Return a content, or an object with contents, without the characters of marks."""
    cleaned: Any = value
    if isinstance(value, str):
        cleaned = _RESERVED.sub("", value)
    elif isinstance(value, Mapping):
        cleaned = {clean(key): clean(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        cleaned = [clean(item) for item in value]
    return cleaned


class Marks:
    """The marks of a tokenizer's control pieces."""

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokenizer = tokenizer
        self._pieces = {i: piece for piece, i in tokenizer.control_ids.items() if len(piece) > 1}
        longest_first = sorted(self._pieces.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, text: str) -> str:
        """Return a text of the structure, with marks for the control pieces that it spells."""
        return self._spelled.sub(self._of, text)

    def _of(self, match: re.Match[str]) -> str:
        number = f"{self._tokenizer.control_ids[match[0]]:x}"
        return _BEGIN + "".join(_DIGITS[int(digit, 16)] for digit in number) + _END

    def unmark(self, text: str) -> str:
        """Return a text with its control pieces written out, to compare or search with."""
        if _BEGIN not in text:
            return text
        return _MARK.sub(lambda match: self._pieces.get(_number(match[1]), ""), text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a marked text."""
        parts: list[str | int] = []
        for i, part in enumerate(_MARK.split(text)):
            parts.append(_number(part) if i % 2 else _RESERVED.sub("", part))
        known = [part for part in parts if isinstance(part, str) or part in self._pieces]
        return self._tokenizer.encode_parts(around_controls(known, self._tokenizer, self._pieces))


def _number(digits: str) -> int:
    return int("".join(f"{_DIGITS.index(digit):x}" for digit in digits), 16)


def with_cut(text: str) -> str:
    """Return a text with a place at its end where ``cut`` will end the prompt."""
    # The space shows whether a template strips its messages.
    return f"{text}{_CUT} "


def cut(text: str) -> str:
    """Return a prompt up to the last place that ``with_cut`` made.

    Raises:
        ValueError: there is none.
    """
    before, mark, after = text.rpartition(_CUT)
    if not mark:
        raise ValueError(
            "the chat template doesn't write the dialog's last message as it is: "
            "continue_final_message can't continue it"
        )
    return before if after.startswith(" ") else before.rstrip()
