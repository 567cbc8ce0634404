"""Text streams: pieces join to the text, no half characters, no stop strings."""

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_tokenizers import byte_level, structure_ids

from llama import Tokenizer
from llama.engine.detokenizer import Detokenizer
from llama.generation import TINY
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer
from llama.tokenizers.control import with_marks


def run(stream: Detokenizer, ids: list[int]) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


def test_pieces_join_to_the_decoded_text_for_any_ids(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, t.n_words - 1), max_size=40), st.booleans())
    def check(ids: list[int], infilling: bool) -> None:
        decode = t.decode_infilling if infilling else t.decode
        stream = Detokenizer(decode)
        pieces = run(stream, ids)
        assert "".join(pieces) == decode(ids) == stream.text
        assert stream.n_tokens == len(ids)

    check()


def test_pieces_in_context_continue_the_context(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    ids = t.encode("Tom has a kite.", bos=True, eos=False)
    for cut in range(1, len(ids)):
        pieces = run(Detokenizer(t.decode, context=ids[:cut]), ids[cut:])
        assert t.decode(ids[:cut]) + "".join(pieces) == "Tom has a kite."


def test_characters_of_several_bytes_arrive_whole(tiny_tokenizer: Tokenizer) -> None:
    text = "a€😀語é b"
    pieces = run(Detokenizer(tiny_tokenizer.decode), tiny_tokenizer.encode(text, False, False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_shown_as_such(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("a€", False, False)[:-1]
    assert "".join(run(Detokenizer(tiny_tokenizer.decode), ids)) == tiny_tokenizer.decode(ids)
    assert tiny_tokenizer.decode(ids).endswith("\ufffd")


def test_nothing_of_a_stop_string_leaks(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    words = st.sampled_from(["a", "b", "ab", "aab", " ", "€", "\n", "c"])

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(words, max_size=20).map("".join),
        st.lists(st.lists(words, min_size=1, max_size=4).map("".join), min_size=1, max_size=3),
    )
    def check(text: str, stop: list[str]) -> None:
        ids = t.encode_infilling(text)
        stream = Detokenizer(t.decode_infilling, stop)
        released = ""
        for token in ids:
            released += stream.push(token)
            assert not any(s in released for s in stop)
            if stream.stopped:
                break
        released += stream.flush()
        # The first token that completes a stop string ends the text.
        grown = (t.decode_infilling(ids[:n]) for n in range(len(ids) + 1))
        ended = next((g for g in grown if any(s in g for s in stop)), None)
        at = len(text) if ended is None else min(ended.find(s) for s in stop if s in ended)
        assert released == stream.text == text[:at]
        assert stream.stopped in (stop if ended is not None else [None])
        kept = t.decode_infilling(ids[: stream.n_tokens])
        assert text[:at].startswith(kept)

    check()


def test_text_before_a_stop_string_is_not_held_longer_than_needed(
    tiny_tokenizer: Tokenizer,
) -> None:
    t = tiny_tokenizer
    stream = Detokenizer(t.decode_infilling, ["cow!"])
    pieces = [stream.push(i) for i in t.encode_infilling("the cat")]
    assert "".join(pieces) == "the cat"


class NaiveStream:
    """Looks for stop strings in all of the text, and for every beginning of theirs at its end."""

    def __init__(self, stop: list[str]):
        self.text, self.stop = "", stop
        self.stopped: str | None = None
        self.given, self.ends = 0, list[int]()

    def push(self, word: str) -> str:
        self.text += word
        self.ends.append(len(self.text))
        # The first that begins; of those that begin together, the shortest.
        found = [(at, len(s), s) for s in self.stop if (at := self.text.find(s)) >= 0]
        if found:
            at, _, self.stopped = min(found)
            self.text = self.text[:at]
        return self.give(len(self.text) - (0 if found else self.held_back()))

    def flush(self) -> str:
        return self.give(len(self.text))

    @property
    def n_tokens(self) -> int:
        return sum(end <= self.given for end in self.ends)

    def held_back(self) -> int:
        longest = max(map(len, self.stop), default=0)
        lengths = range(min(len(self.text), longest), 0, -1)
        return next((n for n in lengths if any(s.startswith(self.text[-n:]) for s in self.stop)), 0)

    def give(self, end: int) -> str:
        piece = self.text[self.given : end]
        self.given = max(self.given, end)
        return piece


@pytest.mark.slow
def test_stop_strings_are_found_as_by_comparing_all(tiny_tokenizer: Tokenizer) -> None:
    """Strings of two characters, and tokens of several, have many matches that almost succeed."""
    tokens = st.text("ab", min_size=1, max_size=5)

    @settings(max_examples=500, deadline=None)
    @given(
        st.lists(tokens, max_size=30), st.lists(st.text("ab", min_size=1, max_size=12), max_size=4)
    )
    def check(words: list[str], stop: list[str]) -> None:
        def decode(ids: Sequence[int]) -> str:
            return "".join(words[i] for i in ids)

        stream, naive = Detokenizer(decode, stop), NaiveStream(stop)
        for i, word in enumerate(words):
            assert stream.push(i) == naive.push(word)
            assert (stream.text, stream.stopped) == (naive.text, naive.stopped)
            assert stream.n_tokens == naive.n_tokens
            if stream.stopped:
                break
        assert stream.flush() == naive.flush()
        assert (stream.text, stream.n_tokens) == (naive.text, naive.n_tokens)

    check()


def test_a_long_stop_string_takes_no_longer() -> None:
    """Neither to begin with nor for each token, though all of the text is held back for it."""
    begin = time.process_time()
    for _ in range(10):
        stream = Detokenizer(lambda ids: "a" * len(ids), ["a" * 1_000_000] * 16)
        assert not any(stream.push(i) for i in range(200))
        assert stream.flush() == "a" * 200
    assert time.process_time() - begin < 2


def test_a_kept_stop_string_is_part_of_the_text_with_its_tokens() -> None:
    """A failure means that ``include_stop`` loses characters, or tokens, or shows more than it."""
    words = ["a", "b", "cd", "x"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids)

    stream = Detokenizer(decode, ["bc", "x"], kept=["bc"])
    assert [stream.push(i) for i in (0, 1, 2)] == ["a", "", "bc"]
    assert (stream.text, stream.stopped, stream.flush()) == ("abc", "bc", "")
    # The last token says more than the stop string, which is part of it all the same.
    assert stream.n_tokens == 3
    other = Detokenizer(decode, ["bc", "x"], kept=["bc"])
    assert [other.push(i) for i in (0, 3)] == ["a", ""]
    assert (other.text, other.stopped, other.n_tokens) == ("a", "x", 1)


def marked(tokenizer: BaseTokenizer, marks: dict[int, str], **more: Any) -> Detokenizer:
    return Detokenizer(with_marks(tokenizer.decode, tokenizer, marks), marks=marks, **more)


class TestMarks:
    """Control pieces that are written out, in SentencePiece's vocabularies and byte-level ones."""

    @pytest.fixture(params=["sentencepiece", "spaced", "byte-level"])
    def tokenizer(self, request: pytest.FixtureRequest) -> BaseTokenizer:
        if request.param == "byte-level":
            return load_tokenizer({"tokenizer.json": json.dumps(byte_level()).encode()})
        tokenizer = Tokenizer(TINY / "tokenizer.model")
        tokenizer.spaced = request.param == "spaced"
        return tokenizer

    @staticmethod
    def two(tokenizer: BaseTokenizer) -> tuple[str, str]:
        first, second = list(tokenizer.control_ids)[-2:]
        return first, second

    def test_pieces_join_to_the_text_that_was_read(self, tokenizer: BaseTokenizer) -> None:
        """A failure means that a tool call's mark is lost, or stands in another place."""
        call, silent = self.two(tokenizer)
        marks = {tokenizer.control_ids[call]: call}
        for text in (
            f"{call}",
            f"the cat{call} sat{silent} on",
            f'{call}{call}{{"name": 1}}\n{call}é{silent}语{call}',
        ):
            ids = structure_ids(tokenizer, text)
            stream = marked(tokenizer, marks)
            pieces = run(stream, ids)
            written = "".join(pieces).split()
            assert "".join(written) == "".join(text.replace(silent, "").split())
            if silent not in text:
                assert "".join(pieces) == text
            assert stream.n_tokens == len(ids)
            # Each mark begins where its token does.
            begins = [stream.starts[i] for i, token in enumerate(ids) if token in marks]
            assert [stream.text[at : at + len(call)] for at in begins] == [call] * len(begins)

    def test_a_mark_ends_half_a_character(self, tokenizer: BaseTokenizer) -> None:
        """A failure means that bytes on both sides of a mark become one character behind it."""
        call, _ = self.two(tokenizer)
        mark = tokenizer.control_ids[call]
        half = tokenizer.encode_infilling("語")[:-1]
        stream = marked(tokenizer, {mark: call})
        pieces = run(stream, [*half, mark, *tokenizer.encode_infilling("a")])
        begin = tokenizer.decode_infilling(half)
        assert "".join(pieces) == f"{begin}{call}a" and begin.endswith("\ufffd")
        assert stream.starts == [0] * len(half) + [len(begin), len(begin + call)]

    def test_stop_strings_are_found_across_marks(self, tokenizer: BaseTokenizer) -> None:
        """A failure means that an answer can't be stopped at a tool call."""
        call, _ = self.two(tokenizer)
        ids = structure_ids(tokenizer, f"the{call}cat sat")
        stream = marked(tokenizer, {tokenizer.control_ids[call]: call}, stop=[f"e{call}c"])
        assert "".join(run(stream, ids)) == stream.text == "th" and stream.stopped

    def test_half_a_character_may_complete_a_stop_string(self, tokenizer: BaseTokenizer) -> None:
        """A failure means that a text goes on after a stop string that a mark has completed."""
        call, _ = self.two(tokenizer)
        mark = tokenizer.control_ids[call]
        half = tokenizer.encode_infilling("語")[:-1]
        stream = marked(tokenizer, {mark: call}, stop=["\ufffd"])
        assert "".join(run(stream, [*half, mark])) == stream.text == ""
        assert stream.stopped == "\ufffd"

    def test_a_mark_in_the_context_is_no_part_of_the_text(self, tokenizer: BaseTokenizer) -> None:
        """A failure means that a continuation repeats its prompt's mark."""
        call, _ = self.two(tokenizer)
        context = structure_ids(tokenizer, f"a{call}")
        stream = marked(tokenizer, {tokenizer.control_ids[call]: call}, context=context)
        assert "".join(run(stream, tokenizer.encode_infilling("bc"))) == "bc"
