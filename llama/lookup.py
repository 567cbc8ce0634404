"""Prompt-lookup decoding: what followed the last tokens before may follow them again.

A row's next tokens are guessed from its own text, and one forward pass checks all of them: that
costs little more than a pass for one token, and gives the tokens that decoding without guesses
gives, but for the rounding of dtypes below float32 (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Iterable

_LENGTHS = (3, 2)  # of the last tokens that are looked for, the longer first
_FIRST_GUESS = 3  # tokens; with the one that is certain, four: on CPUs as quick as one
_LONGEST_PAUSE = 32


class Lookup:
    """Guesses the next tokens of one row.

    A guess that comes true makes the next one longer. One that fails makes it short and is
    followed by a pause, the longer the more fail in a row, so that text which doesn't repeat
    itself pays next to nothing.

    Args:
        prompt: the row's text so far.
        longest: tokens that are guessed at once, at most.
    """

    def __init__(self, prompt: Iterable[int], longest: int):
        self._longest = longest
        self._length = min(_FIRST_GUESS, longest)
        self._pause = 0
        self._resume_at = 0  # no guess for texts shorter than this
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some tokens: where what followed them begins
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Add a token to the text."""
        for length in _LENGTHS:
            if len(self._text) >= length:
                self._after[tuple(self._text[-length:])] = len(self._text)
        self._text.append(token)

    def guess(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may come next."""
        if len(self._text) < self._resume_at:
            return []
        for length in _LENGTHS:
            begin = self._after.get(tuple(self._text[-length:]))
            if begin is not None:
                period = len(self._text) - begin  # where the text ends, it may begin again
                count = min(self._length, limit)
                return [self._text[begin + i % period] for i in range(count)]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Take note of how many tokens of the last guess came true."""
        if not guessed:
            return
        all_right = 2 * guessed if right == guessed else 0
        self._length = min(max(_FIRST_GUESS, right, all_right), self._longest)
        self._pause = 0 if right else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._resume_at = len(self._text) + self._pause
