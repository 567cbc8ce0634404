"""The tokens that the cache's slots still hold, which prompts with the same beginning reuse."""

from collections.abc import Sequence

_WORTH_COPYING = 2  # tokens that another slot holds; all hold the first one


class PrefixCache:
    """The tokens whose keys and values each slot holds, and which slots are free."""

    def __init__(self, n_slots: int):
        self.free = set(range(n_slots))
        self._held: list[list[int]] = [[] for _ in range(n_slots)]
        self._last_use = [0] * n_slots
        self._clock = 0

    def clear(self) -> None:
        """Forget the slots' contents."""
        self._held = [[] for _ in self._held]

    def longest(self, prompt: Sequence[int]) -> int:
        """Return the length of a prompt's longest prefix in any slot, without its last token."""
        return max(common_prefix(prompt, held, len(prompt) - 1) for held in self._held)

    def take(self, prompt: Sequence[int], limit: int) -> tuple[int, int, tuple[int, int] | None]:
        """Take a free slot for a prompt: one that holds its beginning, else the least recent.

        Args:
            limit: how many of the prompt's tokens may be reused.

        Returns:
            The slot, how many of the prompt's tokens it holds or will, and (source, number of
            tokens) of a copy that brings them from another slot.
        """
        common = [common_prefix(prompt, held, limit) for held in self._held]
        best = max(range(len(common)), key=lambda slot: (common[slot], slot in self.free))
        continues = best in self.free and 2 * common[best] > len(self._held[best])
        slot = best if continues else min(self.free, key=lambda slot: self._last_use[slot])
        copy = None
        if common[best] >= common[slot] + _WORTH_COPYING:
            copy = best, common[best]
            common[slot] = common[best]
        self.free.remove(slot)
        self._held[slot] = list(prompt[: common[slot]])
        return slot, common[slot], copy

    def write(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Note that a pass writes tokens to a slot from position ``start`` on.

        A rejected draft stays there too, until it is written over. What comes before ``start``
        is unknown after ``clear``; such a slot can't be reused.
        """
        if start <= len(self._held[slot]):
            self._held[slot][start:] = tokens

    def release(self, slot: int) -> None:
        """Free a slot, which keeps its contents."""
        self._clock += 1
        self._last_use[slot] = self._clock
        self.free.add(slot)


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Return the length of the common prefix, ``limit`` at most."""
    limit = min(limit, len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)
