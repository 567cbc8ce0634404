"""Guards: they check dialogs and answers, and hold back a stream until it is checked."""

import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import cast

from llama.chat.prompts import Dialog, Message, content_text
from llama.chat.roles import fold
from llama.engine.results import FinishReason, StreamPiece

_OF_TOOLS = ("tool_calls", "tool_call_id", "name")


@dataclass(frozen=True)
class Verdict:
    """A guard's decision.

    Attributes:
        allowed: True if the text may be released.
        categories: short names of the categories that it violates.
        reason: the same in words.
    """

    allowed: bool
    categories: tuple[str, ...] = ()
    reason: str = ""


InputGuard = Callable[[Dialog], Verdict]
"""Checks a dialog before it is answered, as ``judged`` returns it."""

OutputGuard = Callable[[Dialog, str], Verdict]
"""Checks an answer to a dialog, or the beginning of one."""


def judged(dialog: Dialog) -> tuple[Dialog, str]:
    """Return a dialog as guards read it, and the beginning of its answer, if it ends with one.

    There is at most one system message, which is first, and user and assistant alternate, the user
    last. Calls of tools are the assistant's text, and their results the user's.
    """
    messages = []
    for message in dialog:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        texts = [content_text(message), *(f"{c['name']}({c['arguments']})" for c in calls)]
        fields = {key: value for key, value in message.items() if key not in _OF_TOOLS}
        role = "user" if message["role"] in ("tool", "ipython") else message["role"]
        text = "\n\n".join(filter(None, texts))
        messages.append(cast(Message, {**fields, "role": role, "content": text}))
    folded = fold(messages)
    begun = content_text(folded.pop()) if folded and folded[-1]["role"] == "assistant" else ""
    n_system = sum(message["role"] == "system" for message in folded)
    if len(folded) == n_system or folded[n_system]["role"] == "assistant":
        folded.insert(n_system, Message(role="user", content=""))
    return (dialog if folded == list(dialog) else folded), begun


def checked_verdict(verdict: object) -> Verdict:
    """Return a guard's verdict; raise ``TypeError`` for anything else, so that nothing passes."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the guard returned {verdict!r}: expected a llama.guards.Verdict")
    return verdict


def refusal(verdict: Verdict) -> str:
    """Return the answer to a refused request."""
    reason = verdict.reason.strip().rstrip(".") or "no reason was given"
    categories = f" ({', '.join(verdict.categories)})" if verdict.categories else ""
    return f"Refused by a content guard: {reason}{categories}."


def input_refusal(guard: InputGuard | None, dialog: Dialog) -> str | None:
    """Return the answer to a dialog that a guard refuses; None to one that passes."""
    if guard is None:
        return None
    messages, begun = judged(dialog)
    if begun:  # it comes from where the question does
        *before, last = messages
        text = f"{content_text(last)}\n\n{begun}".strip()
        messages = [*before, cast(Message, {**last, "content": text})]
    verdict = checked_verdict(guard(messages))
    return None if verdict.allowed else refusal(verdict)


def output_refusal(guard: OutputGuard | None, dialog: Dialog, answer: str) -> str | None:
    """Return the text that replaces an answer that a guard refuses; None for one that passes."""
    if guard is None:
        return None
    messages, begun = judged(dialog)
    verdict = checked_verdict(guard(messages, begun + answer))
    return None if verdict.allowed else refusal(verdict)


# Where an answer is split for the guard: after a sentence or line, else after a word.
_CUTS = (re.compile(r"(?s).*(?:[.!?…][\"'”’)\]]*\s|[。！？\n])"), re.compile(r"(?s).*\s"))


class StreamGuard:
    """Holds back a streamed answer until a guard has allowed it, one piece after another.

    ``released`` is the text that the guard has allowed so far. ``refused`` is the verdict that
    ended the answer, or None; the text from there on is never released.
    """

    def __init__(self, dialog: Dialog, guard: OutputGuard, every: int = 200):
        """Begin an answer.

        Args:
            dialog: the dialog that is answered.
            guard: called with the whole answer so far each time.
            every: characters to hold back between calls of the guard: fewer release text sooner
                and call it more often.

        Raises:
            ValueError: ``every`` isn't 1 or more.
        """
        if every < 1:
            raise ValueError(f"every is {every!r}: expected a number of characters, 1 or more")
        self.released = ""
        self.refused: Verdict | None = None
        self._dialog, self._begun = judged(dialog)
        self._guard = guard
        self._every = every
        self._held = ""

    def is_due(self, piece: str) -> bool:
        """Return whether ``push`` of a piece will call the guard."""
        return len(self._held) + len(piece) >= self._every

    def push(self, piece: str) -> str:
        """Add more of the answer, and return the text that may be shown now.

        Raises:
            TypeError: the guard returned no ``Verdict``. Its own exceptions are passed on.
        """
        due = self.is_due(piece)
        self._held += piece
        return self._judge(self._cut()) if due else ""

    def finish(self) -> str:
        """End the answer, and return the rest of it if that is allowed; raise as ``push``."""
        return self._judge(len(self._held)) if self._held else ""

    def _cut(self) -> int:
        # Not before the middle: the guard would soon be called again for little more text.
        for cut in _CUTS:
            if match := cut.match(self._held, self._every // 2):
                return match.end()
        return len(self._held)

    def _judge(self, end: int) -> str:
        if self.refused:
            return ""
        piece = self._held[:end]
        verdict = checked_verdict(self._guard(self._dialog, self._begun + self.released + piece))
        if not verdict.allowed:
            self.refused = verdict
            return ""
        self.released, self._held = self.released + piece, self._held[end:]
        return piece


def guarded(
    pieces: Generator[StreamPiece, None, None], guard: StreamGuard
) -> Generator[StreamPiece, None, None]:
    """Yield an answer's pieces as a guard releases them.

    After a refusal ``pieces`` is closed, and the last piece contains the refusal.
    """
    end: tuple[FinishReason | None, str | int | None] = (None, None)
    token_ids: list[int] = []
    logprobs: list[float] = []
    with closing(pieces):
        for piece in pieces:
            token_ids, logprobs = token_ids + piece.token_ids, logprobs + piece.logprobs
            end = piece.finish_reason, piece.stop_reason
            if text := guard.push(piece):
                yield StreamPiece(text, token_ids, logprobs)
                token_ids, logprobs = [], []
            if guard.refused:
                break
    # The stream is closed by now, so that neither the guard nor the reader keeps its slot.
    text = guard.finish()
    if guard.refused:
        token_ids, logprobs, end = [], [], ("content_filter", None)
        text += "\n\n" * bool(guard.released) + refusal(guard.refused)
    if text or end[0] is not None:
        yield StreamPiece(text, token_ids, logprobs, *end)
