"""The Llama network: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

A forward pass processes a *ragged batch*: the new tokens of several sequences, one sequence after
another, without padding. All but attention treats each token on its own; attention reads the
sequence's slot of the key/value cache.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llama.args import ModelArgs as ModelArgs
from llama.layers import kernels
from llama.layers.attention import Backend, Sdpa, ragged_attention
from llama.layers.batch import RaggedBatch, Segment, check_segments
from llama.layers.capability import Capability
from llama.layers.kv_cache import KVCache
from llama.layers.linear import (
    ColumnParallelLinear,
    ParallelEmbedding,
    ParallelLinear,
    RowParallelLinear,
    fused_linear,
    joined_linear,
    pack,
)
from llama.layers.quantization import Form
from llama.parallel import world_size
from llama.rope import attention_factor, rope_factors, rope_freqs


class RMSNorm(nn.Module):
    """Root mean square layer normalisation, in float32 (https://arxiv.org/abs/1910.07467)."""

    adapted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = kernels.rms_norm(x, self.weight, self.eps)
        return out if self.adapted is None else self.adapted(x, out)


def precompute_freqs_cis(args: ModelArgs, device: torch.device) -> torch.Tensor:
    """Return the rotary angles' cosines and sines for every position (RoFormer, section 3.2.2).

    Returns:
        float32, shape (max_seq_len, head_dim / 2, 2): of each pair its cosine and its sine.
    """
    # On the CPU first: accelerators round the sines of large angles differently.
    freqs = rope_freqs(args) / rope_factors(args)
    positions = torch.arange(args.max_seq_len, device="cpu", dtype=torch.float32)
    angles = torch.outer(positions, freqs)  # (max_seq_len, head_dim / 2)
    pairs = torch.stack((angles.cos(), angles.sin()), dim=-1) * attention_factor(args)
    return pairs.to(device)  # (max_seq_len, head_dim / 2, 2)


def apply_rotary_emb(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring elements of ``x`` by its position's angle.

    Args:
        x: shape (n_tokens, n_heads, head_dim).
        freqs_cis: float32, shape (n_tokens, head_dim / 2, 2).

    Returns:
        The shape and dtype of ``x``.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (n_tokens, n_heads, head_dim / 2, 2)
    freqs_cis = freqs_cis.unsqueeze(1)
    if x.is_mps or torch.compiler.is_compiling():  # which have no complex numbers, or slow ones
        (real, imag), (cos, sin) = pairs.unbind(-1), freqs_cis.unbind(-1)
        rotated = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    else:
        product = torch.view_as_complex(pairs) * torch.view_as_complex(freqs_cis)
        rotated = torch.view_as_real(product)
    return rotated.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention over a preallocated key/value cache."""

    cache: KVCache

    def __init__(self, args: ModelArgs):
        super().__init__()
        n_ranks = world_size()
        self.head_dim = args.head_dim
        # With more ranks than key/value heads each rank keeps a copy of the one it needs.
        n_kv_heads = max(args.kv_heads, n_ranks)
        self.n_local_heads = args.n_heads // n_ranks
        self.n_local_kv_heads = n_kv_heads // n_ranks
        q_dim, kv_dim = args.n_heads * self.head_dim, n_kv_heads * self.head_dim
        bias = args.attention_bias
        self.wq = ColumnParallelLinear(args.dim, q_dim, bias=bias)
        self.wk = ColumnParallelLinear(args.dim, kv_dim, bias=bias)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, bias=bias)
        self.wo = RowParallelLinear(q_dim, args.dim, bias=bias)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        heads = self.n_local_heads, self.n_local_kv_heads
        xqkv = joined_linear(x, self.wq, self.wk, self.wv).unflatten(-1, (-1, self.head_dim))
        if kernels.has_rotation(xqkv, freqs_cis, self.cache, batch):  # the same in one call
            xq = kernels.rotate(xqkv, freqs_cis, self.cache, batch)
        else:
            xqk, xv = xqkv.split((sum(heads), heads[1]), dim=1)  # (n_tokens, some heads, head_dim)
            xq, xk = apply_rotary_emb(xqk, freqs_cis).split(heads, dim=1)
            n_tokens = len(batch.slots)  # without padding
            self.cache.update(xk[:n_tokens], xv[:n_tokens], batch.slots, batch.positions)
        out = ragged_attention(xq, self.cache, batch)
        return self.wo(out.flatten(1))  # (n_tokens, dim)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1(x)) * w3(x))`` (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False):
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden_dim, bias=bias)
        self.w2 = RowParallelLinear(hidden_dim, dim, bias=bias)
        self.w3 = ColumnParallelLinear(dim, hidden_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Gate and up are freed before the last product.
        return self.w2(kernels.swiglu(*fused_linear(x, self.w1, self.w3)))  # (n_tokens, dim)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added to its input."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.hidden_dim, args.mlp_bias)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis, batch)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A Llama with its key/value cache. Parameters are left unset for a checkpoint to fill."""

    freqs_cis: torch.Tensor
    forms: Mapping[str, Form] = MappingProxyType({})  # of quantised weights, by module
    n_passes = 0  # forward passes so far, each of which changed the cache
    min_tokens = 1  # which a pass is padded to, as the kernels are fastest
    prefill_tokens = 512  # of prompts that a pass takes at most

    def __init__(self, params: ModelArgs):
        super().__init__()
        self.params = params
        n_ranks = world_size()
        padded_outputs = -(-params.n_outputs // n_ranks) * n_ranks
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        if params.n_outputs:  # without a head a network embeds
            self.output = ColumnParallelLinear(params.dim, padded_outputs, gather_output=True)
            self.output.is_shared = params.tie_word_embeddings and n_ranks == 1
        self.allocate_buffers(torch.get_default_device(), torch.get_default_dtype())

    def allocate_buffers(
        self,
        device: torch.device,
        dtype: torch.dtype,
        int8_cache: bool = False,
        backend: Backend | None = None,
    ) -> None:
        """Make the rotary table and an empty key/value cache on ``device``, where weights are.

        Attention is by ``backend``, or by SDPA, which any device has.

        The cache has ``max_batch_size * max_seq_len`` positions a layer; those that are written
        take up memory.
        """
        params = self.params
        self.capability = Capability.of(device)
        table = precompute_freqs_cis(params, device)
        self.register_buffer("freqs_cis", table, persistent=False)
        self.backend = backend or Sdpa(self.capability.kind, dtype)
        n_kv_heads = next(self._blocks()).attention.n_local_kv_heads
        shape = (params.max_batch_size, n_kv_heads, params.max_seq_len, params.head_dim)
        for block in self._blocks():
            cache = KVCache(shape, dtype, device, int8_cache, self.backend.position_major)
            block.attention.cache = cache

    def quantize(self, forms: Mapping[str, Form], dtype: torch.dtype) -> None:
        """Store the weights of some modules in their forms, for a checkpoint to fill."""
        self.forms = dict(forms)
        for name, module in self.named_modules():
            is_tied = name == "output" and self.params.tie_word_embeddings
            form = forms.get("tok_embeddings" if is_tied else name)
            if form is not None and isinstance(module, ParallelLinear | ParallelEmbedding):
                module.quantize(form, dtype)

    def linear_groups(self) -> Iterator[tuple[ParallelLinear, ...]]:
        """Yield the linear layers, those together that multiply the same input."""
        for block in self._blocks():
            attention, feed_forward = block.attention, block.feed_forward
            yield attention.wq, attention.wk, attention.wv
            yield (attention.wo,)
            yield feed_forward.w1, feed_forward.w3
            yield (feed_forward.w2,)
        if self.params.n_outputs:
            yield (self.output,)

    def pack(self) -> None:
        """Give the linear layers the fastest kernels, which take over their weights."""
        for layers in self.linear_groups():
            self.pack_group(layers)

    def pack_group(self, layers: tuple[ParallelLinear, ...], owned: bool = False) -> bool:
        """Pack one of ``linear_groups``; return whether kernels took over all its weights.

        Those that are ``owned``, which nobody else reads, may be changed where they are.
        """
        packed = pack(layers, self.capability, owned)
        self.min_tokens = max([self.min_tokens, *(kernel.min_tokens for kernel in packed)])
        if packed and layers[0].is_shared and packed[0].reads_rows:
            self.tok_embeddings.give_to(packed[0], slice(None))
        return all(layer.kernel for layer in layers)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights as ``nn.Module`` does; a model that was packed is packed again."""
        was_packed = self._is_packed()
        result = super().load_state_dict(*args, **kwargs)
        if was_packed:
            if self.params.n_outputs and self.output.is_shared:
                self.output.load_state_dict(self.tok_embeddings.state_dict(), assign=True)
            self.pack()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_was_packed": self._is_packed()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_packed = state.pop("_was_packed")
        super().__setstate__(state)
        if was_packed:  # copies and pickles hold the stored weights
            self.pack()

    def _is_packed(self) -> bool:
        return any(layer.kernel for layers in self.linear_groups() for layer in layers)

    def copy_cache(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first positions of one slot of the cache to another."""
        for block in self._blocks():
            block.attention.cache.copy(source, target, n_tokens)

    def clear_cache(self) -> None:
        """Set the whole cache to zero."""
        for block in self._blocks():
            block.attention.cache.clear()

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: int | Sequence[int] | torch.Tensor = 0,
        positions: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of new tokens; the cache holds the earlier ones and is updated.

        Args:
            tokens: token ids, shape (bsz, seqlen); sequence i has slot i of the cache.
            start_pos: how many tokens of each sequence the cache already holds: one number for
                all, or one for each.
            positions: which of the ``seqlen`` positions to return logits for; None for all.

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
                f"{len(starts)} start positions for {bsz} sequences: give one number, or one for "
                "each"
            )
        select = None
        if positions is not None:
            chosen = [int(position) for position in positions]
            wrong = [p for p in chosen if not -seqlen <= p < seqlen]
            if wrong:
                raise ValueError(f"position {wrong[0]} of {seqlen} new tokens")
            flat = [i * seqlen + p % seqlen for i in range(bsz) for p in chosen]
            select = torch.tensor(flat, device=tokens.device, dtype=torch.long)
        segments = [Segment(slot, start, seqlen) for slot, start in enumerate(starts)]
        logits = self.forward_ragged(tokens.flatten(), segments, select)
        return logits.unflatten(0, (bsz, seqlen if positions is None else len(positions)))

    @torch.inference_mode()
    def forward_ragged(
        self, tokens: torch.Tensor, segments: Sequence[Segment], select: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits as ``forward`` does, for sequences with different numbers of tokens.

        Args:
            tokens: token ids of all segments one after another, shape (n_tokens,).
            segments: where they go, each slot at most once.
            select: indices into ``tokens`` of those to return logits for; None for all.

        Returns:
            float32, shape (n_tokens or len(select), n_outputs).

        Raises:
            ValueError: the tokens don't fit the cache.
        """
        return self.logits(self.hidden_states(tokens, segments, select))

    @torch.inference_mode()
    def hidden_states(
        self, tokens: torch.Tensor, segments: Sequence[Segment], select: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the last hidden states, normed: (n_tokens or len(select), dim).

        Arguments and errors as in ``forward_ragged``.
        """
        self.begin_pass(tokens, segments)
        batch = self.backend.layout(segments, tokens.device)
        h = self.forward_layers(tokens, batch, self.layers)
        normed: torch.Tensor = self.norm(h if select is None else h[select])
        return normed

    def begin_pass(self, tokens: torch.Tensor, segments: Sequence[Segment]) -> None:
        """Check that tokens fit the cache, which is about to change."""
        params = self.params
        check_segments(segments, tokens, params.max_batch_size, params.max_seq_len)
        self.n_passes += 1

    def forward_layers(
        self,
        tokens: torch.Tensor,
        batch: RaggedBatch,
        layers: Iterable[Callable[..., torch.Tensor]],
    ) -> torch.Tensor:
        """Return the last layer's output of token ids: (n_tokens,) to (n_tokens, dim)."""
        n_more = max(0, self.min_tokens - len(tokens))
        ids, places = (F.pad(x, (0, n_more)) if n_more else x for x in (tokens, batch.positions))
        freqs_cis, h = self.freqs_cis[places], self.tok_embeddings(ids)  # h: (n_tokens, dim)
        for layer in layers:
            h = layer(h, freqs_cis, batch)
        return h[: len(tokens)]

    def output_logits(self, h: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last layer's output: (n, dim) to float32, (n, n_outputs)."""
        return self.logits(self.norm(h))

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the float32 logits of normed hidden states: (n, dim) to (n, n_outputs)."""
        if not self.params.n_outputs:
            raise ValueError("this network has no head, and gives hidden states only")
        return self.output(normed)[:, : self.params.n_outputs].float()

    def _blocks(self) -> Iterator[TransformerBlock]:
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            yield block
