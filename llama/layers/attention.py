"""Attention of a ragged batch's queries to the key/value cache, by one of two backends."""

import logging

import torch
import torch.nn.functional as F

from llama.layers.batch import RaggedBatch, Segment
from llama.layers.capability import Capability
from llama.layers.kv_cache import KVCache
from llama.layers.sdpa import Sdpa
from llama.layers.varlen import MAX_DRAFT, Varlen

logger = logging.getLogger(__name__)

Backend = Sdpa | Varlen
_LONG, _SHORT = 700, 5  # positions of the sequences that a backend is tried with


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
    parts = [call.attend(q[call.tokens], kv_cache) for call in batch.calls]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    n_padding = len(q) - len(batch.slots)
    return F.pad(out, (0, 0, 0, 0, 0, n_padding)) if n_padding else out


def choose_backend(
    shape: tuple[int, int, int, int],
    n_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    int8_cache: bool,
    capability: Capability,
) -> Backend:
    """Return the fastest backend that is right on a device, and log which it is.

    Args:
        shape: of the cache, (max_batch_size, n_kv_heads, max_seq_len, head_dim).
        n_heads: of the queries.
        dtype: of queries, keys and values.
        device: of the cache.
        int8_cache: whether the cache has eight bits.
        capability: of the device.
    """
    if capability.kind == "cuda":
        # It plans anew for each length, and is wrong for few heads (pytorch issue 193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
    sdpa = Sdpa(capability.kind, dtype)
    reason = "an int8 cache" if int8_cache else f"{dtype} on {capability.kind}"
    if dtype in capability.varlen_dtypes and not int8_cache:
        reason = _difference((2, *shape[1:]), n_heads, dtype, device, sdpa)
        if not reason:
            logger.info("attention by varlen_attn, in pages")
            return Varlen(shape[0], shape[2], device)
        logger.warning("varlen_attn isn't used: %s", reason)
    logger.info("attention by scaled_dot_product_attention (%s)", reason)
    return sdpa


@torch.inference_mode()
def _difference(
    shape: tuple[int, int, int, int],
    n_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    sdpa: Sdpa,
) -> str:
    """Return how ``varlen_attn`` differs from SDPA on a device; an empty string if it doesn't.

    A signature doesn't tell what works: two sequences are tried, in decoding and in reading.
    """
    if device.type == "meta":
        return ""
    n_slots, n_kv_heads, _, head_dim = shape
    shape = (n_slots, n_kv_heads, _LONG + MAX_DRAFT + 1, head_dim)
    lengths = (_LONG, _SHORT)
    steps = {
        "reading": [Segment(slot, 0, length) for slot, length in enumerate(lengths)],
        "reading on": [Segment(slot, n, MAX_DRAFT + 1) for slot, n in enumerate(lengths)],
        "decoding": [Segment(slot, n, 1 + 2 * slot) for slot, n in enumerate(lengths)],
    }
    backends: tuple[Backend, Backend] = (sdpa, Varlen(n_slots, shape[2], device))
    caches = [KVCache(shape, dtype, device, paged=backend.paged) for backend in backends]
    generator = torch.Generator().manual_seed(0)
    for name, segments in steps.items():
        n_tokens = sum(segment.length for segment in segments)
        q, xk, xv = (
            torch.randn(n_tokens, n, head_dim, generator=generator, device="cpu").to(device, dtype)
            for n in (n_heads, n_kv_heads, n_kv_heads)
        )
        try:
            expected, found = (
                _attend(q, xk, xv, cache, backend.layout(segments, device))
                for cache, backend in zip(caches, backends, strict=True)
            )
            error = (found - expected).abs().max().item()
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            return f"it fails while {name}: {problem}"
        if not error < 0.05:
            return f"it is wrong by {error:.2g} while {name}"
    return ""


def _attend(
    q: torch.Tensor, xk: torch.Tensor, xv: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch
) -> torch.Tensor:
    kv_cache.update(xk, xv, batch.slots, batch.positions)
    return ragged_attention(q, kv_cache, batch).float()
