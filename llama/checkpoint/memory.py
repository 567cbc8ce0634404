"""Memory of mapped files and of the C library, returned to the system early.

A mapped weight costs memory once its pages are read. Where it is copied, to another dtype or into
a kernel's order, both would stay resident; while a checkpoint is loaded, that doubles the peak.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable

import torch


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
    """Return freed memory to the system where the C library, such as glibc, would keep it."""
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are views of the same storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
