"""Prompt-lookup decoding: tokens that followed the last ones earlier may follow them again.

A sequence's next tokens are drafted from its own text, and one forward pass checks all of them.
That costs little more than a pass for one token, and gives the same tokens as decoding without
drafts, apart from rounding in half precision
(https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Iterable

_LENGTHS = (3, 2)  # of the last tokens that are looked for, the longer first
FIRST_DRAFT = 3  # tokens; with the last token, four: on CPUs as fast as one
LONGEST_PAUSE = 32


class PromptLookup:
    """Drafts the next tokens of one sequence.

    A draft that is accepted makes the next one longer. One that is rejected makes it short and is
    followed by a pause, the longer the more are rejected in a row, so that text which doesn't
    repeat itself costs almost nothing.

    Args:
        prompt: the sequence's tokens so far.
        longest: tokens in a draft, at most.
    """

    def __init__(self, prompt: Iterable[int], longest: int):
        self._longest = longest
        self._length = min(FIRST_DRAFT, longest)
        self._pause = 0
        self._resume_at = 0  # no draft for texts shorter than this
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some tokens: where their continuation begins
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Add a token to the text."""
        for length in _LENGTHS:
            if len(self._text) >= length:
                self._after[tuple(self._text[-length:])] = len(self._text)
        self._text.append(token)

    def draft(self, limit: int) -> list[int]:
        """Propose at most ``limit`` tokens that may come next."""
        if len(self._text) < self._resume_at:
            return []
        for length in _LENGTHS:
            begin = self._after.get(tuple(self._text[-length:]))
            if begin is not None:
                period = len(self._text) - begin  # where the text ends, it may begin again
                count = min(self._length, limit)
                return [self._text[begin + i % period] for i in range(count)]
        return []

    def learn(self, n_drafted: int, n_accepted: int) -> None:
        """Adapt to the number of tokens of the last draft that were accepted."""
        if not n_drafted:
            return
        doubled = 2 * n_drafted if n_accepted == n_drafted else 0
        self._length = min(max(FIRST_DRAFT, n_accepted, doubled), self._longest)
        self._pause = 0 if n_accepted else min(2 * self._pause + 1, LONGEST_PAUSE)
        self._resume_at = len(self._text) + self._pause
