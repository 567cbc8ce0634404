"""The key/value cache's entries: as they are, or in eight bits.

In eight bits each head's key or value at a position has a scale of its own, in the network's dtype.
"""

import torch

from llama.packing import Packed, Span


def allocate(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, in_int8: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries for a shape (rows, n_kv_heads, positions, head_dim), and scales where they are int8.

    Without, the scales have no element.
    """
    entries = torch.zeros(shape, dtype=torch.int8 if in_int8 else dtype, device=device)
    scales = torch.zeros((*shape[:3], int(in_int8)), dtype=dtype, device=device)
    return entries, scales


def store(entries: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, packed: Packed) -> None:
    """Put the keys or values of new tokens, (n_tokens, n_kv_heads, head_dim), where they belong."""
    if entries.dtype == torch.int8:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1)
        scales[packed.rows, :, packed.positions] = scale
        x = (x / scale).round().clamp(-127, 127).to(torch.int8)
    entries[packed.rows, :, packed.positions] = x


def read(entries: torch.Tensor, scales: torch.Tensor, span: Span) -> torch.Tensor:
    """What a span attends to, shape (n_rows, n_kv_heads, filled, head_dim)."""
    part = entries[span.rows, :, : span.filled]
    return part * scales[span.rows, :, : span.filled] if entries.dtype == torch.int8 else part


def bytes_per_head(head_dim: int, dtype: torch.dtype, in_int8: bool) -> int:
    """The size of one head's key or value at one position."""
    return head_dim + dtype.itemsize if in_int8 else head_dim * dtype.itemsize
