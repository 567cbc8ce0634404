"""What the engine works off: rows on their way through it, and what it tells of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from llama.decoding import Request, Row

Finish = Literal["stop", "length", "timeout", "cancelled", "error"]
Alternatives = list[tuple[int, float]]  # token ids and log-probabilities, the likeliest first


class Update(NamedTuple):
    """What is new of a job: its text, and how many of its tokens have been told in full by now."""

    text: str
    n_tokens: int
    finish: Finish | None = None


@dataclass(eq=False)
class Job:
    """A row on its way through the engine.

    Args:
        notify: told what is new, by the engine's thread; the last time with a ``finish``.
        n_top: how many of the likeliest tokens to keep at each place.
        embed: whether the text is only read, to make ``vector``: the mean of its hidden states.
        deadline: by ``time.monotonic()``.
    """

    row: Row
    request: Request
    notify: Callable[[Update], None]
    n_top: int = 0
    embed: bool = False
    deadline: float = math.inf
    cancelled: bool = False  # set from any thread
    top: list[Alternatives] = field(default_factory=list)
    prompt_top: list[Alternatives] = field(default_factory=list)
    vector: torch.Tensor | None = None
    n_reused: int = 0  # tokens of the prompt that the cache held already
    place: int = -1  # the cache's row
    n_read: int = 0  # tokens of the prompt

    @property
    def reading(self) -> bool:
        """Whether some of the prompt isn't in the cache yet."""
        return self.n_read < len(self.row.prompt)

    @property
    def scores_prompt(self) -> bool:
        return self.request.logprobs and self.request.echo

    def tell(self, text: str = "", finish: Finish | None = None) -> None:
        done = finish is not None
        n_tokens = len(self.row.tokens) if done else self.row.text.n_tokens
        self.notify(Update(text, n_tokens, finish))
