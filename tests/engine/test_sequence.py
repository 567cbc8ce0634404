"""Sequences: what they take of what was drawn, and the pieces that streams yield."""

import pickle
from typing import Any

import pytest

from llama.engine.results import StreamPiece
from llama.engine.sequence import Sequence
from llama.sampling import SamplingParams


class Letters:
    """A tokenizer whose ids are letters, and one control piece."""

    control_ids = {"<end>": 1}  # noqa: RUF012
    spaced = False

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids if i > 1)

    decode_infilling = decode


OWN = frozenset({ord("."), "own"})  # the tokenizer's and the format's ends


def begun(max_new_tokens: int = 20, output: Any = "text", **params: Any) -> Sequence:
    settings = SamplingParams(**params)
    sequence = Sequence([ord("a")], settings, "seed", max_new_tokens, output, ends=OWN)
    sequence.begin(Letters())  # type: ignore[arg-type]
    return sequence


def append(sequence: Sequence, text: str, draft: str = "") -> str:
    """Append what was drawn for the next token and behind each token of the draft."""
    chosen = [(ord(char), -float(i)) for i, char in enumerate(text)]
    return sequence.append([ord(char) for char in draft], chosen)


class TestStreamPiece:
    def test_it_is_its_text(self) -> None:
        """A failure means that callers which print or join pieces break."""
        piece = StreamPiece("ab", (1, 2), (-0.5, -1.0), "stop")
        assert piece == "ab" and isinstance(piece, str)
        assert "".join([piece, "c"]) == "abc" and f"{piece}!" == "ab!"
        assert hash(piece) == hash("ab")

    def test_it_has_tokens_scores_and_a_reason(self) -> None:
        """A failure means that a stream can't be told from its text."""
        piece = StreamPiece("ab", (1, 2), (-0.5, -1.0), "stop")
        assert (piece.token_ids, piece.logprobs) == ([1, 2], [-0.5, -1.0])
        assert piece.finish_reason == "stop"

    def test_it_has_the_stop_that_ended_it(self) -> None:
        """A failure means that a stream's reader can't tell one stop from another."""
        assert StreamPiece("", finish_reason="stop", stop_reason="yz").stop_reason == "yz"
        assert StreamPiece("a").stop_reason is None

    def test_by_default_it_goes_on_and_has_none(self) -> None:
        """A failure means that pieces share a list, or that a stream seems to end."""
        piece, other = StreamPiece("a"), StreamPiece()
        piece.token_ids.append(3)
        assert other == "" and other.token_ids == other.logprobs == []
        assert piece.finish_reason is other.finish_reason is None

    def test_it_can_be_sent_to_another_process(self) -> None:
        """A failure means that a piece loses its tokens on the way."""
        piece = StreamPiece("ab", (1, 2), (-0.5, -1.0), "length")
        again = pickle.loads(pickle.dumps(piece))
        assert again == piece and vars(again) == vars(piece)


class TestAppend:
    def test_tokens_and_text(self) -> None:
        """A failure means that a token is lost between the draw and the text."""
        sequence = begun()
        assert [append(sequence, char) for char in "xyz"] == ["x", "y", "z"]
        assert Letters().decode(sequence.tokens) == sequence.text == "xyz"
        assert sequence.finish_reason is None

    @pytest.mark.parametrize(
        ("draft", "chosen", "kept"),
        [("bc", "bcd", "bcd"), ("bc", "bxd", "bx"), ("bc", "xcd", "x"), ("", "x", "x")],
    )
    def test_a_draft_is_kept_as_far_as_it_is_right(
        self, draft: str, chosen: str, kept: str
    ) -> None:
        """A failure means that prompt lookup changes the result."""
        sequence = begun()
        assert append(sequence, chosen, draft) == kept
        assert Letters().decode(sequence.tokens) == kept
        assert sequence.logprobs == [-float(i) for i in range(len(kept))]

    def test_a_stop_token_ends_it_and_is_left_out(self) -> None:
        """A failure means that the end of sequence is shown, or isn't one."""
        sequence = begun(stop_token_ids=[ord("!")])
        append(sequence, "x!z", "x!")
        assert (sequence.text, sequence.finish_reason) == ("x", "stop")
        assert Letters().decode(sequence.tokens) == "x"

    def test_the_last_token_that_has_room_ends_it(self) -> None:
        """A failure means that a sequence runs beyond its slot of the cache."""
        sequence = begun(max_new_tokens=2)
        append(sequence, "x")
        assert append(sequence, "yz", "y") == "y"
        assert (Letters().decode(sequence.tokens), sequence.finish_reason) == ("xy", "length")

    def test_a_stop_string_takes_its_tokens_with_it(self) -> None:
        """A failure means that tokens or scores don't fit the text."""
        sequence = begun(stop=["yz"])
        assert append(sequence, "x") + append(sequence, "y") == "x"  # which may be its beginning
        assert append(sequence, "z") == ""
        assert (sequence.text, sequence.finish_reason) == ("x", "stop")
        assert Letters().decode(sequence.tokens) == "x" and len(sequence.logprobs) == 1

    def test_what_was_held_back_comes_at_the_end(self) -> None:
        """A failure means that a text ends before its last characters."""
        sequence = begun(stop=["yz"], max_new_tokens=2)
        append(sequence, "x")
        assert append(sequence, "y") == "y"
        assert (sequence.text, sequence.finish_reason) == ("xy", "length")

    def test_ids_alone_are_not_decoded(self) -> None:
        """A failure means that ``generate`` spends time on texts that nobody reads."""
        sequence = begun(output="ids")
        assert append(sequence, "x") == sequence.text == ""
        assert sequence.n_decoded == len(sequence.tokens) == 1


class TestStops:
    END = "\x01"  # Letters' control piece <end>

    @pytest.mark.parametrize(
        ("drawn", "reason", "text"),
        [
            ("x!", ord("!"), "x"),
            ("x.", None, "x"),
            ("xyz", "yz", "x"),
            ("xown", None, "x"),
            (f"x{END}", "<end>", "x"),
            ("x<end>", "<end>", "x"),
        ],
    )
    def test_the_reason_is_the_callers_stop(
        self, drawn: str, reason: str | int | None, text: str
    ) -> None:
        """A failure means that a result doesn't say which stop was met, or names the format's."""
        sequence = begun(stop=["yz", "<end>", "own"], stop_token_ids=[33, 46, 1])
        append_all(sequence, drawn)
        assert (sequence.text, sequence.stop_reason) == (text, reason)
        assert sequence.finish_reason == "stop" and Letters().decode(sequence.tokens) == text
        assert len(sequence.logprobs) == len(sequence.tokens)

    @pytest.mark.parametrize(
        ("drawn", "text", "n_tokens"),
        [
            ("x!", "x", 1),  # an id has no text
            ("x.", "x", 1),
            ("xyz", "xyz", 3),
            ("xown", "x", 1),
            (f"x{END}", "x<end>", 2),
            ("x<end>", "x<end>", 6),
        ],
    )
    def test_an_included_stop_is_the_end_of_text_and_tokens(
        self, drawn: str, text: str, n_tokens: int
    ) -> None:
        """A failure means that text, tokens and scores don't fit, or the format's end is shown."""
        stop = {"stop": ["yz", "<end>", "own"], "stop_token_ids": [33, 46, 1]}
        sequence = begun(include_stop=True, **stop)
        assert append_all(sequence, drawn) == sequence.text == text
        assert len(sequence.tokens) == len(sequence.logprobs) == n_tokens
        assert sequence.finish_reason == "stop"

    def test_ids_alone_end_at_a_control_piece(self) -> None:
        """A failure means that without a text such a stop is passed over."""
        sequence = begun(output="ids", stop=["<end>"], stop_token_ids=[1], include_stop=True)
        append_all(sequence, f"x{self.END}")
        assert sequence.finish_reason == "stop" and sequence.stop_reason == "<end>"

    @pytest.mark.parametrize("drawn", ["xx", "xy"])
    def test_a_sequence_that_no_stop_ends_has_no_reason(self, drawn: str) -> None:
        """A failure means that a text cut by its length seems to be whole."""
        sequence = begun(2, stop=["yz"])
        append_all(sequence, drawn)
        assert (sequence.finish_reason, sequence.stop_reason) == ("length", None)

    def test_what_is_visible_is_written_out(self) -> None:
        """A failure means that a tool call's marks don't reach its parser."""
        sequence = begun(stop=["d>y"])
        sequence.visible = {1: "<end>"}
        sequence.begin(Letters())  # type: ignore[arg-type]
        assert append_all(sequence, f"x{self.END}") == "x<en"
        assert append_all(sequence, "y") == ""
        assert (sequence.text, sequence.stop_reason) == ("x<en", "d>y")


def append_all(sequence: Sequence, drawn: str) -> str:
    text = ""
    for char in drawn:
        assert sequence.finish_reason is None
        text += append(sequence, char)
    return text


def test_draws_depend_on_the_seed_and_the_place_alone() -> None:
    """A failure means that drafts, or who runs beside it, change what a sequence draws."""
    one, two = begun(), begun()
    ahead = [one.uniform(i) for i in range(4)]
    for number in ahead:
        assert two.uniform(0) == number
        append(two, "x")
    assert all(0 <= number < 1 for number in ahead) and len(set(ahead)) == 4


def test_a_draft_never_exceeds_the_room() -> None:
    """A failure means that a draft is checked which couldn't be kept."""
    params = SamplingParams(prompt_lookup_num_tokens=10)
    sequence = Sequence([ord(char) for char in "abcdefgh" * 3], params, "seed", 4)
    sequence.begin(Letters())  # type: ignore[arg-type]
    append(sequence, "a")
    assert Letters().decode(sequence.draft()) == "bc"  # and one more token behind it
    assert Letters().decode(sequence.draft(1)) == "b"
    assert sequence.draft(0) == []
    append(sequence, "bc", "b")
    assert sequence.draft() == []
    assert begun().draft() == []  # without prompt lookup
