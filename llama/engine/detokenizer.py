"""Text that grows token by token: never half a character, never part of a stop string."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence

from llama.tokenizers.stop_strings import StopStrings


class Detokenizer:
    """The text of a sequence's tokens, as far as it is certain.

    Attributes:
        text: all of it, up to a stop string.
        stopped: the stop string that was found, or None.
        starts: where each token's text begins; for part of a character, where that begins.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
        kept: Collection[str] = (),
        marks: Collection[int] = (),
    ):
        """Begin a text.

        Args:
            decode: turns token ids to text.
            stop: strings that end the text.
            context: ids before the first token, which decide how its text begins.
            kept: those of ``stop`` that become part of the text.
            marks: control ids that ``decode`` writes out.
        """
        self.text = ""
        self.stopped: str | None = None
        self._decode = decode
        self._stop = StopStrings(stop)
        self._kept, self._marks = kept, marks
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
        if token in self._marks and self._known < len(self._ids):
            self._advance(final=True)  # no character goes on beyond a mark
        self._ids.append(token)
        self.starts.append(len(self.text))
        self._advance(final=False)
        held = 0 if self.stopped else self._stop.n_matched
        return self._give(len(self.text) - held)

    def flush(self) -> str:
        """End the text, and return the part that was held back."""
        self._advance(final=True)
        return self._give(len(self.text))

    def _advance(self, final: bool) -> None:
        if self.stopped:
            return
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
        if found := self._stop.find(self.text[searched:]):
            self.stopped = found.stop
            is_kept = found.stop in self._kept
            self.text = self.text[: searched + found.start + is_kept * len(found.stop)]
            if is_kept:  # with the token that it ends in, whatever more that says
                self._ends = [min(end, len(self.text)) for end in self._ends]

    def _give(self, end: int) -> str:
        piece = self.text[self._returned : end]
        self._returned = max(self._returned, end)
        return piece
