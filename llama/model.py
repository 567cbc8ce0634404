"""The Llama network: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

A forward pass works on *packed* tokens: the new tokens of all rows of a batch, one row after
another, without padding. Everything but attention treats each token on its own; attention reads
the row's part of the key/value cache.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llama import cache
from llama.args import ModelArgs as ModelArgs
from llama.linear import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, project
from llama.packing import Packed, Segment, Span, check_segments, pack
from llama.parallel import world_size


class RMSNorm(nn.Module):
    """Root mean square layer normalisation, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_factors(args: ModelArgs) -> torch.Tensor:
    """What each rotary frequency is divided by, so that a network reads longer texts.

    ``rope_scaling`` is None, or has a ``rope_type`` and that type's parameters:

    - ``linear``: ``factor`` for all (https://arxiv.org/abs/2306.15595).
    - ``llama3``: ``factor`` for waves longer than ``original_max_position_embeddings /
      low_freq_factor``, 1 for those shorter than the same by ``high_freq_factor``, and a mixture
      of both frequencies in between (Llama 3.1's reference).
    - ``factors``: ``factors`` lists them.

    Returns:
        float32, shape (head_dim / 2,).
    """
    scaling = args.rope_scaling or {"rope_type": "linear", "factor": 1.0}
    if scaling["rope_type"] == "factors":
        return torch.tensor(scaling["factors"], device="cpu", dtype=torch.float32)
    factor = torch.full((args.head_dim // 2,), float(scaling["factor"]), device="cpu")
    if scaling["rope_type"] == "linear":
        return factor
    turns = scaling["original_max_position_embeddings"] * rope_freqs(args) / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # how much of the frequency stays unscaled
    return 1 / ((1 - kept) / factor + kept)


def rope_freqs(args: ModelArgs) -> torch.Tensor:
    """Pair ``i`` of a head turns by ``rope_theta ** (-2 i / head_dim)`` from token to token.

    Returns:
        float32, shape (head_dim / 2,), before any scaling.
    """
    exponents = torch.arange(0, args.head_dim, 2, device="cpu", dtype=torch.float32)
    return 1.0 / args.rope_theta ** (exponents / args.head_dim)


def precompute_freqs_cis(args: ModelArgs, device: torch.device) -> torch.Tensor:
    """The rotary angles' cosines and sines for every position (RoFormer, section 3.2.2).

    Returns:
        float32, shape (max_seq_len, 2, head_dim): for each element of a head the factor of
        itself, then that of its neighbour in the pair.
    """
    # On the CPU first: accelerators round the sines of large angles in ways of their own.
    freqs = rope_freqs(args) / rope_factors(args)
    positions = torch.arange(args.max_seq_len, device="cpu", dtype=torch.float32)
    angles = torch.outer(positions, freqs)
    cos, sin = angles.cos(), angles.sin()  # (max_seq_len, head_dim / 2)
    pairs = torch.stack((cos, cos, -sin, sin), dim=-1).unflatten(-1, (2, 2))
    return pairs.transpose(1, 2).flatten(2).to(device)  # (max_seq_len, 2, head_dim)


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring elements of ``x`` by its position's angle.

    The complex product is written out in real numbers: some backends have no complex type.

    Args:
        x: shape (n_tokens, n_heads, head_dim).
        freqs_cis: float32, shape (n_tokens, 2, head_dim).
    """
    cos, sin = freqs_cis.unsqueeze(1).unbind(2)  # (n_tokens, 1, head_dim) each
    x32 = x.float()
    neighbours = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x32 * cos, neighbours, sin).type_as(x)  # (n_tokens, n_heads, head_dim)


class Attention(nn.Module):
    """Grouped-query self-attention over a preallocated key/value cache."""

    cache_k: torch.Tensor
    cache_v: torch.Tensor
    cache_k_scales: torch.Tensor
    cache_v_scales: torch.Tensor

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

    def allocate_cache(
        self, args: ModelArgs, device: torch.device, dtype: torch.dtype, in_int8: bool
    ) -> None:
        # Each head's keys lie side by side, as attention reads them.
        shape = (args.max_batch_size, self.n_local_kv_heads, args.max_seq_len, self.head_dim)
        for name in ("cache_k", "cache_v"):
            entries, scales = cache.allocate(shape, dtype, device, in_int8)
            self.register_buffer(name, entries, persistent=False)
            self.register_buffer(f"{name}_scales", scales, persistent=False)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor, packed: Packed) -> torch.Tensor:
        xq, xk, xv = project(x, self.wq, self.wk, self.wv)
        xq = xq.unflatten(-1, (-1, self.head_dim))  # (n_tokens, n_heads, head_dim)
        xk = xk.unflatten(-1, (-1, self.head_dim))  # (n_tokens, n_kv_heads, head_dim)
        xv = xv.unflatten(-1, (-1, self.head_dim))  # (n_tokens, n_kv_heads, head_dim)
        turned = apply_rotary_emb(torch.cat((xq, xk), dim=1), freqs_cis)
        xq, xk = turned.split((self.n_local_heads, self.n_local_kv_heads), dim=1)
        n_tokens = len(packed.rows)  # without padding
        cache.store(self.cache_k, self.cache_k_scales, xk[:n_tokens], packed)
        cache.store(self.cache_v, self.cache_v_scales, xv[:n_tokens], packed)
        attended = torch.zeros_like(xq)
        for span in packed.spans:
            attended[span.tokens] = self.attend(xq[span.tokens], span)
        return self.wo(attended.flatten(1))  # (n_tokens, dim)

    def attend(self, xq: torch.Tensor, span: Span) -> torch.Tensor:
        """Attention of a span's queries, (n, n_heads, head_dim), to its rows' cached keys."""
        # Shape (n_rows, n_kv_heads, filled, head_dim):
        keys = cache.read(self.cache_k, self.cache_k_scales, span)
        values = cache.read(self.cache_v, self.cache_v_scales, span)
        # Query heads share them in groups; two layouts of the queries say so without copying a key.
        n_rep = self.n_local_heads // self.n_local_kv_heads
        xq = xq.unflatten(1, (-1, n_rep))  # (n, n_kv_heads, n_rep, head_dim)
        if xq.device.type == "mps":  # strided keys gave wrong sums there (pytorch issue 163597)
            keys, values = keys.contiguous(), values.contiguous()
        if xq.shape[0] == keys.shape[0]:  # one token a row: the group stands as its positions
            if n_rep == 1 and xq.device.type == "cpu":
                xq = xq.expand(-1, -1, 2, -1)  # PyTorch multiplies a matrix faster than a vector
            out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=span.mask)
            out = out[:, :, :n_rep]
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
        gate, up = project(x, self.w1, self.w3)
        return self.w2(F.silu(gate) * up)


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
    n_passes = 0  # forward passes so far, each of which changed the cache
    compiled: "Callable[[Transformer, torch.Tensor, Sequence[Segment]], torch.Tensor] | None" = None

    def __init__(self, params: ModelArgs):
        super().__init__()
        self.params = params
        n_ranks = world_size()
        padded_outputs = -(-params.n_outputs // n_ranks) * n_ranks
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, padded_outputs, gather_output=True)
        self.output.shared = params.tie_word_embeddings
        self.allocate_buffers(torch.get_default_device(), torch.get_default_dtype())

    def allocate_buffers(
        self, device: torch.device, dtype: torch.dtype, cache_in_int8: bool = False
    ) -> None:
        """Make the rotary table and an empty key/value cache on ``device``.

        Of ``max_batch_size * max_seq_len`` positions a layer; those written to take up memory.
        """
        table = precompute_freqs_cis(self.params, device)
        self.register_buffer("freqs_cis", table, persistent=False)
        for block in self.layers:
            block.attention.allocate_cache(self.params, device, dtype, cache_in_int8)  # type: ignore[operator, union-attr]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}  # which is bound to this network's layers

    def clear_cache(self) -> None:
        """Forget everything: not a number, once in the cache, would spread to later calls."""
        for name, buffer in self.named_buffers():
            if ".cache_" in name:
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
            float32, shape (bsz, seqlen or len(positions), n_outputs).

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
            float32, shape (n_tokens or len(select), n_outputs).

        Raises:
            ValueError: the tokens don't fit the cache.
        """
        if self.compiled is not None and select is None and all(s.length == 1 for s in segments):
            self._begin_pass(tokens, segments)
            return self.compiled(self, tokens, segments)
        return self.logits(self.hidden_states(tokens, segments, select))

    @torch.inference_mode()
    def hidden_states(
        self,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        select: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What ``forward_packed`` makes logits of: shape (n_tokens or len(select), dim)."""
        self._begin_pass(tokens, segments)
        h = self.pass_layers(tokens, pack(segments, tokens.device), self.layers)
        normed: torch.Tensor = self.norm(h if select is None else h[select])
        return normed

    def pass_layers(
        self, tokens: torch.Tensor, packed: Packed, layers: Iterable[Callable[..., torch.Tensor]]
    ) -> torch.Tensor:
        """From token ids through all layers, shape (n_tokens,) to (n_tokens, dim)."""
        extra = (0, self.layers[0].attention.wo.padding(len(tokens)))  # type: ignore[operator, union-attr]
        freqs_cis = self.freqs_cis[F.pad(packed.positions, extra)]
        h = self.tok_embeddings(F.pad(tokens, extra))  # (n_tokens, dim)
        for layer in layers:
            h = layer(h, freqs_cis, packed)
        return h[: len(tokens)]

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Shape (n_tokens, dim) to (n_tokens, n_outputs), in float32."""
        return self.output(normed)[:, : self.params.n_outputs].float()

    def _begin_pass(self, tokens: torch.Tensor, segments: Sequence[Segment]) -> None:
        params = self.params
        check_segments(segments, tokens, params.max_batch_size, params.max_seq_len)
        self.n_passes += 1
