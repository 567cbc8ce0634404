"""Text that grows token by token: never half a character, never part of a stop string."""

from bisect import bisect_right
from collections.abc import Callable, Sequence


class StopString:
    """A stop string, searched in a text that grows, in time that is linear in the text.

    Knuth, Morris and Pratt's automaton, whose table grows only as far as the text has matched.
    """

    def __init__(self, stop: str):
        self.matched = 0  # characters of the stop string at the text's end
        self._stop = stop
        self._borders = [-1, 0]  # longest proper prefix of stop[:i] that is also its suffix

    def find(self, piece: str) -> int | None:
        """Take the text's next piece; return where a match that ends in it begins, from its start.

        A match that began in earlier pieces has a negative start. None: there is no match.
        """
        if not self.matched and self._stop[0] not in piece:
            return None
        for i, char in enumerate(piece):
            self.matched = self._next(self.matched, char)
            while len(self._borders) <= self.matched:
                last = self._stop[len(self._borders) - 1]
                self._borders.append(self._next(self._borders[-1], last))
            if self.matched == len(self._stop):
                self.matched = self._borders[self.matched]
                return i + 1 - len(self._stop)
        return None

    def _next(self, matched: int, char: str) -> int:
        while matched >= 0 and self._stop[matched] != char:
            matched = self._borders[matched]
        return matched + 1


class Detokenizer:
    """The text of a sequence's tokens, as far as it is certain.

    Attributes:
        text: all of it, without a stop string and what follows it.
        stopped: whether a stop string was found.
        starts: where each token's text begins; for part of a character, where that begins.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
    ):
        """Begin a text.

        Args:
            decode: turns token ids to text.
            stop: strings that end the text; they don't become part of it.
            context: ids before the first token, which decide how its text begins.
        """
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = [StopString(s) for s in stop]
        self._ids = list(context)
        # Decoding all ids again for each token would take quadratic time: only those from _start
        # on are. The text of those before _known is part of ``text`` already.
        self._start = 0
        self._known = len(self._ids)
        self.starts: list[int] = []
        self._ends: list[int] = []  # where the text of each token ends
        self._returned = 0  # characters

    @property
    def n_tokens(self) -> int:
        """The number of tokens whose text ``push`` and ``flush`` have returned in full."""
        return bisect_right(self._ends, self._returned)

    def push(self, token: int) -> str:
        """Append a token, and return the text that has become certain."""
        self._ids.append(token)
        self.starts.append(len(self.text))
        self._advance(final=False)
        held = 0 if self.stopped else self._held_back()
        return self._give(len(self.text) - held)

    def flush(self) -> str:
        """End the text, and return the part that was held back."""
        if not self.stopped:
            self._advance(final=True)
        return self._give(len(self.text))

    def _advance(self, final: bool) -> None:
        before = self._decode(self._ids[self._start : self._known])
        after = self._decode(self._ids[self._start :])
        # U+FFFD at the end may be the beginning of a character whose other bytes are to come.
        if final or (len(after) > len(before) and not after.endswith("\ufffd")):
            searched = len(self.text)
            self.text += after[len(before) :]
            self._ends += [len(self.text)] * (len(self._ids) - self._known)
            self._start, self._known = self._known, len(self._ids)
            self._cut(searched)

    def _cut(self, searched: int) -> None:
        """End the text at the first stop string in the part after ``searched`` characters."""
        piece = self.text[searched:]
        found = [at for stop in self._stop if (at := stop.find(piece)) is not None]
        if found:
            self.stopped = True
            self.text = self.text[: searched + min(found)]

    def _held_back(self) -> int:
        """Return the number of characters at the end that could begin a stop string."""
        return max((stop.matched for stop in self._stop), default=0)

    def _give(self, end: int) -> str:
        piece = self.text[self._returned : end]
        self._returned = max(self._returned, end)
        return piece
