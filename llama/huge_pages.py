"""Memory of a CPU: in pages of 2 MB, and none before it is written.

A token's weights are read at the speed of memory, and the addresses of small pages take time to
translate: a token of 1.1 billion bfloat16 weights takes a fifth longer with pages of 4 kB.
PyTorch asks for large ones if it is told before it allocates anything.
"""

import contextlib
import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for() -> None:
    """Have PyTorch ask for them, where Linux gives them to those that ask.

    ``THP_MEM_ALLOC_ENABLE=0`` in the environment keeps small ones.
    """
    with contextlib.suppress(OSError):
        if "[madvise]" in _SETTING.read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros, to which a CPU gives memory as they are written, in small pages.

    ``torch.zeros`` writes them all: a cache of 2 GB, of which a prompt needs little, for a second.
    """
    n_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not n_bytes or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


ask_for()
