"""The memory of a device: what is free, what a pass needs, and early release to the system.

A mapped weight costs memory once its pages are read. Where it is copied, to another dtype or into
a kernel's order, both would stay resident; while a checkpoint is loaded, that doubles the peak.
"""

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from llama.args import ModelArgs
from llama.checkpoint.sharding import Forms, cache_bytes, weight_bytes
from llama.layers.capability import Capability

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LIBRARIES = 768 << 20  # bytes of kernels, cuBLAS's workspaces and the decoding steps' graphs
_NCCL = 512 << 20  # bytes of its buffers
_PREFILL_TOKENS = (8192, 4096, 2048)  # on CUDA


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Release the memory of mapped tensors that were copied; they can still be read again.

    Does nothing where the system has no ``MADV_DONTNEED``, and skips tensors that aren't
    contiguous.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for tensor in tensors:
        # Only whole pages, so that neighbours in the file keep theirs.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.is_contiguous() and start < end:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
            )


def trim() -> None:
    """Return freed memory to the system, which the C library or PyTorch on CUDA would keep."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Let glibc keep the memory that passes on a CPU free, at most 128 MB, for the next ones.

    By default it returns what a layer frees to the system, which clears every page of the next
    layer's: half the time of a prefill's elementwise work.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are views of the same storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has; None where that is unknown.

    Of a GPU's, those that are free or kept for reuse by this process; elsewhere, all of them.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min([total, *memory_limits(Path("/"))])


def memory_limits(root: Path) -> list[int]:
    """Return the limits that control groups (version 1 or 2) set, as in a container.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    limits = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / "sys/fs/cgroup" / controllers
                inner = base / group.strip("/")
                for directory in (inner, *inner.parents):
                    if not directory.is_relative_to(base):
                        break
                    for name in ("memory.max", "memory.limit_in_bytes"):
                        with contextlib.suppress(OSError, ValueError):  # "max" is no number
                            limits.append(int((directory / name).read_text()))
    return limits


def workspace_bytes(args: ModelArgs, dtype: torch.dtype, ranks: int, prefill_tokens: int) -> int:
    """Return about how many bytes a pass on CUDA needs beside weights and cache.

    Args:
        args: the hyper-parameters.
        dtype: of the computation.
        ranks: the number of ranks that share the network.
        prefill_tokens: those of the largest pass.
    """
    q_dim = args.n_heads * args.head_dim // ranks
    kv_dim = max(args.kv_heads, ranks) // ranks * args.head_dim
    hidden_dim = args.hidden_dim // ranks
    # Queries and keys are rotated in float32: themselves, and the product.
    attention = (2 * q_dim + 2 * kv_dim) * dtype.itemsize
    attention += (q_dim + kv_dim) * (dtype.itemsize + 2 * 4)
    feed_forward = 3 * hidden_dim * dtype.itemsize  # gate and up, and the product
    states = 3 * args.dim * dtype.itemsize  # the residual, its norm and what is added
    tokens = prefill_tokens * (states + max(attention, feed_forward))
    # Logits in float32, their probabilities and order.
    logits = args.max_batch_size * args.n_outputs * (dtype.itemsize + 6 * 4)
    rotary = 4 * args.max_seq_len * args.head_dim
    return tokens + logits + rotary + _LIBRARIES + _NCCL * (ranks > 1)


def prefill_tokens(
    args: ModelArgs,
    dtype: torch.dtype,
    ranks: int,
    capability: Capability,
    available: int | None,
    taken: int = 0,
) -> int:
    """Return how many tokens of prompts a pass takes at most.

    On CUDA the most whose states take a twentieth of the memory, and fit beside the rest.

    Args:
        args, dtype, ranks: see ``workspace_bytes``.
        capability: of the device.
        available: the bytes of its memory; None if unknown.
        taken: those of weights and cache.
    """
    if capability.kind != "cuda" or available is None:
        return 512
    limit = min(available // 20 + _LIBRARIES, available - taken)
    fitting = (n for n in _PREFILL_TOKENS if workspace_bytes(args, dtype, ranks, n) <= limit)
    return next(fitting, _PREFILL_TOKENS[-1])


@dataclass(frozen=True)
class Network:
    """A network as it is computed.

    Args:
        args: the hyper-parameters, with the size of the cache.
        dtype: of weights and cache.
        forms: the forms of quantised weights by module.
        int8_cache: whether the cache has eight bits.
    """

    args: ModelArgs
    dtype: torch.dtype = torch.bfloat16
    forms: Forms = field(default_factory=dict)
    int8_cache: bool = False


class Needs(NamedTuple):
    """The bytes that a rank needs, and how many tokens of prompts a pass takes at most."""

    weights: int
    cache: int
    workspace: int
    prefill_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def memory_needs(
    network: Network, ranks: int, capability: Capability, available: int | None
) -> Needs:
    """Return the memory that each of some ranks needs on its device.

    Args:
        network: what they share.
        ranks: their number.
        capability: of the devices.
        available: the bytes of a device's memory; None if unknown.
    """
    args, dtype = network.args, network.dtype
    weights = weight_bytes(args, dtype, ranks, network.forms)
    cache = cache_bytes(args, dtype, ranks, network.int8_cache)
    tokens = prefill_tokens(args, dtype, ranks, capability, available, weights + cache)
    if capability.kind != "cuda":
        return Needs(weights, cache, 0, tokens)
    workspace = workspace_bytes(args, dtype, ranks, tokens)
    if dtype not in capability.varlen_dtypes or network.int8_cache:
        # Recorded steps gather a layer's cache, and widen it.
        workspace += 2 * cache_bytes(args, dtype, ranks) // args.n_layers
    return Needs(weights, cache, workspace, tokens)
