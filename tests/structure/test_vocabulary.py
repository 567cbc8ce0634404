"""Pieces as bytes: together they are the text, as each kind of tokenizer decodes it."""

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from conftest import data_tokenizer
from json_tokenizers import LINES, byte_level, like_llama2

from llama import Tokenizer
from llama.generation import TINY
from llama.structure.vocabulary import Vocabulary, pack, piece_bytes, unpack, vocabulary_of
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.json_tokenizer import JsonTokenizer

TEXTS = [
    *LINES[:3],
    '{"a":[1, 2.5e-3,null],"b c":"d\\n\\u00e9"}',
    "  two\n\n\tspaces ",
    "\x00\x7f\ufffd",
]
KINDS = ["tiny", "llama2", "codellama", "bytes", "first", "always", "never", "prepend"]


def json_tokenizer(data: dict[str, Any]) -> JsonTokenizer:
    return JsonTokenizer(data, "tokenizer.json", lambda text: False, lambda text: False)


def tokenizer_of(kind: str) -> BaseTokenizer:
    if kind == "tiny":
        return Tokenizer(TINY / "tokenizer.model")
    if kind in ("llama2", "codellama"):
        return data_tokenizer(kind)
    return json_tokenizer(byte_level() if kind == "bytes" else like_llama2(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(kind: str) -> None:
    """A failure means that a grammar sees another text than the one returned."""
    tokenizer = tokenizer_of(kind)
    pieces = piece_bytes(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode_infilling(text)
        assert b"".join(pieces[i] for i in ids).decode() == tokenizer.decode_infilling(ids) == text
        assert not any(pieces[i] for i in tokenizer.control_ids.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_alone(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for i, piece in enumerate(piece_bytes(tokenizer)):
        if piece:  # half a character has no text
            assert piece.decode(errors="replace") == tokenizer.decode_infilling([i])


@pytest.mark.parametrize("kind", KINDS)
def test_what_opens_a_text_loses_the_space_that_decoding_drops(kind: str) -> None:
    """A failure means that an answer begins otherwise than its grammar says."""
    tokenizer, rng = tokenizer_of(kind), random.Random(1)
    vocabulary = vocabulary_of(tokenizer, {})
    pieces = vocabulary.pieces[: tokenizer.n_words]
    spaced = [i for i, piece in enumerate(pieces) if piece[:1] == b" "]
    # A piece that isn't a whole character may spoil its neighbours.
    ids = [i for i, p in enumerate(pieces) if p and "\ufffd" not in p.decode(errors="replace")]
    for first in [*spaced, *rng.sample(ids, 60)]:
        rest = rng.choices(ids, k=2)
        opened = b"" if vocabulary.blank[first] else vocabulary.pieces[vocabulary.opened(first)]
        text = opened + b"".join(vocabulary.pieces[i] for i in rest)
        assert text.decode(errors="replace") == tokenizer.decode([first, *rest])
    assert vocabulary.drops_spaces == (kind not in ("bytes", "never"))


def test_a_vocabulary_is_built_once_and_goes_with_its_tokenizer() -> None:
    tokenizer = tokenizer_of("tiny")
    vocabulary = vocabulary_of(tokenizer, {})
    assert vocabulary_of(tokenizer, {}) is vocabulary
    assert vocabulary_of(tokenizer, {3: "<mark>"}).pieces[3] == b"<mark>"
    ended = weakref.ref(vocabulary)
    del tokenizer, vocabulary
    gc.collect()
    assert ended() is None


def test_another_kind_of_tokenizer_is_refused() -> None:
    class Other(BaseTokenizer):
        def __init__(self) -> None:
            self.control_ids, self.stop_ids = {}, frozenset()
            self.bos_id = self.eos_id = self.pad_id = -1

    with pytest.raises(ValueError, match="bytes of a Other"):
        piece_bytes(Other())
    data = {**byte_level(), "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    with pytest.raises(ValueError, match="WordPiece"):
        piece_bytes(json_tokenizer(data))


def test_bits_are_packed_as_llguidance_packs_them() -> None:
    bits = torch.rand(101, generator=torch.Generator().manual_seed(0)) < 0.5
    bits[31] = True  # the sign
    assert [int(pack(bits)[i // 32]) >> i % 32 & 1 for i in range(101)] == bits.int().tolist()
    assert torch.equal(unpack(pack(bits))[:101], bits)


def test_llguidance_encodes_by_the_longest_piece() -> None:
    vocabulary = Vocabulary([b"a", b"ab", b"abc", b"b", b"c", b"\xff"], ())
    assert vocabulary.tokenizer.tokenize_bytes(b"abab") == [1, 1]
    assert vocabulary.tokenizer.tokenize_bytes(b"abcb\xff") == [2, 3, 5]
