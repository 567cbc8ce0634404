"""Collectives under NCCL's rules, where there is no NCCL.

gloo takes strided tensors and tensors on any device, and a functional collective's result may be
ready before anybody waits for it. NCCL takes contiguous tensors on the rank's own GPU, works in the
background, and hangs or mixes data up unless all ranks make the same calls in the same order.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class BrokenRule(RuntimeError):
    """A collective that NCCL would refuse, or get wrong."""


class StrictGroup(TorchDispatchMode):
    """Raises ``BrokenRule`` within ``with StrictGroup(device):`` where NCCL would fail.

    Over gloo, ranks also compare each call before they make it, and where the block ends.

    Attributes:
        calls: the collectives so far, with their tensors' dtypes and shapes.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.calls: list[str] = []
        self._pending: set[int] = set()  # storages that nobody has waited for

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        # A weight in oneDNN's order has no storage, and is no collective's result.
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]
        if func is torch.ops._c10d_functional.wait_tensor.default:
            self._pending.discard(_storage(tensors[0]))
        elif any(_storage(tensor) in self._pending for tensor in tensors):
            raise BrokenRule(f"{func} uses a collective's result that nobody waited for")
        if func.namespace not in ("c10d", "_c10d_functional") or "wait_tensor" in str(func):
            return func(*args, **kwargs)
        self._check(func, args, tensors)
        result = func(*args, **kwargs)
        if func.namespace == "_c10d_functional":  # c10d's are waited for by torch.distributed
            self._pending.add(_storage(result))
        return result

    def _check(self, func: Callable[..., Any], args: Any, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if not tensor.is_contiguous():
                shape, strides = tuple(tensor.shape), tensor.stride()
                raise BrokenRule(f"{func}: shape {shape} with strides {strides} isn't contiguous")
            if tensor.device != self.device:
                raise BrokenRule(f"{func}: a tensor on {tensor.device}, not {self.device}")
        options = [leaf for leaf in tree_leaves(args) if isinstance(leaf, int | str)]
        shapes = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]
        self._agree(f"{func} {shapes} {options}")

    def _agree(self, call: str) -> None:
        """Compare a call with the other ranks'."""
        self.calls.append(call)
        if dist.get_backend() != "gloo" or dist.get_world_size() == 1:
            return
        sums = torch.empty(dist.get_world_size(), dtype=torch.int64)
        dist.all_gather_into_tensor(sums, torch.tensor([zlib.crc32(call.encode())]))
        if len(sums.unique()) > 1:
            calls = [""] * len(sums)
            dist.all_gather_object(calls, call)
            raise BrokenRule(f"ranks make different calls: {calls}")

    def __exit__(self, error: Any, *more: Any) -> None:
        super().__exit__(error, *more)
        if error is None:
            if self._pending:
                raise BrokenRule("nobody waited for the result of a collective")
            self._agree("the end")
            self.calls.pop()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
