"""PyTorch's own team of OpenMP's threads, in which compiled code is called and recorded."""

import ctypes
import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

_PROCESS = os.getpid()


class _Recording(threading.local):
    calls: list[tuple[Any, Any]] | None = None  # of this thread: functions and their data


recording = _Recording()


@functools.cache
def openmp() -> Any:
    """Return PyTorch's own OpenMP, whose team of threads computes; None where it has another."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return ctypes.CDLL(str(library)) if sys.platform == "linux" and library.exists() else None


def limit_threads() -> None:
    """Use no more threads than OpenMP gives, which ``OMP_THREAD_LIMIT`` may limit.

    With more, PyTorch's products in bfloat16 are wrong on a processor with AMX.
    """
    library = openmp()
    if library is not None and library.omp_get_thread_limit() < torch.get_num_threads():
        torch.set_num_threads(library.omp_get_thread_limit())


def release_team() -> None:
    """End the threads with which this one has computed; it starts others when it needs them.

    OpenMP gives each thread that computes a team of its own. With two of them a team's threads no
    longer wait for work but sleep, as if there were too few processors: a token of 1.1 billion
    weights took a fifth longer where one thread had loaded the model and another computed.
    """
    library = openmp()
    # In a forked process the team's threads don't exist, and would be waited for.
    if os.getpid() == _PROCESS and hasattr(library, "omp_pause_resource_all"):
        library.omp_pause_resource_all(1)  # omp_pause_soft: settings stay


def by_rows(function: Any, n_rows: int, *values: int) -> None:
    """Call a function of rows in PyTorch's threads; of a few, in this one."""
    if n_rows > 4:
        in_parallel(function.address, *values)
    else:
        function.call(_data(function.address, values))


def in_parallel(address: int, *values: int) -> None:
    """Call a function with a pointer to some values in each of PyTorch's threads."""
    call_in_parallel(address, _data(address, values))


def call_in_parallel(address: int, data: Any) -> None:
    """Call a function with a pointer to data in each of PyTorch's threads."""
    n_threads = ctypes.c_uint(torch.get_num_threads())
    openmp().GOMP_parallel(ctypes.c_void_p(address), data, n_threads, ctypes.c_uint(0))


def _data(address: int, values: tuple[int, ...]) -> Any:
    data = (ctypes.c_int64 * len(values))(*values)
    if recording.calls is not None:
        recording.calls.append((address, data))
    return data
