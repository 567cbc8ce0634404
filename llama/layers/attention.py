"""Attention of a ragged batch's queries to the key/value cache.

``Sdpa`` lays batches out for ``scaled_dot_product_attention``, which every device has; ``Varlen``
(``varlen.py``) is faster on CUDA.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llama.layers import kernels
from llama.layers.batch import RaggedBatch, Segment, to_device, token_places
from llama.layers.capability import cpu_has_amx
from llama.layers.kv_cache import KVCache
from llama.layers.varlen import Varlen

_CPU_SPAN = 128 if cpu_has_amx() else 64  # tokens of a prompt in one attention call on a CPU


def ragged_attention(q: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v for each token and query head.

    A token attends to its own sequence's positions up to its own; the cache holds them already.

    Args:
        q: shape (n_tokens, n_heads, head_dim); tokens beyond the batch's are padding.
        kv_cache: of the layer.
        batch: laid out by the backend for which the cache was made.

    Returns:
        The shape of ``q``, zeros for padding.
    """
    if kernels.has_attention(q, kv_cache, batch):
        return kernels.attend(q, kv_cache, batch)
    parts = [call.attend(q[call.tokens], kv_cache) for call in batch.calls]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    n_padding = len(q) - len(batch.slots)
    return F.pad(out, (0, 0, 0, 0, 0, n_padding)) if n_padding else out


class Span(NamedTuple):
    """The tokens that one attention call serves.

    They are several new tokens of one sequence (a piece of a prompt), or one new token of each of
    several sequences (decoding).
    """

    tokens: slice  # of the batch
    slots: slice | torch.Tensor  # of the cache: neighbours, or any that are gathered
    kv_len: int  # cached positions to read
    # Added to the scores, for each token or for each of the heads that share a key head; None for
    # all, or all up to itself.
    mask: torch.Tensor | None
    kind: str = "cpu"  # of the device

    def attend(self, q: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Return the attention of its queries: (n_tokens, n_heads, head_dim), also of ``q``."""
        if kernels.has_prompt_attention(q, kv_cache, self.slots):
            return kernels.attend_prompt(q, kv_cache, self.slots, self.kv_len)
        keys, values = kv_cache.read(self.slots, self.kv_len)
        if self.kind == "mps":  # where strides gave wrong sums (pytorch issues 163597, 181133)
            q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
        attend = _attend_one_each if len(q) == len(keys) else _attend_many
        return attend(q, keys, values, self)


class Sdpa:
    """Lays out batches for ``scaled_dot_product_attention``.

    Args:
        kind: of the device: "cpu", "cuda" or "mps".
        dtype: of the queries.
        n_rep: how many query heads share a key head. On a CPU those of a prompt's tokens are then
            the rows of one matrix, 1.2 to 2 times as fast as one for each of them.
        is_compiled: whether compiled code attends from prompts, which needs no mask.
    """

    position_major = False

    def __init__(self, kind: str, dtype: torch.dtype, n_rep: int = 1, is_compiled: bool = False):
        self._kind = kind
        self.dtype = dtype
        self._n_rep = n_rep if kind == "cpu" else 1
        self._is_compiled = is_compiled

    def layout(self, segments: Sequence[Segment], device: torch.device) -> RaggedBatch:
        """Return the batch of some segments, each of another slot."""
        slots, positions = to_device(device, token_places(segments))
        spans: list[Span] = []
        first = i = 0
        while i < len(segments):
            group = _neighbours(segments, i)
            tokens = slice(first, first + sum(segment.length for segment in group))
            if group[0].length > 1:
                spans += self._prompt_spans(group[0], first, device)
            else:
                kv_len = max(segment.start_pos for segment in group) + 1
                is_ragged = any(segment.start_pos + 1 < kv_len for segment in group)
                near = slice(group[0].slot, group[0].slot + len(group))
                ends = positions[tokens] if is_ragged else None
                spans.append(self._decoding_span(tokens, near, ends, kv_len))
            first, i = tokens.stop, i + len(group)
        return RaggedBatch(slots, positions, spans)

    def decoding(self, slots: torch.Tensor, positions: torch.Tensor, kv_len: int) -> RaggedBatch:
        """Return the batch of one token of each of some sequences; no tensor's values matter.

        Args:
            slots, positions: of the tokens, shape (n_tokens,); on a CPU, of the first slots.
            kv_len: cached positions to read, enough for all.
        """
        every = slice(0, len(slots))
        read = every if self._kind == "cpu" else slots  # a graph gathers any
        return RaggedBatch(slots, positions, [self._decoding_span(every, read, positions, kv_len)])

    def _decoding_span(
        self, tokens: slice, slots: slice | torch.Tensor, ends: torch.Tensor | None, kv_len: int
    ) -> Span:
        mask = None
        if ends is not None:  # sequences of different lengths
            later = torch.arange(kv_len, device=ends.device) > ends[:, None, None, None]
            zeros = torch.zeros(later.shape, dtype=self.dtype, device=ends.device)
            mask = zeros.masked_fill_(later, float("-inf"))
        return Span(tokens, slots, kv_len, mask, self._kind)

    def _prompt_spans(self, segment: Segment, first: int, device: torch.device) -> Iterator[Span]:
        """Yield the spans of a prompt's piece, whose tokens begin at ``first`` in the batch.

        On a CPU it is cut, since attention there also computes the scores that causality discards.
        """
        slot, start_pos, length = segment
        is_cut = self._kind == "cpu" and not self._is_compiled
        step = min(_CPU_SPAN, length) if is_cut else length
        past = start_pos + (length - 1) // step * step  # of the last span
        whole = None  # a mask that ends in a triangle; each span's is a part of it
        if is_cut or self._kind == "mps":
            whole = torch.zeros(self._n_rep, step, past + step, dtype=self.dtype, device=device)
            whole[:, :, past:] = whole.new_full((step, step), float("-inf")).triu_(1)
        for begin in range(0, length, step):
            n, before = min(step, length - begin), start_pos + begin
            mask: torch.Tensor | None = None
            if self._kind == "cuda" and before:  # fused kernels know it without a matrix
                # Imports PyTorch's compiler, for a second that no other device needs to wait.
                from torch.nn.attention.bias import causal_lower_right

                mask = causal_lower_right(n, before + n)
            elif whole is not None and (before or self._n_rep > 1 or self._kind == "mps"):
                # On MPS is_causal let tokens see later ones (pytorch issue 195910).
                mask = whole[:, :n, past - before : past + n].flatten(0, 1)
            tokens = slice(first + begin, first + begin + n)
            yield Span(tokens, slice(slot, slot + 1), before + n, mask, self._kind)


Backend = Sdpa | Varlen  # lays batches out


def _neighbours(segments: Sequence[Segment], i: int) -> Sequence[Segment]:
    """Return segment ``i``, and those behind it if each brings one token to the next slot."""
    end = i + 1
    while end < len(segments) and segments[i].length == segments[end].length == 1:
        if segments[end].slot != segments[i].slot + end - i:
            break
        end += 1
    return segments[i:end]


def _attend_one_each(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span
) -> torch.Tensor:
    """Attend from one token of each sequence.

    The query heads that share a key head stand as its positions, so that keys are read once:
    2 to 15 times as fast on a CPU as ``enable_gqa``.
    """
    n_rep = q.shape[1] // keys.shape[1]
    q = q.unflatten(1, (-1, n_rep))  # (n_slots, n_kv_heads, n_rep, head_dim)
    if n_rep == 1 and span.kind == "cpu" and q.dtype != torch.float32 and not cpu_has_amx():
        q = q.repeat(1, 1, 2, 1)  # in half precision a matrix is faster than a vector
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=span.mask)
    return out[:, :, :n_rep].flatten(1, 2)  # (n_slots, n_heads, head_dim)


def _attend_many(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span
) -> torch.Tensor:
    """Attend causally from several tokens of one sequence.

    The query heads that share a key head stand as a batch that expands to the same keys: CUDA's
    fused kernels take a mask with that, but not with ``enable_gqa`` (pytorch issue 181528).
    """
    n_rep = q.shape[1] // keys.shape[1]
    if span.kind == "cpu" and span.mask is not None and len(span.mask) > len(q):
        # (n_kv_heads, n_rep * n_tokens, head_dim)
        rows = q.unflatten(1, (-1, n_rep)).permute(1, 2, 0, 3).flatten(1, 2)
        out = F.scaled_dot_product_attention(rows[None], keys, values, attn_mask=span.mask)
        return out[0].unflatten(1, (n_rep, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    mask, n_past = span.mask, span.kv_len - len(q)
    if mask is None and n_past:  # compiled code, which left these to PyTorch, needs none
        mask = torch.ones(len(q), span.kv_len, dtype=torch.bool, device="cpu").tril_(n_past)
    out = F.scaled_dot_product_attention(
        q.unflatten(1, (-1, n_rep)).permute(2, 1, 0, 3),  # (n_rep, n_kv_heads, n_tokens, head_dim)
        keys.expand(n_rep, -1, -1, -1),
        values.expand(n_rep, -1, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return out.permute(2, 1, 0, 3).flatten(1, 2)  # (n_tokens, n_heads, head_dim)
