"""Attention of a ragged batch's queries to the key/value cache, by one of two backends."""

import logging

import torch
import torch.nn.functional as F

from llama import parallel
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
        if device.type == "meta":
            return Varlen(shape[0], shape[2], device)
        reason = _difference(shape, n_heads, device, sdpa)
        # Ranks whose attention differs would record other steps.
        if not parallel.max_over_ranks(torch.tensor(float(bool(reason)), device=device)):
            logger.info("attention by varlen_attn, in pages")
            return Varlen(shape[0], shape[2], device)
        logger.warning("varlen_attn isn't used: %s", reason)
    logger.info("attention by scaled_dot_product_attention (%s)", reason)
    return sdpa


@torch.inference_mode()
def _difference(
    shape: tuple[int, int, int, int], n_heads: int, device: torch.device, sdpa: Sdpa
) -> str:
    """Return how ``varlen_attn`` differs from SDPA on a device; an empty string if it doesn't.

    A signature doesn't tell what works: a short and a long sequence are tried, in both forms.
    """
    n_kv_heads, head_dim = shape[1], shape[3]
    shape = (2, n_kv_heads, _LONG + 2 * MAX_DRAFT, head_dim)
    varlen = Varlen(2, shape[2], device)
    plain, paged = (KVCache(shape, sdpa.dtype, device, paged=p) for p in (False, True))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, sdpa.dtype)

    for ours, theirs in ((plain.k, paged.k), (plain.v, paged.v)):
        ours.copy_(random(*shape))
        theirs[:, : shape[2]] = ours.transpose(1, 2)
    both = (Segment(0, _LONG, 1), Segment(1, _SHORT, 1))
    steps = {
        "reading": [segment._replace(length=MAX_DRAFT + 1) for segment in both],
        "decoding drafts": [segment._replace(length=3) for segment in both],
        "decoding": both[:1],  # which is divided among more processors
    }
    for name, segments in steps.items():
        q = random(sum(segment.length for segment in segments), n_heads, head_dim)
        expected = ragged_attention(q, plain, sdpa.layout(segments, device))
        try:
            found = ragged_attention(q, paged, varlen.layout(segments, device))
        except (RuntimeError, ValueError, NotImplementedError) as problem:
            return f"it fails while {name}: {problem}"
        error = float((found - expected).abs().max())
        if not error < 0.05:
            return f"it is wrong by {error:.2g} while {name}"
    return ""
