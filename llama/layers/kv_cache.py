"""The key/value cache of one layer, in the network's dtype or in eight bits."""

import torch
from torch import nn

from llama.huge_pages import zeros


class KVCache(nn.Module):
    """Keys and values that a layer has computed, one slot for each sequence.

    Allocated once; a CPU gives a slot memory only as far as it is written. With ``int8`` each
    head's key or value at a position has a scale of its own.

    Args:
        shape: (max_batch_size, n_kv_heads, max_seq_len, head_dim); each head's positions lie next
            to each other.
        dtype: of the keys and values that go in and come out.
        device: of the memory.
        int8: whether entries have eight bits.
        position_major: whether the heads of a position lie next to each other instead.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        int8: bool = False,
        position_major: bool = False,
    ):
        super().__init__()
        self.int8 = int8
        self.position_major = position_major
        if position_major:
            n_slots, n_kv_heads, max_seq_len, head_dim = shape
            shape = (n_slots, max_seq_len, n_kv_heads, head_dim)
        scales = (*shape[:3], int(int8))  # no element where nothing is scaled
        for name in ("k", "v"):
            entries = zeros(shape, torch.int8 if int8 else dtype, device)
            self.register_buffer(name, entries, persistent=False)
            self.register_buffer(f"{name}_scale", zeros(scales, dtype, device), persistent=False)

    def update(
        self, xk: torch.Tensor, xv: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write new tokens' keys and values, each (n_tokens, n_kv_heads, head_dim)."""
        places = (slots, positions) if self.position_major else (slots, slice(None), positions)
        for entries, scales, x in ((self.k, self.k_scale, xk), (self.v, self.v_scale, xv)):
            if self.int8:
                scale = x.abs().amax(dim=-1, keepdim=True) / 127
                scale = torch.where(scale > 0, scale, 1)
                scales[places] = scale
                x = (x / scale).round().clamp(-127, 127).to(torch.int8)
            entries[places] = x

    def read(self, slots: slice | torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first positions of slots: two of (n_slots, n_kv_heads, kv_len, head_dim)."""
        filled = (slots, slice(None), slice(kv_len))
        if not self.int8:
            return self.k[filled], self.v[filled]
        return self.k[filled] * self.k_scale[filled], self.v[filled] * self.v_scale[filled]

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first ``n_tokens`` positions of one slot to another."""
        for buffer in self.buffers():
            slots = buffer if self.position_major else buffer.transpose(1, 2)
            slots[target, :n_tokens] = slots[source, :n_tokens]

    def clear(self) -> None:
        """Set everything to zero: a NaN in the cache would spread to later sequences."""
        for buffer in self.buffers():
            buffer.zero_()
