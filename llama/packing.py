"""How the new tokens of a batch lie side by side, and which attention call serves which of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

# A prompt is prefilled in pieces, so that masks and scores stay small however long it is. A row's
# pieces are cut at the same places whatever rows stand beside it.
PREFILL_CHUNK = 512  # tokens of one row
PREFILL_TOKENS = 2048  # tokens of all rows
CPU_SPAN = 64  # tokens of one row that one attention call covers on a CPU


class Segment(NamedTuple):
    """New tokens of one row: which row of the cache, the first one's position, how many."""

    row: int
    start_pos: int
    length: int


class Span(NamedTuple):
    """What one attention call covers: several new tokens of one row (a piece of a prompt), or
    one new token of each of several neighbouring rows (a decoding step)."""

    tokens: slice  # of the packed tokens
    rows: slice  # of the cache
    filled: int  # cache positions to read
    mask: torch.Tensor | None  # True where a token may look; None where it may look at all


class Packed(NamedTuple):
    """Where the packed tokens of a forward pass stand. Index tensors have shape (n_tokens,)."""

    rows: torch.Tensor
    positions: torch.Tensor
    spans: list[Span]


def check_segments(
    segments: Sequence[Segment], tokens: torch.Tensor, max_batch_size: int, max_seq_len: int
) -> None:
    """Raise ``ValueError`` unless the segments are those of ``tokens`` and fit the cache."""
    total = sum(length for _, _, length in segments)
    if not segments or tokens.shape != (total,):
        raise ValueError(f"{tuple(tokens.shape)} tokens for segments of {total} in all")
    previous = -1
    for row, start_pos, length in segments:
        if not previous < row < max_batch_size:
            raise ValueError(
                f"row {row} after row {previous}: rows ascend and stay below the cache's "
                f"max_batch_size of {max_batch_size}"
            )
        if length < 1 or start_pos < 0 or start_pos + length > max_seq_len:
            raise ValueError(
                f"row {row}: {length} tokens from position {start_pos} don't fit the cache's "
                f"max_seq_len of {max_seq_len}"
            )
        previous = row


def pack(segments: Sequence[Segment], device: torch.device) -> Packed:
    """Lay segments out one after another and group those that one attention call can serve."""
    spans = []
    first = 0
    i = 0
    while i < len(segments):
        row = segments[i].row
        if segments[i].length > 1:
            spans += _prompt_spans(segments[i], first, device)
            first += segments[i].length
            i += 1
            continue
        group = [segments[i]]
        while i + len(group) < len(segments):
            candidate = segments[i + len(group)]
            if candidate.length != 1 or candidate.row != row + len(group):
                break
            group.append(candidate)
        filled = max(s.start_pos for s in group) + 1
        mask = None
        if any(s.start_pos + 1 < filled for s in group):  # rows of different lengths
            lengths = torch.tensor([s.start_pos + 1 for s in group], device=device)
            mask = torch.arange(filled, device=device) < lengths[:, None, None, None]
        tokens = slice(first, first + len(group))
        spans.append(Span(tokens, slice(row, row + len(group)), filled, mask))
        first = tokens.stop
        i += len(group)
    rows = [s.row for s in segments for _ in range(s.length)]
    positions = [p for s in segments for p in range(s.start_pos, s.start_pos + s.length)]
    return Packed(torch.tensor(rows, device=device), torch.tensor(positions, device=device), spans)


def _prompt_spans(segment: Segment, first: int, device: torch.device) -> list[Span]:
    """A piece of a prompt, whose tokens begin at ``first``.

    On a CPU it is cut: attention there calculates all that causality then takes away.
    """
    row, start_pos, length = segment
    step = CPU_SPAN if device.type == "cpu" else length
    spans = []
    for begin in range(0, length, step):
        n = min(step, length - begin)
        seen = start_pos + begin
        mask = None
        if seen > 0:  # causal, after what the cache already holds
            mask = torch.ones(n, seen + n, dtype=torch.bool, device=device).tril(seen)
        tokens = slice(first + begin, first + begin + n)
        spans.append(Span(tokens, slice(row, row + 1), seen + n, mask))
    return spans


def prefill_passes(
    lengths: Sequence[int], starts: Sequence[int] | None = None
) -> Iterator[list[Segment]]:
    """What each forward pass takes of prompts of these lengths, until all are in the cache.

    ``starts`` says how much of each already is.
    """
    done = [0] * len(lengths) if starts is None else list(starts)
    while True:
        segments: list[Segment] = []
        total = 0
        for row, length in enumerate(lengths):
            piece = min(PREFILL_CHUNK, length - done[row])
            if piece and (not segments or total + piece <= PREFILL_TOKENS):
                segments.append(Segment(row, done[row], piece))
                done[row] += piece
                total += piece
        if not segments:
            return
        yield segments
