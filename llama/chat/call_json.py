"""The JSON of a tool call, read while it is written."""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SPACE = re.compile(r"\s*")
_BRACKETS = re.compile(r'["\\{}\[\]]')
_ARGUMENTS = ("arguments", "parameters")
_FIELDS = ("name", "type", "id", *_ARGUMENTS)
_decoder = json.JSONDecoder(strict=False)


class NotACall(Exception):
    """A text isn't the JSON of a known function's call, whatever follows."""


class Head(NamedTuple):
    """The beginning of a call's JSON.

    Attributes:
        name: of the function.
        end: where the arguments begin; or, where they are known, where the JSON ends.
        arguments: None where an object follows.
    """

    name: str
    end: int
    arguments: str | None


class _Incomplete(Exception):
    """More text is needed."""


def read_head(text: str, names: Collection[str]) -> Head | None:
    """Read the JSON of a call up to its arguments; None if more text is needed.

    Raises:
        NotACall: it isn't one.
    """
    try:
        return _read(text, names)
    except _Incomplete:
        return None


def _read(text: str, names: Collection[str]) -> Head:
    at = _expect(text, 0, "{")
    fields: dict[str, Any] = {}
    raw = ""
    while text[at := _skip(text, at)] != "}":
        if fields:
            at = _skip(text, _expect(text, at, ","))
        key, at = _string(text, at)
        if key not in _FIELDS or key in fields:
            raise NotACall
        at = _skip(text, _expect(text, at, ":"))
        if key in _ARGUMENTS and text[at] == "{" and "name" in fields:
            return Head(fields["name"], at, None)
        fields[key], end = _value(text, at)
        if key == "name" and not (isinstance(fields[key], str) and fields[key] in names):
            raise NotACall
        if key in _ARGUMENTS:
            raw = text[at:end]
        at = end
    if "name" not in fields:
        raise NotACall
    arguments = next((fields[key] for key in _ARGUMENTS if key in fields), None)
    if isinstance(arguments, str):
        raw = arguments
    elif arguments is None:
        raw = "{}"
    elif not isinstance(arguments, dict):
        raise NotACall
    return Head(fields["name"], at + 1, raw)


def _skip(text: str, at: int) -> int:
    """Return where the next character that is no white space stands."""
    found = _SPACE.match(text, at)
    assert found is not None
    if found.end() == len(text):
        raise _Incomplete
    return found.end()


def _expect(text: str, at: int, char: str) -> int:
    at = _skip(text, at)
    if text[at] != char:
        raise NotACall
    return at + 1


def _string(text: str, at: int) -> tuple[str, int]:
    if text[at] != '"':
        raise NotACall
    found = _STRING.match(text, at)
    if found is None:
        raise _Incomplete
    return _decoded(text, at)[0], found.end()


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        value, end = _decoder.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise NotACall from error
    return value, end


def _value(text: str, at: int) -> tuple[Any, int]:
    if text[at] == '"':
        return _string(text, at)
    if text[at] in "{[":
        end = ArgumentsEnd().find(text[at:])
        if end is None:
            raise _Incomplete
        return _decoded(text, at)
    scalar = re.compile(r"[\w.+-]*").match(text, at)
    assert scalar is not None
    if scalar.end() == len(text):
        raise _Incomplete
    return _decoded(text, at)


class ArgumentsEnd:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self, depth: int = 0):
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """Return where the object ends in the next piece of its text; None if it goes on."""
        at = 0
        if self._escaped and piece:
            self._escaped, at = False, 1
        while found := _BRACKETS.search(piece, at):
            at = found.end()
            char = found[0]
            if char == "\\":
                if self._in_string:
                    self._escaped = at == len(piece)
                    at += 1
            elif char == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if char in "{[" else -1
                if self._depth <= 0:
                    return at
        return None
