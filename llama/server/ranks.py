"""Passes through the network on all ranks: rank 0 says what is next, the others follow."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from llama import parallel
from llama.decoding import checked_forward
from llama.errors import NotFinite
from llama.model import Transformer
from llama.packing import Segment
from llama.prefixes import copy_rows


@dataclass
class Pass:
    """One forward pass: what to copy between the cache's rows before it, and what to read.

    Args:
        copies: (from row, to row, how many tokens) each.
        tokens, segments, select: as for ``Transformer.forward_packed``.
        hidden: whether hidden states are asked for, instead of logits.
    """

    copies: list[tuple[int, int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    segments: Sequence[Segment] = ()
    select: list[int] | None = None
    hidden: bool = False


def lead(model: Transformer, work: Pass) -> torch.Tensor:
    """Do a pass on all ranks, from rank 0; returns its result.

    Raises:
        RuntimeError: the result isn't finite, or another rank is gone.
    """
    if parallel.world_size() > 1:
        _send(model, json.dumps(asdict(work)).encode())
    return _do(model, work)


def beat(model: Transformer) -> None:
    """Let the other ranks know, while there is nothing to do, that rank 0 is there.

    Raises:
        RuntimeError: one of them is gone.
    """
    _send(model, b"{}")


def dismiss(model: Transformer) -> None:
    """End ``follow`` on the other ranks."""
    _send(model, b"")


def follow(model: Transformer) -> None:
    """On a rank other than 0: take part in all passes until rank 0 dismisses it.

    Raises:
        RuntimeError: rank 0 is gone.
    """
    while message := _receive(model):
        fields = json.loads(message)
        if fields:
            fields["segments"] = [Segment(*segment) for segment in fields["segments"]]
            # What isn't finite is so on every rank: rank 0 says so, and goes on with the next.
            try:
                _do(model, Pass(**fields))
            except NotFinite:
                continue


def _do(model: Transformer, work: Pass) -> torch.Tensor:
    for copy in work.copies:  # one may be of what another has just brought
        copy_rows(model, [copy])
    return checked_forward(model, work.tokens, list(work.segments), work.select, work.hidden)


def _send(model: Transformer, message: bytes) -> None:
    if parallel.world_size() > 1:
        device = model.freqs_cis.device
        parallel.broadcast(torch.tensor([len(message)], device=device))
        if message:
            parallel.broadcast(torch.tensor(list(message), dtype=torch.uint8, device=device))


def _receive(model: Transformer) -> bytes:
    device = model.freqs_cis.device
    size = int(parallel.broadcast(torch.zeros(1, dtype=torch.long, device=device)))
    if not size:
        return b""
    return bytes(parallel.broadcast(torch.zeros(size, dtype=torch.uint8, device=device)).tolist())
