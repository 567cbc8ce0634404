"""The kernels of linear layers: the fastest operator that PyTorch has for a weight on a device."""

from collections.abc import Callable

import torch

from llama.layers.kernels import cpu, cuda, plain
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Int8, Scheme, StoredWeight

__all__ = ["Kernel", "choose_kernel"]


def choose_kernel(
    scheme: Scheme | None,
    device: torch.device,
    dtype: torch.dtype,
    in_features: int,
    block_size: int,
) -> Callable[[StoredWeight], Kernel] | None:
    """Return what makes a kernel of stored weights; None where the plain weight is the fastest.

    Args:
        scheme: how the weights are quantised; None if they aren't.
        dtype: of the inputs.
        in_features: of the weight on this rank.
        block_size: how many inputs the weights were rotated by (int8).
    """
    on_cpu = device.type == "cpu"
    if scheme is None:
        return cpu.OneDnn if on_cpu and cpu.OneDnn.is_fastest_for(dtype) else None
    if isinstance(scheme, Int8):
        if on_cpu and cpu.HAS_FBGEMM:
            return lambda stored: cpu.Int8(stored, block_size)
        return lambda stored: plain.Int8(stored, block_size, dtype)
    kernel: type[cpu.Int4 | cuda.Int4 | plain.Int4] = plain.Int4
    if on_cpu and cpu.int4_tile():
        kernel = cpu.Int4
    elif cuda.Int4.supports(device, dtype, in_features):
        kernel = cuda.Int4
    return lambda stored: kernel(stored, scheme)
