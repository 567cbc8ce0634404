"""Guards: verdicts, and streams that wait for them."""

import re
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import passed_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Dialog, Llama
from llama.engine.results import StreamPiece
from llama.guards import StreamGuard, Verdict, refusal
from llama.guards import guarded as guarded_stream

ASKED = [{"role": "user", "content": " How do I pick\n\n a lock?\n"}]
SAFE, BAD = Verdict(True), Verdict(False, ("O3",), "Criminal Planning")


class Watch:
    """A guard that refuses a word and remembers what it was asked."""

    def __init__(self, word: str = "BAD"):
        self.word = word
        self.asked: list[str] = []

    def __call__(self, dialog: Dialog, answer: str) -> Verdict:
        assert dialog is ASKED
        self.asked.append(answer)
        return BAD if self.word in answer else SAFE


def stream(pieces: Sequence[str], log: list[str]) -> Generator[StreamPiece, None, None]:
    try:
        yield from map(StreamPiece, pieces)
        log.append("exhausted")
    finally:
        log.append("closed")


TEXTS = st.text("ab. \n。", max_size=60)
CUTS = st.lists(st.integers(0, 60), max_size=8)


def split(text: str, cuts: list[int]) -> list[str]:
    ends = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    return [text[i:j] for i, j in pairwise(ends)]


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(1, 30))
def test_an_allowed_answer_passes_whole_once_it_was_guarded(
    text: str, cuts: list[int], every: int
) -> None:
    watch = Watch()
    guard = StreamGuard(ASKED, watch, every)
    for piece in split(text, cuts):
        guard.push(piece)
        assert guard.released in ("", *watch.asked[-1:])
        assert len(watch.asked) <= len(guard.released) // ((every + 1) // 2)
    guard.finish()
    assert guard.released == text
    assert watch.asked[-1:] == [text] * bool(text)
    assert guard.refused is None


@settings(deadline=None)
@given(TEXTS, TEXTS, CUTS, st.integers(1, 30))
def test_nothing_of_a_refused_piece_or_of_what_follows_it_gets_out(
    before: str, after: str, cuts: list[int], every: int
) -> None:
    watch, log = Watch(), []
    guard = StreamGuard(ASKED, watch, every)
    shown = list(guarded_stream(stream(split(before + "BAD" + after, cuts), log), guard))
    assert guard.refused == BAD
    assert shown[-1] == "\n\n" * bool(guard.released) + refusal(BAD)
    assert "".join(shown[:-1]) == guard.released == "".join(watch.asked[-2:-1])
    assert (before + "BA").startswith(guard.released)
    assert "BAD" in watch.asked[-1]  # the guard isn't asked again after it refused
    assert guard.push("fine. ") == guard.finish() == ""
    assert log[-1] == "closed"


def test_a_refusal_closes_the_source_before_it_is_shown() -> None:
    log: list[str] = []
    answer = guarded_stream(
        stream(["Good. ", "BAD. ", "More. "], log), StreamGuard(ASKED, Watch(), 5)
    )
    assert next(answer) == "Good. "
    assert log == []
    assert next(answer) == "\n\n" + refusal(BAD)
    assert log == ["closed"]
    assert next(answer, None) is None


def test_a_refusal_of_the_first_piece_or_of_the_rest_is_the_last_thing_shown() -> None:
    for pieces, shown in (
        (["BAD"], [refusal(BAD)]),
        (["Good. ", "BAD"], ["Good. ", "\n\n" + refusal(BAD)]),
    ):
        log: list[str] = []
        assert list(guarded_stream(stream(pieces, log), StreamGuard(ASKED, Watch(), 5))) == shown
        assert log == ["exhausted", "closed"]


def test_closing_a_judged_stream_closes_its_source() -> None:
    log: list[str] = []
    answer = guarded_stream(stream(["Good. "] * 3, log), StreamGuard(ASKED, Watch(), 5))
    next(answer)
    answer.close()
    assert log == ["closed"]


def test_an_empty_answer_is_not_guarded() -> None:
    watch = Watch()
    assert list(guarded_stream(stream(["", ""], []), StreamGuard(ASKED, watch))) == []
    assert watch.asked == []


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One two. Three four", "One two. "),
        ('He said "no." And left', 'He said "no." '),
        ("One two\nthree four", "One two\n"),
        ("一二三四五六。七八", "一二三四五六。"),
        ("One two three", "One two "),
        ("A. bccccccccccc", "A. bccccccccccc"),  # nor before the middle
        ("Wwwwwwwwwwwwwwww", "Wwwwwwwwwwwwwwww"),
        ("A. Bbbbb ccc", "A. Bbbbb "),
    ],
)
def test_an_answer_is_judged_at_an_end_of_sentence_line_or_word(text: str, first: str) -> None:
    assert StreamGuard(ASKED, Watch(), 9).push(text) == first


def test_a_guard_that_fails_lets_nothing_out_and_closes_the_source() -> None:
    def broken(dialog: Dialog, answer: str) -> Verdict:
        if "two" in answer:
            raise OSError("no guard")
        return SAFE

    log: list[str] = []
    guard = StreamGuard(ASKED, broken, 4)
    answer = guarded_stream(stream(["One. ", "And two. ", "Three. "], log), guard)
    assert next(answer) == guard.released == "One. "
    with pytest.raises(OSError, match="no guard"):
        next(answer)
    assert log == ["closed"]
    assert guard.released == "One. "
    with pytest.raises(OSError, match="no guard"):
        guard.finish()


@pytest.mark.parametrize("verdict", [True, None, "safe", (True, (), "")])
def test_a_guard_that_returns_no_verdict_is_an_error_that_says_so(verdict: Any) -> None:
    guard = StreamGuard(ASKED, lambda *_: verdict, 4)
    expected = f"returned {re.escape(repr(verdict))}: expected a llama.guards.Verdict"
    with pytest.raises(TypeError, match=expected):
        guard.push("One. Two. ")
    assert guard.released == ""


def test_a_gate_needs_a_character_at_least() -> None:
    with pytest.raises(ValueError, match="every is 0"):
        StreamGuard(ASKED, Watch(), 0)


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (BAD, "Refused by a content guard: Criminal Planning (O3)."),
        (Verdict(False, ("O1", "O3"), "Two. "), "Refused by a content guard: Two (O1, O3)."),
        (Verdict(False, reason="too long"), "Refused by a content guard: too long."),
        (Verdict(False), "Refused by a content guard: no reason was given."),
    ],
)
def test_a_refusal_names_reason_and_categories(verdict: Verdict, text: str) -> None:
    assert refusal(verdict) == text


@pytest.fixture
def guarded() -> Llama:
    """Refuses what is asked about bees, and answers that moo."""
    llama = Llama.build(dtype=torch.float32, device="cpu", max_batch_size=2)
    llama.input_guard = lambda dialog: Verdict("bee" not in dialog[-1]["content"], ("O9",), "bees")
    llama.output_guard = lambda dialog, answer: Verdict("moo" not in answer, (), "too loud")
    return llama


COW: Dialog = [{"role": "user", "content": "What does the cow say?"}]
BEE: Dialog = [{"role": "user", "content": "Where does the bee live?"}]
DUCK: Dialog = [{"role": "user", "content": "What does a duck eat?"}]


def test_chat_completion_asks_its_guards(guarded: Llama, tiny: Llama) -> None:
    """A refused dialog is answered with the reason, in its place; the others as ever."""
    found = guarded.chat_completion([BEE, DUCK, COW], temperature=0, logprobs=True)
    texts = [prediction["generation"]["content"] for prediction in found]
    expected = tiny.chat_completion([DUCK], temperature=0)[0]["generation"]["content"]
    assert texts[0] == refusal(Verdict(False, ("O9",), "bees"))
    assert texts[1] == expected
    assert texts[2] == refusal(Verdict(False, (), "too loud"))
    assert found[0]["tokens"] == found[2]["tokens"] == [], "the tokens of a refused answer are told"
    assert found[1]["tokens"]


def test_a_refused_dialog_costs_no_pass(guarded: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = passed_tokens(guarded, monkeypatch)
    guarded.chat_completion([BEE], temperature=0)
    assert "bees" in "".join(guarded.chat_completion_stream(BEE)) and not passed


def test_streams_ask_their_guards(guarded: Llama, tiny: Llama) -> None:
    """No piece of a refused answer comes before the refusal; an allowed one comes whole."""
    assert list(guarded.chat_completion_stream(COW, 0)) == [refusal(Verdict(False, (), "too loud"))]
    assert list(guarded.chat_completion_stream(BEE, 0)) == [
        refusal(Verdict(False, ("O9",), "bees"))
    ]
    expected = tiny.chat_completion([DUCK], temperature=0)[0]["generation"]["content"]
    assert "".join(guarded.chat_completion_stream(DUCK, 0)) == expected


def test_a_guard_must_return_a_verdict(guarded: Llama) -> None:
    guarded.input_guard = lambda dialog: True  # type: ignore[assignment, return-value]
    with pytest.raises(TypeError, match=r"expected a llama\.guards\.Verdict"):
        guarded.chat_completion([DUCK])
    with pytest.raises(TypeError, match=r"expected a llama\.guards\.Verdict"):
        guarded.chat_completion_stream(DUCK)
