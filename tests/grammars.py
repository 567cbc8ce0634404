"""Grammars without a language: which ids may stand at each place is given."""

from collections.abc import Collection, Sequence

import torch


class Script:
    """Allows some ids at each place of the answer, and only the end after the last place.

    Attributes:
        pushed: the tokens of the answer so far, the end too.
    """

    error = None

    def __init__(self, places: Sequence[Collection[int]], end: int, n_words: int):
        self._places, self._rest = places, (end, n_words)
        self._end = end
        self._n_words = n_words
        self.pushed: list[int] = []

    def _allowed(self, place: int) -> Collection[int]:
        return self._places[place] if place < len(self._places) else [self._end]

    def masks(self, draft: Sequence[int]) -> torch.Tensor:
        assert self.accepted(draft) == len(draft), "a draft that the grammar forbids is checked"
        masks = torch.zeros(1 + len(draft), -(-self._n_words // 32), dtype=torch.int64)
        for row in range(len(masks)):
            for token in self._allowed(len(self.pushed) + row):
                masks[row, token // 32] |= 1 << token % 32
        return (masks - (masks >= 1 << 31).long() * (1 << 32)).int()

    def accepted(self, draft: Sequence[int]) -> int:
        for i, token in enumerate(draft):
            if token not in self._allowed(len(self.pushed) + i):
                return i
        return len(draft)

    def push(self, token: int) -> None:
        assert token in self._allowed(len(self.pushed)), "a token that the grammar forbids came"
        self.pushed.append(token)

    @property
    def is_finished(self) -> bool:
        return len(self.pushed) >= len(self._places)
