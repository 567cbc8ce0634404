"""The memory of a device, and its early release to the system.

A mapped weight costs memory once its pages are read. Where it is copied, to another dtype or into
a kernel's order, both would stay resident; while a checkpoint is loaded, that doubles the peak.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

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


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has in all; None where that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
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
