"""Masks of grammars: which tokens may come next, as bits."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import torch

_N_THREADS = 4  # that build masks; more would wait for Python


class Grammar(Protocol):
    """The form that a sequence's answer must have, at the place that the answer has reached."""

    error: str | None
    """Why the grammar was given up; None while it holds."""

    def masks(self, draft: Sequence[int]) -> torch.Tensor:
        """Return which tokens may come next, and which after each token of a draft.

        Returns:
            int32, on the CPU, shape (1 + len(draft), at least n_words / 32): bit i % 32 of word
            i // 32 is set where token i is allowed. At least one is, in every row.
        """

    def accepted(self, draft: Sequence[int]) -> int:
        """Return how many tokens of a draft may come next, one after another."""

    def push(self, token: int) -> None:
        """Take the next token of the answer, or the one that ends it."""

    @property
    def is_finished(self) -> bool:
        """True once only the end may follow."""


class Masks:
    """Masks that are built in other threads, while the network computes.

    Args:
        asked: each grammar with the draft after which tokens are drawn.
    """

    def __init__(self, asked: Sequence[tuple[Grammar, list[int]]]):
        self._built: list[Future[torch.Tensor]] = [
            _threads().submit(grammar.masks, draft) for grammar, draft in asked
        ]

    def to(self, device: torch.device) -> torch.Tensor:
        """Wait until all masks are built, and send them to a device: bits, (n_rows, n_words)."""
        host = torch.cat([built.result() for built in self._built])
        if device.type == "cuda":
            host = host.pin_memory()  # which PyTorch keeps until it is read
        return host.to(device, non_blocking=True)


def barriers(masks: torch.Tensor, n_words: int) -> torch.Tensor:
    """Return what masks add to logits: 0 where a token is allowed, else -inf.

    Args:
        masks: int32, shape (n_rows, at least n_words / 32), see ``Grammar.masks``.

    Returns:
        float32, shape (n_rows, n_words).
    """
    # Eight tokens at once. A word's first byte has its lowest bits on all platforms.
    octets = masks.view(torch.uint8).flatten().int()
    found = _of_octets(masks.device).index_select(0, octets)  # (n_octets, 8)
    return found.view(len(masks), -1)[:, :n_words]


@lru_cache
def _of_octets(device: torch.device) -> torch.Tensor:
    """Return the barriers of all bytes, (256, 8)."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits == 1, 0.0, -torch.inf).to(device)


@lru_cache(1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_N_THREADS, os.cpu_count() or 1), "llama-masks")
