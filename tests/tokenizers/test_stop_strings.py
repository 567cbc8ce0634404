"""Stop strings: found as by comparing all, in steps that only the text's length decides."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama.tokenizers import stop_strings
from llama.tokenizers.stop_strings import Match, StopStrings

SHORT = st.text("abc", min_size=1, max_size=6)


def naive(before: str, piece: str, stops: list[str]) -> Match | None:
    """The match that begins first, of those that end in the piece; then the shortest."""
    text = before + piece
    found = [
        Match(at - len(before), stop)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > len(before)
    ]
    return min(found, key=lambda match: (match.start, len(match.stop)), default=None)


@settings(max_examples=400, deadline=None, database=None)
@example(["abcabc", "abd"], ["abcab", "bcX", "bcabd", "cabda", "d"])
@example(["aaab"], ["aab", "aa", "aaaa"])
@example(["xabc", "abcd"], ["bc", "b", "abcd"])
@given(st.lists(st.text("abcd", max_size=5), max_size=12), st.lists(SHORT, max_size=6))
def test_matches_are_those_found_by_comparing_all(pieces: list[str], stops: list[str]) -> None:
    """A failure means that a text runs on beyond a stop string, or ends at none."""
    automaton, before = StopStrings(stops), ""
    for piece in pieces:
        assert automaton.find(piece) == naive(before, piece, stops)
        before += piece
        # What may be held back: the longest end of the text that begins a stop string.
        begun = (n for n in range(len(before), 0, -1) if any_begins(before[-n:], stops))
        assert automaton.n_matched == next(begun, 0)


def any_begins(text: str, stops: list[str]) -> bool:
    return any(stop.startswith(text) for stop in stops)


def steps(call: Callable[[], Any]) -> int:
    """The number of lines that the module runs in a call."""
    n = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal n
        if frame.f_code.co_filename != stop_strings.__file__:
            return None
        n += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return n


def search(stops: list[str], text: str) -> Callable[[], Any]:
    automaton = StopStrings(stops)
    return lambda: [automaton.find(char) for char in text]


LONG = "ab" * 400
# Texts and stop strings that almost match at every character.
HOSTILE: dict[str, tuple[list[str], str]] = {
    "one letter": (["a" * 1000 + "b"], "a" * 500),
    "all endings": ([LONG[i:] + "c" for i in range(len(LONG))], LONG),
    "many beginnings": (["a" * n + "b" + "c" * n for n in range(1, 60)], ("a" * 59 + "b") * 10),
    "many unlike": ([f"{i:04}" for i in range(3000)], "0123456789" * 50),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_twice_the_text_takes_twice_the_steps(name: str) -> None:
    """A failure means that a long answer, or a hostile request, slows all others down."""
    stops, text = HOSTILE[name]
    once, twice = steps(search(stops, text)), steps(search(stops, text * 2))
    assert 0 < twice < 2.2 * once
    assert once < 120 * len(text), "however many stop strings there are"


def test_a_thousand_strings_take_the_steps_of_one() -> None:
    """A failure means that each token is compared with every stop string."""
    text = "the cat sat on the mat. " * 40
    one = steps(search(["the dog"], text))
    many = steps(search(["the dog", *(f"the {i} dogs" for i in range(2000))], text))
    assert one > len(text) / 2 and many < 1.5 * one


def test_a_text_without_their_first_letters_is_passed_over() -> None:
    """A failure means that every character costs a step where nothing can match."""
    assert steps(search(["\n"], "x" * 1000)) < 4 * 1000
    automaton = StopStrings(["\n"])
    assert steps(lambda: automaton.find("x" * 1000)) < 10


def test_without_strings_nothing_is_found() -> None:
    automaton = StopStrings([])
    assert automaton.find("abc") is None and automaton.n_matched == 0
