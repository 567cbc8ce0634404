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
        groups = [
            (is_prompt, list(group))
            for is_prompt, group in itertools.groupby(segments, key=lambda s: s.length > MAX_DRAFT)
        ]
        prompts = [group for is_prompt, group in groups if is_prompt]
        # Of each group of prompts: slots, lengths and where their tokens begin and end.
        numbers: list[list[int]] = []
        for group in prompts:
            numbers.append([segment.slot for segment in group])
            numbers.append([segment.start_pos + segment.length for segment in group])
            numbers.append([0, *itertools.accumulate(segment.length for segment in group)])
        slots, positions, *tensors = to_device(device, [*token_places(segments), *numbers])
        of_prompts = iter(tensors)
        calls = []
        first = 0
        for is_prompt, group in groups:
            tokens = slice(first, first + sum(segment.length for segment in group))
            kv_len = max(segment.start_pos + segment.length for segment in group)
            if is_prompt:
                places, used, ends = (next(of_prompts) for _ in range(3))
                max_q = max(segment.length for segment in group)
                calls.append(self._call(tokens, ends, used, places, max_q, kv_len))
            else:
                calls.append(self._decoding(tokens, slots[tokens], positions[tokens], kv_len))
            first = tokens.stop
        return RaggedBatch(slots, positions, calls)

    def decoding(
        self, slots: torch.Tensor, positions: torch.Tensor, kv_len: int, is_ragged: bool = True
    ) -> RaggedBatch:
        """Return the batch of tokens that attend each on its own; no tensor's values matter.

        Args:
            slots, positions: of the tokens, shape (n_tokens,).
            kv_len: positions that a token reads at most.
            is_ragged: makes no difference here.
        """
        call = self._decoding(slice(0, len(slots)), slots, positions, kv_len)
        return RaggedBatch(slots, positions, [call])

    def _decoding(
        self, tokens: slice, slots: torch.Tensor, positions: torch.Tensor, kv_len: int
    ) -> PagedCall:
        ends = torch.arange(len(slots) + 1, device=slots.device)
        return self._call(tokens, ends, positions + 1, slots, 1, kv_len)

    def _call(
        self,
        tokens: slice,
        ends: torch.Tensor,
        used: torch.Tensor,
        slots: torch.Tensor,
        max_q: int,
        kv_len: int,
    ) -> PagedCall:
        n_pages = -(-kv_len // PAGE)
        cu_seq_k = torch.arange(len(ends), dtype=torch.int32, device=ends.device) * n_pages * PAGE
        table = self._pages[slots, :n_pages]
        return PagedCall(tokens, ends.int(), cu_seq_k, used.int(), table, max_q, n_pages * PAGE)
