"""Llama 3's byte pairs: ids as Meta's own code gives them, and errors of damaged files."""

import json
import random
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_files import published, rank_lines, small_pieces, small_tiktoken

from llama import Tokenizer
from llama.chat.formats import choose_chat
from llama.engine.detokenizer import Detokenizer
from llama.generation import TINY
from llama.server.scores import token_text
from llama.structure.vocabulary import piece_bytes
from llama.tokenizers import load_tokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer, hf_files, is_tiktoken

LETTERS = " \t\n\r aAbé'sSTłß中文ñ한ä😀-_=<|>0123½.,;()[]{}/\\\"#*\u3000\u0301ىﷺ\x00\x1c\u2028"
TEXTS = st.one_of(
    st.text(max_size=80),
    st.text(LETTERS, max_size=80),
    st.lists(st.sampled_from(["<|eot_id|>", "<|begin_of_text|>", " ", "\n", "a"])).map("".join),
    st.lists(st.builds(lambda c, n: c * n, st.sampled_from(LETTERS), st.integers(1, 90))).map(
        "".join
    ),
)


@pytest.fixture(scope="module")
def ours() -> TiktokenTokenizer:
    return TiktokenTokenizer(published().read_bytes(), "tokenizer.model")


@pytest.fixture(scope="module")
def meta():
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer(published())


@pytest.fixture(scope="module")
def small() -> TiktokenTokenizer:
    return TiktokenTokenizer(small_tiktoken(), "tokenizer.model")


class TestPublished:
    """Against Meta's package."""

    def test_control_pieces_and_ids_are_metas(self, ours, meta) -> None:
        """A failure means that prompts begin, and answers end, with other ids than in training."""
        assert ours.control_ids == meta.special_tokens
        assert ours.n_words == meta.n_words == 128256
        assert (ours.bos_id, ours.eos_id, ours.pad_id) == (meta.bos_id, meta.eos_id, meta.pad_id)
        assert ours.stop_ids == set(meta.stop_tokens)

    def test_texts_have_metas_ids_and_come_back(self, ours, meta) -> None:
        """A failure means that a published model reads other pieces than it was trained on."""

        @settings(max_examples=400, deadline=None)
        @given(TEXTS)
        def check(text: str) -> None:
            expected = meta.encode(text, bos=True, eos=True)
            assert ours.encode(text, bos=True, eos=True) == expected
            assert ours.decode(expected) == text

        check()

    def test_any_ids_have_metas_text(self, ours, meta) -> None:
        """A failure means that bytes which are no characters are shown in another way."""
        generator = random.Random(1)
        for _ in range(200):
            ids = [generator.randrange(128000) for _ in range(generator.randrange(12))]
            assert ours.decode(ids) == meta.decode(ids)

    @pytest.mark.parametrize(
        "text",
        [
            "a" * 25_000 + " b",
            "a" * 25_001,
            " " * 25_000 + "a",
            "x" + "\t" * 60_001 + "é" * 30_000,
            "ab \n" * 101_000,
            "\x1c" * 26_000 + "\u2028" * 30_000,
            "é" * 399_990 + " " * 25_020,
        ],
        ids=lambda text: f"{len(text)} of {text[:4]!r}",
    )
    def test_long_runs_are_cut_as_in_metas_code(self, ours, meta, text: str) -> None:
        """A failure means other ids around the cuts, or a text that takes minutes."""
        begin = time.monotonic()
        ids = ours.encode(text, bos=False, eos=False)
        assert time.monotonic() - begin < 5  # about 0.2 seconds
        assert ids == meta.encode(text, bos=False, eos=False)

    @pytest.mark.slow
    def test_the_converted_json_gives_the_same_ids(self, ours) -> None:
        """A failure means that a converted checkpoint reads other pieces in transformers."""
        tokenizer = load_tokenizer(hf_files(published().read_bytes(), "tokenizer.model"))
        generator = random.Random(2)
        for _ in range(1000):
            text = "".join(generator.choices(LETTERS, k=generator.randrange(40)))
            assert tokenizer.encode(text, False, False) == ours.encode(text, False, False)
        assert (tokenizer.n_words, tokenizer.bos_id) == (ours.n_words, ours.bos_id)
        assert tokenizer.control_ids == ours.control_ids
        assert (tokenizer.stop_ids, tokenizer.add_bos) == (ours.stop_ids, True)
        assert tokenizer.piece_bytes()[:128000] == ours.piece_bytes()[:128000]
        assert [tokenizer.token_piece(i) for i in range(128256)] == [
            ours.token_piece(i) for i in range(128256)
        ]


def test_a_small_vocabulary_merges_by_rank(small) -> None:
    """A failure means that pairs are merged in another order than that of their ids."""
    pieces = small_pieces()
    ids = small.encode("the cows and the user\n\n0123", bos=False, eos=False)
    expected = ["the", " ", "cow", "s", " and", " the", " ", "user", "\n\n", "012", "3"]
    assert [pieces[i].decode() for i in ids] == expected
    assert small.decode(ids) == "the cows and the user\n\n0123"


def test_control_pieces_follow_the_ranks_up_to_the_models_vocabulary() -> None:
    """A failure means ids that the embedding doesn't have, or other names for them."""
    n = len(small_pieces())
    whole = load_tokenizer({"tokenizer.model": small_tiktoken()})
    assert (whole.n_words, len(whole.control_ids)) == (n + 256, 256)
    assert whole.token_piece(n) == "<|begin_of_text|>"
    assert whole.token_piece(n + 2) == "<|reserved_special_token_0|>"
    assert whole.token_piece(n + 255) == "<|reserved_special_token_245|>"
    assert whole.stop_ids == {n + 1, n + 8, n + 9}
    few = load_tokenizer({"tokenizer.model": small_tiktoken()}, n + 10)
    assert (few.n_words, few.bos_id, few.stop_ids) == (n + 10, n, {n + 1, n + 8, n + 9})
    none = load_tokenizer({"tokenizer.model": small_tiktoken()}, n)
    assert (none.n_words, none.bos_id, none.add_bos, none.stop_ids) == (n, -1, False, frozenset())
    assert none.decode(none.encode("the cow", bos=False, eos=False)) == "the cow"


def test_text_never_becomes_a_control_piece(small) -> None:
    """A failure means that a message can end its turn."""
    for piece in small.control_ids:
        ids = small.encode(f"a{piece}b{piece}", bos=False, eos=False)
        assert max(ids) < len(small_pieces())
        assert small.decode(ids) == f"a{piece}b{piece}"


def test_control_pieces_have_no_text(small) -> None:
    """A failure means that the end of a turn is shown to the reader."""
    hi = small.encode("hi", bos=True, eos=True)
    assert small.decode([*hi, small.control_ids["<|python_tag|>"]]) == "hi"


def test_a_character_of_several_tokens_comes_whole(small) -> None:
    """A failure means that a stream shows half a character."""
    ids = small.encode("h😀o", bos=False, eos=False)
    assert len(ids) == 6
    stream = Detokenizer(small.decode)
    assert [stream.push(i) for i in ids] == ["h", "", "", "", "😀", "o"]
    assert small.decode(ids[:3]) == "h\ufffd"


def test_a_grammar_sees_each_pieces_bytes(small) -> None:
    """A failure means answers to a grammar that hold other bytes than the grammar allowed."""
    assert piece_bytes(small) == small_pieces() + [b""] * 256


def test_pieces_are_named_as_in_a_tokenizer_json(small) -> None:
    """A failure means that log-probabilities name the same piece differently in two formats."""
    the, byte = small_pieces().index(b" the"), 0xE4
    assert (small.token_piece(the), token_text(small, the)) == ("Ġthe", " the")
    assert small.token_piece(byte) == "ä"
    assert small.token_piece(small.bos_id) == "<|begin_of_text|>"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        small.token_piece(small.n_words)


def test_the_first_line_tells_the_kinds_apart() -> None:
    """A failure means that one library reads the other's file."""
    assert is_tiktoken(small_tiktoken())
    assert is_tiktoken(small_tiktoken().replace(b"\n", b"\r\n"))
    assert not is_tiktoken((TINY / "tokenizer.model").read_bytes())
    for data in (b"", b"\n", b"AA==", b"<html> 1\n", b'{"a": 1}', b"AA== x\n", b"version https\n"):
        assert not is_tiktoken(data), data


def test_windows_line_ends_and_blank_lines_are_fine(small) -> None:
    """A failure means that a copied file isn't read, though nothing is missing."""
    data = small_tiktoken().replace(b"\n", b"\r\n\r\n")
    assert TiktokenTokenizer(data, "t").encode("the cow", True, True) == small.encode(
        "the cow", True, True
    )


def test_json_beside_it_wins_and_a_chat_format_is_chosen(small) -> None:
    """A failure means that added pieces of the other file are lost, or prompts of Llama 2's."""
    files = {"tokenizer.model": small_tiktoken()}
    tokenizer = load_tokenizer(files)
    assert choose_chat(None, files, tokenizer).name == "llama3"
    files |= hf_files(small_tiktoken(), "tokenizer.model")
    tokenizer = load_tokenizer(files)
    assert not isinstance(tokenizer, TiktokenTokenizer | Tokenizer)
    assert tokenizer.n_words == len(small_pieces()) + 256
    assert choose_chat(None, files, tokenizer).name == "llama3"


DAMAGED = {
    "no base64": (b"AA== 0\n<html> 1\n", r"line 2 of t is '<html> 1', not a piece in base64"),
    "wrong padding": (b"AA= 0\n", "line 1 of t is 'AA= 0'"),
    "three fields": (b"AA== 0 1\n", "line 1"),
    "one field": (b"AA== 0\nAQ==\n", "line 2 of t is 'AQ=='"),
    "a rank that is no number": (b"AA== 0\nAQ== one\n", "line 2"),
    "a huge rank": (b"AA== 0\nAQ== " + b"9" * 5000 + b"\n", "line 2"),
    "no UTF-8": (b"AA== 0\n\xff\x00\x1b 1\n", r"line 2 of t is '\?\?\? 1'|line 2 of t is '�"),
    "a rank twice": (b"AA== 0\nAQ== 0\n", "two pieces with the id 0"),
    "a rank left out": (b"AA== 0\nAQ== 2\n", "aren't different or not numbered from 0 on"),
    "a negative rank": (b"AA== 0\nAQ== -1\n", "aren't different or not numbered from 0 on"),
    "a piece twice": (b"AA== 0\nAA== 1\n", "aren't different or not numbered from 0 on"),
    "a byte missing": (rank_lines([bytes([i]) for i in range(255)]), "lacks 1 of the 256 single"),
    "cut off": (small_tiktoken()[:-9], "line|numbered"),
    "far too large": (b"AA== 0\n" * 3_000_000, "has 21,000,000 bytes, far more"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name: str) -> None:
    """A failure means a crash in foreign code, or a tokenizer with wrong pieces."""
    data, message = DAMAGED[name]
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message):
        TiktokenTokenizer(data, "t")
    assert time.monotonic() - begin < 2


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_damage_is_a_clear_error_or_harmless(data) -> None:
    """A failure means that a damaged file raises something else than ValueError."""
    content = bytearray(small_tiktoken())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        tokenizer = TiktokenTokenizer(bytes(content), "t")
    except ValueError as error:
        assert "t" in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("the cow ä", False, False)) == "the cow ä"


def test_the_missing_package_is_named(monkeypatch) -> None:
    """A failure means an ImportError that doesn't say what to install."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"needs the package tiktoken: pip install 'llama\[form"):
        TiktokenTokenizer(small_tiktoken(), "t")


def test_the_json_is_what_transformers_reads(tmp_path) -> None:
    """A failure means that a converted directory can't be used by transformers."""
    transformers = pytest.importorskip("transformers")
    for name, data in hf_files(small_tiktoken(), "t").items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer.model").write_bytes(small_tiktoken())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = TiktokenTokenizer(small_tiktoken(), "t")
    for text in ("the cow and the user's ä\n\n 0123", "  hello", ""):
        assert theirs(text).input_ids == ours.encode(text, bos=True, eos=False)
    assert theirs.decode(theirs("the cow").input_ids, skip_special_tokens=True) == "the cow"
