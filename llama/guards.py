"""Guards: they judge a dialog and its answer, and hold a stream back until it is judged."""

import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from llama.chat.prompts import Dialog
from llama.engine.sequence import FinishReason, StreamPiece


@dataclass(frozen=True)
class Verdict:
    """A guard's judgement.

    Attributes:
        allowed: whether the text may pass.
        categories: short names of what it violates.
        reason: the same for a person to read.
    """

    allowed: bool
    categories: tuple[str, ...] = ()
    reason: str = ""


InputGuard = Callable[[Dialog], Verdict]
"""Judges a dialog before it is answered."""

OutputGuard = Callable[[Dialog, str], Verdict]
"""Judges an answer to a dialog, or its beginning."""


def checked_verdict(verdict: object) -> Verdict:
    """Return a guard's verdict; raise ``TypeError`` for anything else, so that nothing passes."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the guard returned {verdict!r}: expected a llama.guards.Verdict")
    return verdict


def refusal(verdict: Verdict) -> str:
    """Return the answer to a request that was refused."""
    reason = verdict.reason.strip().rstrip(".") or "no reason was given"
    categories = f" ({', '.join(verdict.categories)})" if verdict.categories else ""
    return f"Refused by a content guard: {reason}{categories}."


def input_refusal(guard: InputGuard | None, dialog: Dialog) -> str | None:
    """Return the answer to a dialog that a guard refuses, None to one that passes."""
    if guard is None:
        return None
    verdict = checked_verdict(guard(dialog))
    return None if verdict.allowed else refusal(verdict)


def output_refusal(guard: OutputGuard | None, dialog: Dialog, answer: str) -> str | None:
    """Return what takes the place of an answer that a guard refuses, None for one that passes."""
    return input_refusal(guard and (lambda dialog: guard(dialog, answer)), dialog)


# Where an answer is cut to be judged: behind a sentence or line, else behind a word.
_CUTS = (re.compile(r"(?s).*(?:[.!?…][\"'”’)\]]*\s|[。！？\n])"), re.compile(r"(?s).*\s"))


class StreamGuard:
    """Holds back a streamed answer until a guard has allowed it, one piece after another.

    ``released`` is the text that was given out: the guard allowed the answer as far as that.
    ``refused`` is the verdict that ended the answer, if one did: what it was about and what came
    later is never given out.
    """

    def __init__(self, dialog: Dialog, guard: OutputGuard, every: int = 200):
        """Begin an answer.

        Args:
            dialog: what is answered.
            guard: is given the whole answer so far each time.
            every: characters that are held back until the guard is asked: fewer show text sooner
                and ask more often.

        Raises:
            ValueError: ``every`` isn't 1 or more.
        """
        if every < 1:
            raise ValueError(f"every is {every!r}: expected a number of characters, 1 or more")
        self.released = ""
        self.refused: Verdict | None = None
        self._dialog = dialog
        self._guard = guard
        self._every = every
        self._held = ""

    def is_due(self, piece: str) -> bool:
        """Return whether ``push`` of a piece will ask the guard."""
        return len(self._held) + len(piece) >= self._every

    def push(self, piece: str) -> str:
        """Take more of the answer; returns the text that may be shown now.

        Raises:
            TypeError: the guard returned no ``Verdict``. Whatever else it raises is passed on.
        """
        due = self.is_due(piece)
        self._held += piece
        return self._judge(self._cut()) if due else ""

    def finish(self) -> str:
        """End the answer; returns the rest of it, if that is allowed. Raises as ``push``."""
        return self._judge(len(self._held)) if self._held else ""

    def _cut(self) -> int:
        # Not before the middle: the guard would soon be asked again for little more.
        for cut in _CUTS:
            if found := cut.match(self._held, self._every // 2):
                return found.end()
        return len(self._held)

    def _judge(self, end: int) -> str:
        if self.refused:
            return ""
        piece = self._held[:end]
        verdict = checked_verdict(self._guard(self._dialog, self.released + piece))
        if not verdict.allowed:
            self.refused = verdict
            return ""
        self.released, self._held = self.released + piece, self._held[end:]
        return piece


def guarded(
    pieces: Generator[StreamPiece, None, None], guard: StreamGuard
) -> Generator[StreamPiece, None, None]:
    """Yield an answer's pieces as a guard lets them pass.

    After a refusal ``pieces`` is closed, and the last piece says what happened.
    """
    end: FinishReason | None = None
    token_ids: list[int] = []
    logprobs: list[float] = []
    with closing(pieces):
        for piece in pieces:
            token_ids, logprobs = token_ids + piece.token_ids, logprobs + piece.logprobs
            end = piece.finish_reason
            if text := guard.push(piece):
                yield StreamPiece(text, token_ids, logprobs)
                token_ids, logprobs = [], []
            if guard.refused:
                break
    # The model that writes is free by now: neither the guard nor the reader keeps it waiting.
    text = guard.finish()
    if guard.refused:
        token_ids, logprobs, end = [], [], "stop"
        text += "\n\n" * bool(guard.released) + refusal(guard.refused)
    if text or end is not None:
        yield StreamPiece(text, token_ids, logprobs, end)
