"""Attention by PyTorch's FlashAttention operator for sequences of any lengths, on CUDA.

It takes the lengths from tensors on the device and reads what is filled, where it lies, without
masks: a CUDA graph can be replayed while sequences grow.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llama.layers.batch import RaggedBatch, Segment, to_device, token_places
from llama.layers.kv_cache import KVCache

MAX_DRAFT = 16  # new tokens of a sequence, up to which each attends on its own
_FULL = 256  # queries' heads in all that keep a GPU's processors busy, each with one


class VarlenCall(NamedTuple):
    """The tokens that one call of the operator serves; all tensors are int32."""

    tokens: slice  # of the batch
    cu_seq_q: torch.Tensor  # (n_sequences + 1,), where each sequence's queries begin and end
    # (n_sequences + 1,), where each sequence's keys begin in the cache; nothing reads the last.
    begin_k: torch.Tensor
    seqused_k: torch.Tensor  # (n_sequences,), how many positions are filled
    max_q: int  # queries of a sequence at most
    kv_len: int  # positions at most, by which the kernel divides its work

    def attend(self, q: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Return the attention of its queries: (n_tokens, n_heads, head_dim), also of ``q``."""
        keys, values = kv_cache.k.flatten(0, 1), kv_cache.v.flatten(0, 1)
        is_decoding = self.max_q == 1
        # A sequence is divided among processors only where several heads share its keys: one at
        # 16,384 positions is read six times as fast by an H200, and eight together a bit slower.
        is_few = is_decoding and q.shape[1] == keys.shape[1] and q.shape[0] * q.shape[1] < _FULL
        # ``varlen_attn``, which calls this, takes no lengths before PyTorch 2.13.
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q.repeat_interleave(2, dim=1) if is_few else q,
            keys,
            values,
            self.cu_seq_q,
            self.begin_k,
            self.max_q,
            self.kv_len,
            0.0,  # dropout
            not is_decoding,
            False,
            seqused_k=self.seqused_k,
        )[0]
        return out[:, ::2] if is_few else out


class Varlen:
    """Lays out batches for the operator.

    In decoding each new token, of a draft too, is a sequence of its own, which reads its slot up
    to itself. A piece of a prompt is one sequence, which attends causally.

    Args:
        max_seq_len: positions of a slot of the cache.
    """

    position_major = True

    def __init__(self, max_seq_len: int):
        self._max_seq_len = max_seq_len

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
    ) -> VarlenCall:
        begin_k = F.pad(slots * self._max_seq_len, (0, 1))
        return VarlenCall(tokens, ends.int(), begin_k.int(), used.int(), max_q, kv_len)


def _tokens(segment: Segment) -> list[Segment]:
    """Return each token of a segment as one of its own."""
    slot, start_pos, length = segment
    return [Segment(slot, position, 1) for position in range(start_pos, start_pos + length)]
