"""One task in several threads, each of which runs PyTorch's operators alone."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(run: Callable[[int], None], items: Sequence[int]) -> None:
    """Call a function for each item, in as many threads as PyTorch has.

    Where operators are short, threads wait less this way than if all of them share each operator;
    most of all where other processes run.
    """

    @torch.inference_mode()  # which a thread doesn't inherit
    def run_one(item: int) -> None:
        run(item)

    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) == 1:
        for item in items:
            run_one(item)
        return
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for _ in pool.map(run_one, items):
                pass
        finally:
            torch.set_num_threads(n_threads)  # MKL's is common to all threads
