"""Compiles grammars in a process that its parent may kill, and imports no module of ours.

The parent writes requests to standard input as JSON, and reads replies, a line each.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

# Per token: fuel for about 15 ms in the lexer and 3 ms in the parser; and about 100 MB of states.
_LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
}
_MEMORY = 4 << 30  # bytes that a compilation may take


class Request(NamedTuple):
    """A grammar to compile for a vocabulary, whose pieces are sent with its first one."""

    vocabulary: int
    pieces: list[str] | None  # each character one byte, which is its code
    grammar: str
    seconds: float


def build_tokenizer(pieces: Sequence[bytes]) -> Any:
    """Return llguidance's form of a vocabulary, whose last piece is the end of the text."""
    import llguidance

    ids = {piece: i for i, piece in enumerate(pieces[:-1]) if piece}
    longest = max(map(len, ids), default=1)

    def encode(text: bytes) -> list[int]:
        """Encode bytes exactly: the longest piece that fits, each time."""
        found, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + longest), start, -1)
            end = next((end for end in ends if text[start:end] in ids), None)
            if end is None:
                break
            found.append(ids[text[start:end]])
            start = end
        return found

    wrapped = llguidance.TokenizerWrapper(_Pieces(pieces, encode))
    return llguidance.LLTokenizer(wrapped)


class _Pieces:
    """The part of a tokenizer that ``TokenizerWrapper`` asks for."""

    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes], encode: Any):
        self.tokens = pieces
        self.eos_token_id = len(pieces) - 1
        self.special_token_ids = [self.eos_token_id]
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    """Return an ``LLMatcher``, which never raises: it may hold an error."""
    import llguidance

    limits = llguidance.LLParserLimits(**_LIMITS, verbose_errors=False)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def main(folder: str) -> None:
    """Answer requests until the parent ends; it has found llguidance in ``folder``."""
    sys.path[:] = [folder, *sys.path[1:]]
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    tokenizers: dict[int, Any] = {}
    while True:
        line = sys.stdin.readline()
        if not line:
            return
        request = Request(*json.loads(line))
        if request.pieces is not None:
            pieces = [piece.encode("latin-1") for piece in request.pieces]
            tokenizers = {request.vocabulary: build_tokenizer(pieces)}
        _reply("ready" if request.vocabulary in tokenizers else "unknown vocabulary")
        if request.vocabulary in tokenizers:
            # The parent kills this process at the limit; if it is gone itself, this one ends too.
            timer = threading.Timer(request.seconds + 1, os._exit, [1])
            timer.start()
            matcher = compile_grammar(tokenizers[request.vocabulary], request.grammar)
            if not matcher.is_error():
                matcher.compute_bitmask()
            _reply(matcher.get_error())
            timer.cancel()


def _reply(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
