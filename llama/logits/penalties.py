"""Penalties of tokens that a text holds already."""

from typing import NamedTuple

import torch


class PenaltyRows(NamedTuple):
    """The rows of logits that have penalties; each tensor has the shape (n_rows,)."""

    rows: torch.Tensor  # of the logits
    slots: torch.Tensor  # that hold their texts
    last: torch.Tensor  # the position of the last token before the one that is drawn
    n_prompt: torch.Tensor  # where the answer begins
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


class Penalties:
    """The texts of sequences with penalties, on the device, by slot and position.

    Nothing is counted: a row's text ends at its own position, so that tokens of a draft that was
    rejected, or of a pass that was thrown away, are written over before they are read.

    Args:
        n_slots, length: how many texts there are, and positions in each.
    """

    def __init__(self, n_slots: int, length: int, device: torch.device):
        self.length = length
        self._ids = torch.zeros(n_slots * length, dtype=torch.int32, device=device)

    def write(self, places: torch.Tensor, ids: torch.Tensor) -> None:
        """Write tokens at places, each of which is ``slot * length + position``."""
        self._ids.index_copy_(0, places, ids.int())

    def apply(self, flat: torch.Tensor, n_words: int, on: PenaltyRows, longest: int) -> None:
        """Change logits in place.

        Repetition: CTRL's, as in transformers (https://arxiv.org/abs/1909.05858, section 4.1).
        Presence and frequency: https://platform.openai.com/docs/api-reference/chat/create.

        Args:
            flat: float32, shape (n * n_words + 1,): rows of logits, and one element that takes
                the changes of tokens which don't count.
            longest: more than any of ``on.last``.
        """
        texts = self._ids.view(-1, self.length)[:, :longest]
        ids = texts.index_select(0, on.slots)  # (n_rows, longest)
        positions = torch.arange(longest, device=flat.device)
        in_text = (positions <= on.last[:, None]) & (ids < n_words)
        in_answer = in_text & (positions >= on.n_prompt[:, None])
        nowhere = len(flat) - 1
        places = torch.where(in_text, on.rows[:, None] * n_words + ids, nowhere)
        answered = torch.where(in_answer, places, nowhere)
        # A token that comes twice gets the same value twice.
        logits, factor = flat[places], on.repetition[:, None]
        flat[places] = torch.where(logits < 0, logits * factor, logits / factor)
        flat[answered] = flat[answered] - on.presence[:, None]
        amounts = torch.where(in_answer, -on.frequency[:, None], 0.0)
        flat.scatter_add_(0, places.flatten(), amounts.flatten())  # as often as it comes
