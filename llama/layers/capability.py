"""The abilities of a device with the installed PyTorch, by which operators are chosen."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Capability:
    """What a device can do. Choices read this record, never a tensor's device.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        compute: CUDA's compute capability; (0, 0) elsewhere.
        varlen_dtypes: those in which PyTorch's FlashAttention takes lengths from tensors.
    """

    kind: str = "cpu"
    compute: tuple[int, int] = (0, 0)
    varlen_dtypes: tuple[torch.dtype, ...] = ()

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> "Capability":
        """Return the abilities of a device of this machine."""
        if device.type != "cuda" or torch.version.hip is not None:
            return Capability(device.type)
        compute = torch.cuda.get_device_capability(device)
        dtypes = (torch.float16, torch.bfloat16) if compute >= (8, 0) else ()
        return Capability("cuda", compute, dtypes)
