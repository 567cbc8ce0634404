"""Memory in pages of 2 MB, which PyTorch asks for if it is told before it allocates anything.

A token's weights are read at the speed of memory, and the addresses of small pages take time to
translate: a token of 1.1 billion bfloat16 weights takes a fifth longer with pages of 4 kB.
"""

import contextlib
import os
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for() -> None:
    """Have PyTorch ask for them, where Linux gives them to those that ask.

    ``THP_MEM_ALLOC_ENABLE=0`` in the environment keeps small ones.
    """
    with contextlib.suppress(OSError):
        if "[madvise]" in _SETTING.read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


ask_for()
