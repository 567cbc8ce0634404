"""The Llama network: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

A forward pass works on *packed* tokens: the new tokens of all rows of a batch, one row after
another, without padding. Everything but attention treats each token on its own; attention reads
the row's part of the key/value cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama.linear import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from llama.parallel import world_size


@dataclass
class ModelArgs:
    """The hyper-parameters of a checkpoint (its ``params.json``) and the size of the cache.

    ``vocab_size`` of -1 stands for the tokenizer's. ``n_kv_heads`` of None means one key/value
    head for each query head (multi-head attention).
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_batch_size: int = 32
    max_seq_len: int = 2048

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads, spelled out."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def hidden_dim(self) -> int:
        """The width of the feed-forward layer: 2/3 of 4 ``dim``, scaled, then rounded up."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)


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


def pack(segments: Sequence[Segment], device: torch.device) -> Packed:
    """Lay segments out one after another and group those that one attention call can serve."""
    spans = []
    first = 0
    i = 0
    while i < len(segments):
        row, start_pos, length = segments[i]
        group = [segments[i]]
        if length == 1:
            while i + len(group) < len(segments):
                candidate = segments[i + len(group)]
                if candidate.length != 1 or candidate.row != row + len(group):
                    break
                group.append(candidate)
        filled = max(s.start_pos for s in group) + length
        mask = None
        if length > 1 and start_pos > 0:  # causal, after what the cache already holds
            mask = torch.ones(length, filled, dtype=torch.bool, device=device).tril(start_pos)
        elif any(s.start_pos + length < filled for s in group):  # rows of different lengths
            lengths = torch.tensor([s.start_pos + 1 for s in group], device=device)
            mask = torch.arange(filled, device=device) < lengths[:, None, None, None]
        tokens = slice(first, first + length * len(group))
        spans.append(Span(tokens, slice(row, row + len(group)), filled, mask))
        first = tokens.stop
        i += len(group)
    rows = [s.row for s in segments for _ in range(s.length)]
    positions = [p for s in segments for p in range(s.start_pos, s.start_pos + s.length)]
    return Packed(torch.tensor(rows, device=device), torch.tensor(positions, device=device), spans)


class RMSNorm(nn.Module):
    """Root mean square layer normalisation, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def precompute_freqs_cis(
    head_dim: int, max_seq_len: int, theta: float, device: torch.device
) -> torch.Tensor:
    """The rotary angles' cosines and sines for every position (RoFormer, section 3.2.2).

    Pair ``i`` of a head turns by ``position * theta ** (-2 i / head_dim)``.

    Returns:
        float32, shape (max_seq_len, 2, head_dim / 2): cosines, then sines.
    """
    # On the CPU first: accelerators round the sines of large angles in ways of their own.
    exponents = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
    freqs = 1.0 / theta**exponents  # (head_dim / 2)
    angles = torch.outer(torch.arange(max_seq_len, device="cpu", dtype=torch.float32), freqs)
    table = torch.stack((angles.cos(), angles.sin()), dim=1)  # (max_seq_len, 2, head_dim / 2)
    return table.to(device)


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring elements of ``x`` by its position's angle.

    The complex product is written out in real numbers: some backends have no complex type.

    Args:
        x: shape (n_tokens, n_heads, head_dim).
        freqs_cis: float32, shape (n_tokens, 2, head_dim / 2).
    """
    cos, sin = freqs_cis.unsqueeze(1).unbind(2)  # (n_tokens, 1, head_dim / 2) each
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return turned.flatten(-2).type_as(x)  # (n_tokens, n_heads, head_dim)


class Attention(nn.Module):
    """Grouped-query self-attention over a preallocated key/value cache."""

    cache_k: torch.Tensor
    cache_v: torch.Tensor

    def __init__(self, args: ModelArgs):
        super().__init__()
        n_ranks = world_size()
        self.head_dim = args.head_dim
        # With more ranks than key/value heads each rank keeps a copy of the one it needs.
        n_kv_heads = max(args.kv_heads, n_ranks)
        self.n_local_heads = args.n_heads // n_ranks
        self.n_local_kv_heads = n_kv_heads // n_ranks
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * self.head_dim)
        self.wk = ColumnParallelLinear(args.dim, n_kv_heads * self.head_dim)
        self.wv = ColumnParallelLinear(args.dim, n_kv_heads * self.head_dim)
        self.wo = RowParallelLinear(args.n_heads * self.head_dim, args.dim)

    def allocate_cache(self, args: ModelArgs, device: torch.device, dtype: torch.dtype) -> None:
        shape = (args.max_batch_size, args.max_seq_len, self.n_local_kv_heads, self.head_dim)
        for name in ("cache_k", "cache_v"):
            empty = torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, empty, persistent=False)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor, packed: Packed) -> torch.Tensor:
        xq = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (n_tokens, n_heads, head_dim)
        xk = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (n_tokens, n_kv_heads, head_dim)
        xv = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (n_tokens, n_kv_heads, head_dim)
        xq = apply_rotary_emb(xq, freqs_cis)
        xk = apply_rotary_emb(xk, freqs_cis)
        self.cache_k[packed.rows, packed.positions] = xk
        self.cache_v[packed.rows, packed.positions] = xv
        attended = [self.attend(xq[span.tokens], span) for span in packed.spans]
        return self.wo(torch.cat(attended).flatten(1))  # (n_tokens, dim)

    def attend(self, xq: torch.Tensor, span: Span) -> torch.Tensor:
        """Attention of a span's queries, (n, n_heads, head_dim), to its rows' cached keys."""
        keys = self.cache_k[span.rows, : span.filled].transpose(1, 2)
        values = self.cache_v[span.rows, : span.filled].transpose(1, 2)
        # keys, values: (n_rows, n_kv_heads, filled, head_dim). Query heads share them in groups;
        # two layouts of the queries say so without copying a key.
        n_rep = self.n_local_heads // self.n_local_kv_heads
        xq = xq.unflatten(1, (-1, n_rep))  # (n, n_kv_heads, n_rep, head_dim)
        if xq.device.type == "mps":  # strided keys gave wrong sums there (pytorch issue 163597)
            keys, values = keys.contiguous(), values.contiguous()
        if xq.shape[0] == keys.shape[0]:  # one token a row: the group stands as its positions
            out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=span.mask)
        else:  # many tokens of one row: the group stands as a batch that looks at one row
            out = F.scaled_dot_product_attention(
                xq.permute(2, 1, 0, 3),  # (n_rep, n_kv_heads, n, head_dim)
                keys.expand(n_rep, -1, -1, -1),
                values.expand(n_rep, -1, -1, -1),
                attn_mask=span.mask,
                is_causal=span.mask is None,
            ).permute(2, 1, 0, 3)
        return out.flatten(1, 2)  # (n, n_heads, head_dim)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1(x)) * w3(x))`` (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, dim)
        self.w3 = ColumnParallelLinear(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added to its input."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor, packed: Packed) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis, packed)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Llama with its key/value cache. Parameters are left unset for a checkpoint to fill."""

    freqs_cis: torch.Tensor

    def __init__(self, params: ModelArgs):
        super().__init__()
        self.params = params
        n_ranks = world_size()
        padded_vocab = -(-params.vocab_size // n_ranks) * n_ranks
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, padded_vocab, gather_output=True)
        self.allocate_buffers(torch.get_default_device(), torch.get_default_dtype())

    def allocate_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the rotary table and an empty key/value cache on ``device``.

        The cache holds ``max_batch_size * max_seq_len`` positions a layer, in ``dtype``; its
        memory is first touched where tokens are written.
        """
        args = self.params
        table = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta, device)
        self.register_buffer("freqs_cis", table, persistent=False)
        for block in self.layers:
            block.attention.allocate_cache(args, device, dtype)  # type: ignore[operator, union-attr]

    def clear_cache(self) -> None:
        """Forget everything: not a number, once in the cache, would spread to later calls."""
        for name, buffer in self.named_buffers():
            if name.endswith(("cache_k", "cache_v")):
                buffer.zero_()

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: int | Sequence[int] | torch.Tensor = 0,
        positions: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of new tokens; the cache holds what came before and takes up what is new.

        Args:
            tokens: token ids, shape (bsz, seqlen); row i of the batch is row i of the cache.
            start_pos: how many tokens of each row the cache already holds: one number for all
                rows, or one for each.
            positions: which of the ``seqlen`` positions to give logits for; None for all.

        Returns:
            float32, shape (bsz, seqlen or len(positions), vocab_size).

        Raises:
            ValueError: the tokens don't fit the cache.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: expected shape (bsz, seqlen)")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}: expected token ids, torch.int64")
        if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.params.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self.params.vocab_size}")
        bsz, seqlen = tokens.shape
        if isinstance(start_pos, int):
            starts = [start_pos] * bsz
        else:
            starts = [int(start) for start in start_pos]
        if len(starts) != bsz:
            raise ValueError(
                f"{len(starts)} start positions for {bsz} rows: give one number or one for each row"
            )
        select = None
        if positions is not None:
            chosen = [int(position) for position in positions]
            wrong = [p for p in chosen if not -seqlen <= p < seqlen]
            if wrong:
                raise ValueError(f"position {wrong[0]} of {seqlen} new tokens")
            flat = [row * seqlen + p % seqlen for row in range(bsz) for p in chosen]
            select = torch.tensor(flat, device=tokens.device, dtype=torch.long)
        segments = [Segment(row, start, seqlen) for row, start in enumerate(starts)]
        logits = self.forward_packed(tokens.flatten(), segments, select)
        return logits.unflatten(0, (bsz, seqlen if positions is None else len(positions)))

    @torch.inference_mode()
    def forward_packed(
        self,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        select: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``forward``, for rows that bring different numbers of tokens.

        Args:
            tokens: token ids of all segments one after another, shape (n_tokens,).
            segments: where they go; rows in ascending order, each at most once.
            select: indices into ``tokens`` of those to give logits for; None for all.

        Returns:
            float32, shape (n_tokens or len(select), vocab_size).

        Raises:
            ValueError: the tokens don't fit the cache.
        """
        self._check(tokens, segments)
        packed = pack(segments, tokens.device)
        freqs_cis = self.freqs_cis[packed.positions]
        h = self.tok_embeddings(tokens)  # (n_tokens, dim)
        for layer in self.layers:
            h = layer(h, freqs_cis, packed)
        h = self.norm(h if select is None else h[select])
        return self.output(h)[:, : self.params.vocab_size].float()

    def _check(self, tokens: torch.Tensor, segments: Sequence[Segment]) -> None:
        total = sum(length for _, _, length in segments)
        if not segments or tokens.shape != (total,):
            raise ValueError(f"{tuple(tokens.shape)} tokens for segments of {total} in all")
        previous = -1
        for row, start_pos, length in segments:
            if not previous < row < self.params.max_batch_size:
                raise ValueError(
                    f"row {row} after row {previous}: rows ascend and stay below the cache's "
                    f"max_batch_size of {self.params.max_batch_size}"
                )
            if length < 1 or start_pos < 0 or start_pos + length > self.params.max_seq_len:
                raise ValueError(
                    f"row {row}: {length} tokens from position {start_pos} don't fit the cache's "
                    f"max_seq_len of {self.params.max_seq_len}"
                )
            previous = row
