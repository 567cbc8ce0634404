"""What the server's engine runs: sequences, and who is told what comes of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llama.engine.sequence import FinishReason, Sequence


class Update(NamedTuple):
    """What is new of a job: its text, and how many of its tokens have been decoded by now."""

    text: str
    n_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Job:
    """A sequence that somebody waits for.

    Args:
        notify: called with what is new, in the engine's thread; the last time with a
            ``finish_reason``.
        deadline: by ``time.monotonic()``.
    """

    sequence: Sequence
    notify: Callable[[Update], None]
    deadline: float = math.inf
    cancelled: bool = False  # set from any thread

    def update(self, text: str = "", finish_reason: FinishReason | None = None) -> None:
        self.notify(Update(text, self.sequence.n_decoded, finish_reason))
