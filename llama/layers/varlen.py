"""Attention by ``varlen_attn``: CUDA's kernel for sequences of any lengths in a paged cache.

It takes the lengths from tensors on the device and reads what is filled, without masks: a CUDA
graph can be replayed while sequences grow.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llama.layers.batch import RaggedBatch, Segment, to_device, token_places
from llama.layers.kv_cache import PAGE, KVCache

MAX_DRAFT = 16  # new tokens of a sequence, up to which each attends on its own


class PagedCall(NamedTuple):
    """The tokens that one call of ``varlen_attn`` serves; all tensors are int32."""

    tokens: slice  # of the batch
    cu_seq_q: torch.Tensor  # (n_sequences + 1,), where each sequence's queries begin and end
    cu_seq_k: torch.Tensor  # (n_sequences + 1,), the same of its pages' positions
    seqused_k: torch.Tensor  # (n_sequences,), how many positions are filled
    block_table: torch.Tensor  # (n_sequences, pages), where they are in the cache
    max_q: int  # queries of a sequence at most
    max_k: int  # positions at most, by which the kernel divides its work

    def attend(self, q: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Return the attention of its queries: (n_tokens, n_heads, head_dim), also of ``q``."""
        from torch.nn.attention.varlen import varlen_attn

        keys, values = kv_cache.pages()
        is_decoding = self.max_q == 1
        # A long sequence is divided among processors only where several heads share its keys.
        is_lone = is_decoding and q.shape[1] == keys.shape[2]
        out = varlen_attn(
            q.repeat_interleave(2, dim=1) if is_lone else q,
            keys,
            values,
            self.cu_seq_q,
            self.cu_seq_k,
            self.max_q,
            self.max_k,
            window_size=(-1, -1) if is_decoding else (-1, 0),
            enable_gqa=True,
            seqused_k=self.seqused_k,
            block_table=self.block_table,
            # Divided, a prompt's piece would leave others unwritten (pytorch issue 194167).
            num_splits=None if is_decoding else 1,
        )
        assert isinstance(out, torch.Tensor)
        return out[:, ::2] if is_lone else out


class Varlen:
    """Lays out batches for ``varlen_attn``.

    In decoding each new token, of a draft too, is a sequence of its own, which reads the pages of
    its slot up to itself. A piece of a prompt is one sequence, which attends causally.

    Args:
        n_slots, max_seq_len: the cache's size.
        device: the cache's device.
    """

    paged = True

    def __init__(self, n_slots: int, max_seq_len: int, device: torch.device):
        n_pages = -(-max_seq_len // PAGE)
        numbers = torch.arange(n_slots * n_pages, dtype=torch.int32, device=device)
        self._pages = numbers.view(n_slots, n_pages)

    def layout(self, segments: Sequence[Segment], device: torch.device) -> RaggedBatch:
        """Return the batch of some segments, each of another slot.

        Neighbours of a kind share a call: bring short ones first, then long ones.
        """
        calls: list[tuple[slice, int, int]] = []  # tokens, queries and positions at most
        numbers: list[list[int]] = []  # of each call: slots, filled positions, ends of the queries
        first = 0
        for is_prompt, group in itertools.groupby(segments, key=lambda s: s.length > MAX_DRAFT):
            sequences = [one for s in group for one in ([s] if is_prompt else _tokens(s))]
            lengths = [sequence.length for sequence in sequences]
            used = [sequence.start_pos + sequence.length for sequence in sequences]
            numbers += [[s.slot for s in sequences], used, [0, *itertools.accumulate(lengths)]]
            calls.append((slice(first, first + sum(lengths)), max(lengths), max(used)))
            first += sum(lengths)
        slots, positions, *sent = to_device(device, [*token_places(segments), *numbers])
        of_calls = zip(calls, sent[::3], sent[1::3], sent[2::3], strict=True)
        return RaggedBatch(slots, positions, [self._call(*call, *rest) for call, *rest in of_calls])

    def decoding(self, slots: torch.Tensor, positions: torch.Tensor, kv_len: int) -> RaggedBatch:
        """Return the batch of tokens that attend each on its own; no tensor's values matter.

        Args:
            slots, positions: of the tokens, shape (n_tokens,).
            kv_len: positions that a token reads at most.
        """
        ends = torch.arange(len(slots) + 1, device=slots.device)
        call = self._call(slice(0, len(slots)), 1, kv_len, slots, positions + 1, ends)
        return RaggedBatch(slots, positions, [call])

    def _call(
        self,
        tokens: slice,
        max_q: int,
        kv_len: int,
        slots: torch.Tensor,
        used: torch.Tensor,
        ends: torch.Tensor,
    ) -> PagedCall:
        n_pages = -(-kv_len // PAGE)
        cu_seq_k = torch.arange(len(ends), dtype=torch.int32, device=ends.device) * n_pages * PAGE
        table = self._pages[slots, :n_pages]
        return PagedCall(tokens, ends.int(), cu_seq_k, used.int(), table, max_q, n_pages * PAGE)


def _tokens(segment: Segment) -> list[Segment]:
    """Return each token of a segment as one of its own."""
    slot, start_pos, length = segment
    return [Segment(slot, position, 1) for position in range(start_pos, start_pos + length)]
