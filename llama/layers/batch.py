"""The layout of several sequences' new tokens in one forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

_CPU_SPAN = 64  # tokens of a prompt in one attention call on a CPU


class Segment(NamedTuple):
    """New tokens of one sequence: its slot in the cache, their first position, their number."""

    slot: int
    start_pos: int
    length: int


class Span(NamedTuple):
    """The tokens that one attention call serves.

    They are several new tokens of one sequence (a piece of a prompt), or one new token of each of
    several sequences in neighbouring slots (decoding).
    """

    tokens: slice  # of the batch
    slots: slice  # of the cache
    kv_len: int  # cached positions to read
    mask: torch.Tensor | None  # True where a token attends; None for all, or all up to itself


class RaggedBatch(NamedTuple):
    """The new tokens of a forward pass, without padding, sequence after sequence.

    Two sequences, of which slot 0 brings the prompt ``a b c`` and slot 3 the token ``x`` at
    position 7, are the tokens ``a b c x`` with

        slots      0 0 0 3
        positions  0 1 2 7
        spans      (tokens 0:3, slots 0:1, kv_len 3), (tokens 3:4, slots 3:4, kv_len 8)
    """

    slots: torch.Tensor  # (n_tokens,)
    positions: torch.Tensor  # (n_tokens,)
    spans: list[Span]

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> "RaggedBatch":
        """Lay out segments, whose slots ascend."""
        spans: list[Span] = []
        first = i = 0
        while i < len(segments):
            group = _neighbours(segments, i)
            if group[0].length > 1:
                spans += _prompt_spans(group[0], first, device)
            else:
                spans.append(_decoding_span(group, first, device))
            first += sum(segment.length for segment in group)
            i += len(group)
        slots = [s.slot for s in segments for _ in range(s.length)]
        positions = [p for s in segments for p in range(s.start_pos, s.start_pos + s.length)]
        return RaggedBatch(
            torch.tensor(slots, device=device), torch.tensor(positions, device=device), spans
        )


def _neighbours(segments: Sequence[Segment], i: int) -> Sequence[Segment]:
    """Return segment ``i``, and those behind it if each brings one token to the next slot."""
    end = i + 1
    while end < len(segments) and segments[i].length == segments[end].length == 1:
        if segments[end].slot != segments[i].slot + end - i:
            break
        end += 1
    return segments[i:end]


def _decoding_span(group: Sequence[Segment], first: int, device: torch.device) -> Span:
    kv_len = max(s.start_pos for s in group) + 1
    mask = None
    if any(s.start_pos + 1 < kv_len for s in group):  # sequences of different lengths
        lengths = torch.tensor([s.start_pos + 1 for s in group], device=device)
        mask = torch.arange(kv_len, device=device) < lengths[:, None, None, None]
    slots = slice(group[0].slot, group[0].slot + len(group))
    return Span(slice(first, first + len(group)), slots, kv_len, mask)


def _prompt_spans(segment: Segment, first: int, device: torch.device) -> list[Span]:
    """Return the spans of a prompt's piece, whose tokens begin at ``first`` in the batch.

    On a CPU it is cut, since attention there also computes the scores that causality discards.
    """
    slot, start_pos, length = segment
    step = _CPU_SPAN if device.type == "cpu" else length
    spans = []
    for begin in range(0, length, step):
        n = min(step, length - begin)
        past = start_pos + begin
        mask = None
        if past > 0:  # causal, after the positions that the cache already holds
            mask = torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)
        tokens = slice(first + begin, first + begin + n)
        spans.append(Span(tokens, slice(slot, slot + 1), past + n, mask))
    return spans


def check_segments(
    segments: Sequence[Segment], tokens: torch.Tensor, max_batch_size: int, max_seq_len: int
) -> None:
    """Raise ``ValueError`` unless the segments are those of ``tokens`` and fit the cache."""
    total = sum(length for _, _, length in segments)
    if not segments or tokens.shape != (total,):
        raise ValueError(f"{tuple(tokens.shape)} tokens for segments of {total} in all")
    previous = -1
    for slot, start_pos, length in segments:
        if not previous < slot < max_batch_size:
            raise ValueError(
                f"slot {slot} after slot {previous}: slots ascend and stay below the cache's "
                f"max_batch_size of {max_batch_size}"
            )
        if length < 1 or start_pos < 0 or start_pos + length > max_seq_len:
            raise ValueError(
                f"slot {slot}: {length} tokens from position {start_pos} don't fit the cache's "
                f"max_seq_len of {max_seq_len}"
            )
        previous = slot
