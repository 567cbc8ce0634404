"""Llama 3's tokenizer: the published one, and a small one of the same form."""

import base64
import os
from functools import cache
from pathlib import Path

import pytest

# Merges of the small vocabulary, in the order of their ranks.
WORDS = ["th", "the", " the", "in", "ing", "an", "and", " and", "er", "  ", "\n\n", "us", "user"]
WORDS += ["ä", "é", "日", "01", "012", "'s", "hello", "ow", "cow", "    "]


def rank_lines(pieces: list[bytes]) -> bytes:
    """The content of a ``tokenizer.model`` with these pieces, which have their places as ids."""
    lines = [b"%s %d\n" % (base64.b64encode(piece), i) for i, piece in enumerate(pieces)]
    return b"".join(lines)


def small_pieces() -> list[bytes]:
    """The 256 bytes, and a few words that are merged of them."""
    pieces = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        data = word.encode()
        pieces += [data[:n] for n in range(2, len(data) + 1) if data[:n] not in pieces]
    return pieces


def small_tiktoken() -> bytes:
    return rank_lines(small_pieces())


@cache
def published() -> Path:
    """The vocabulary in Meta's package llama-models; the test is skipped without it."""
    pytest.importorskip("llama_models.llama3.tokenizer", exc_type=ImportError)
    import llama_models.llama3

    return Path(os.path.dirname(llama_models.llama3.__file__)) / "tokenizer.model"
