"""Mapped memory, given back."""

import ctypes
import mmap
import os
from collections.abc import Iterable

import torch


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Let go of the memory of mapped tensors that were copied; they can still be read again."""
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
    """Give freed memory back to the system where the C library, as glibc, would keep it."""
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
