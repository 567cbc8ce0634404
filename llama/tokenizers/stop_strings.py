"""Stop strings, searched in a text that grows (``llama/engine/detokenizer.py``)."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


class Match(NamedTuple):
    """A stop string in a text; ``start`` counts from the beginning of the last piece."""

    start: int
    stop: str


class _Node:
    """A beginning that stop strings share.

    Attributes:
        depth: its length.
        first, end: the stop strings that begin with it, among all in order.
        fail: the longest proper suffix of it that is a beginning too.
        match: the longest stop string that it ends with.
        children: longer beginnings by their last character; None where there is none.
    """

    __slots__ = ("children", "depth", "end", "fail", "first", "match")

    def __init__(self, depth: int, first: int, end: int):
        self.depth, self.first, self.end = depth, first, end
        self.fail = self
        self.match: str | None = None
        self.children: dict[str, _Node | None] = {}


class StopStrings:
    """Finds any of several strings in a text that comes in pieces.

    The automaton of Aho and Corasick (https://doi.org/10.1145/360825.360855), which takes as many
    steps for a thousand strings as for one. Its nodes are made when the text first reaches them,
    so that a long string costs as much as is seen of it.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = sorted(set(stops))
        self._root = self._node = _Node(0, 0, len(self._stops))
        self._begin = {stop[0] for stop in self._stops}

    @property
    def n_matched(self) -> int:
        """The number of characters at the text's end that begin a stop string."""
        return self._node.depth

    def find(self, piece: str) -> Match | None:
        """Take the text's next piece, and return the match that ends in it.

        Of several it is the one that begins first, perhaps in an earlier piece, where its start is
        negative; of those that begin together, the shortest.
        """
        if self._node is self._root and self._begin.isdisjoint(piece):
            return None
        found: Match | None = None
        for i, char in enumerate(piece):
            self._node = self._next(self._node, char)
            stop = self._node.match
            if stop is not None and (found is None or i + 1 - len(stop) < found.start):
                found = Match(i + 1 - len(stop), stop)
        return found

    def _next(self, node: _Node, char: str) -> _Node:
        """Return the longest beginning at the text's end after one more character."""
        made: list[_Node] = []
        while True:
            is_new = char not in node.children
            child = self._child(node, char) if is_new else node.children[char]
            if child is not None and is_new:
                made.append(child)
                child = None
            if child is not None or node is self._root:
                break
            node = node.fail
        made.append(child or self._root)
        # Each new one's longest proper suffix is the one found after it.
        for longer, suffix in reversed(list(pairwise(made))):
            longer.fail = suffix
            stop = self._stops[longer.first]
            longer.match = stop if len(stop) == longer.depth else suffix.match
        return made[0]

    def _child(self, node: _Node, char: str) -> _Node | None:
        """Make a node's child; None if no stop string goes on in this way."""
        depth, first = node.depth, node.first
        if first < node.end and len(self._stops[first]) == depth:
            first += 1  # it ends here, and stands before those that go on

        def at(stop: str) -> str:
            return stop[depth]

        begin = bisect_left(self._stops, char, first, node.end, key=at)
        end = bisect_right(self._stops, char, begin, node.end, key=at)
        node.children[char] = _Node(depth + 1, begin, end) if begin < end else None
        return node.children[char]
