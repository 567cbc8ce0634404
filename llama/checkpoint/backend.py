"""The choice of an attention backend, and the check for a compiler, while a model is loaded."""

import logging
import os
import shutil
import sys

import torch

from llama import parallel
from llama.args import ModelArgs
from llama.layers.attention import Backend, Sdpa, ragged_attention
from llama.layers.batch import Segment
from llama.layers.capability import Capability
from llama.layers.kernels import compile_prompts
from llama.layers.kv_cache import KVCache
from llama.layers.varlen import MAX_DRAFT, Varlen

logger = logging.getLogger(__name__)

_LONG, _SHORT = 700, 5  # positions of the sequences that a backend is tried with


def choose_backend(
    args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, int8_cache: bool
) -> Backend:
    """Return the fastest backend that is right on a device, and log which it is.

    Args:
        args: the hyper-parameters, with the size of the cache.
        ranks: the number of ranks that share the network.
        dtype: of queries, keys and values.
        device: of the cache.
        int8_cache: whether the cache has eight bits.
    """
    capability = Capability.of(device)
    if capability.kind == "cuda":
        # It plans again for each length, and is wrong for few heads (pytorch issue 193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
    n_heads, n_kv_heads = args.n_heads // ranks, max(args.kv_heads, ranks) // ranks
    is_compiled = capability.kind == "cpu" and not int8_cache
    is_compiled = is_compiled and compile_prompts(dtype, n_heads, args.head_dim)
    sdpa = Sdpa(capability.kind, dtype, n_heads // n_kv_heads, is_compiled)
    reason = "an int8 cache" if int8_cache else f"{dtype} on {capability.kind}"
    if dtype in capability.varlen_dtypes and not int8_cache:
        reason = _difference((n_heads, n_kv_heads, args.head_dim), device, sdpa)
        # Ranks whose attention differs would record other steps.
        if not parallel.max_over_ranks(torch.tensor(float(bool(reason)), device=device)):
            logger.info("attention by FlashAttention, of sequences of any lengths")
            return Varlen(args.max_seq_len)
        logger.warning("FlashAttention isn't used: %s", reason or "another rank can't")
    logger.info("attention by scaled_dot_product_attention (%s)", reason)
    return sdpa


@torch.inference_mode()
def _difference(heads: tuple[int, int, int], device: torch.device, sdpa: Sdpa) -> str:
    """Return how ``Varlen`` differs from SDPA on a device; an empty string if it doesn't.

    Its operator is no part of PyTorch's interface, and a signature doesn't tell what works: a short
    and a long sequence are tried, in both forms.
    """
    n_heads, n_kv_heads, head_dim = heads
    shape = (2, n_kv_heads, _LONG + 2 * MAX_DRAFT, head_dim)
    varlen = Varlen(shape[2])
    plain, rows = (KVCache(shape, sdpa.dtype, device, position_major=p) for p in (False, True))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, sdpa.dtype)

    for ours, theirs in ((plain.k, rows.k), (plain.v, rows.v)):
        ours.copy_(random(*shape))
        theirs.copy_(ours.transpose(1, 2))
    both = (Segment(1, _LONG, 1), Segment(0, _SHORT, 1))
    steps = {
        "reading": [segment._replace(length=MAX_DRAFT + 1) for segment in both],
        "decoding drafts": [segment._replace(length=3) for segment in both],
        "decoding": both[:1],  # which is divided among more processors
    }
    for name, segments in steps.items():
        q = random(sum(segment.length for segment in segments), n_heads, head_dim)
        expected = ragged_attention(q, plain, sdpa.layout(segments, device))
        try:
            found = ragged_attention(q, rows, varlen.layout(segments, device))
        except (AttributeError, RuntimeError, TypeError) as problem:
            return f"it fails while {name}: {problem}"
        wrong, right = (x.float().flatten(1).norm(dim=1) for x in (found - expected, expected))
        error = float((wrong / right).max())  # of any token, as a part of what is right
        if not error < 0.05:
            return f"it is wrong by {error:.2g} while {name}"
    return ""


def check_compiler(capability: Capability) -> None:
    """Raise ``RuntimeError``, saying what is missing, unless PyTorch can compile for a device."""
    if capability.kind == "mps":
        raise RuntimeError("compile=True is for CUDA and CPUs: leave it out on MPS")
    if capability.kind == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RuntimeError(
                "compile=True on CUDA needs Triton (pip install triton) and a GPU that it supports"
            )
        return
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"compile=True on a CPU needs a C++ compiler, and there is no {compiler} in PATH: "
            "install one (Debian: apt-get install g++), name yours in CXX, or leave compile out"
        )
