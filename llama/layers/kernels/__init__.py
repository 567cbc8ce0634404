"""The kernels of linear layers: the fastest operator that PyTorch has for a weight on a device."""

import torch

from llama.layers.capability import Capability
from llama.layers.kernels import cpu, cuda, plain
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Form, Rotated, StoredWeight

__all__ = ["Kernel", "make_kernel"]


def make_kernel(
    stored: StoredWeight,
    form: Form | None,
    dtype: torch.dtype,
    block_size: int,
    capability: Capability,
) -> Kernel:
    """Return the fastest kernel for a weight on its device.

    Args:
        stored: the weight's tensors, which the kernel takes over.
        form: how it is stored; None for a plain weight: several layers' on CUDA, or one where
            ``cpu.OneDnn`` is the fastest.
        dtype: of the inputs.
        block_size: how many inputs the weight was rotated by (int8).
        capability: of the device.
    """
    on_cpu = capability.kind == "cpu"
    if form is None:
        return plain.Joined(stored) if capability.kind == "cuda" else cpu.OneDnn(stored)
    if isinstance(form, Rotated):
        if on_cpu and cpu.HAS_FBGEMM:
            return cpu.Int8(stored, block_size)
        if cuda.Int8.supports(stored["weight"], capability):
            return cuda.Int8(stored, block_size, dtype)
        return plain.Int8(stored, block_size, dtype, capability)
    has_operator = form.codes == "int4" and form.group_size >= 32 and not form.ordered
    if has_operator and on_cpu and dtype != torch.float32 and cpu.int4_tile():
        return cpu.Int4(stored, form)
    if has_operator and cuda.Int4.supports(stored["weight"], dtype, capability):
        return cuda.Int4(stored, form)
    return plain.Widened(stored, form)
