"""The fastest operators for a weight on a device, and for what lies between products."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from llama.layers.capability import Capability
from llama.layers.kernels import compiled, cpu, cuda, plain
from llama.layers.kernels.base import Kernel
from llama.layers.kernels.compiled import (
    attend,
    attend_prompt,
    compile_prompts,
    has_attention,
    has_prompt_attention,
    has_rotation,
    rotate,
)
from llama.layers.kernels.digits import Digits, Ordered
from llama.layers.kernels.groups import Groups
from llama.layers.kernels.tiles import Bfloat16, Tiles
from llama.layers.quantization import Form, Grouped, StoredWeight

__all__ = [
    "Kernel",
    "attend",
    "attend_prompt",
    "compile_prompts",
    "has_attention",
    "has_prompt_attention",
    "has_rotation",
    "make_kernel",
    "plain",
    "plain_kernel",
    "rms_norm",
    "rotate",
    "swiglu",
]


def plain_kernel(
    weight: torch.Tensor, n_layers: int, is_shared: bool, capability: Capability
) -> type[Kernel] | None:
    """Return the kernel that multiplies by unquantised weights faster than PyTorch's product.

    Args:
        weight: one of the layers'.
        n_layers: how many read the same inputs.
        is_shared: whether the weight is another module's too. It is then packed only by a kernel
            that reads single rows, which the other module uses as well.
    """
    if capability.kind == "cuda":
        return plain.Joined if n_layers > 1 and not is_shared else None
    if Bfloat16.is_fastest_for(weight):
        return Bfloat16
    is_packed = cpu.OneDnn.is_fastest_for(weight) and (not is_shared or Tiles.are_worth(weight))
    return cpu.OneDnn if is_packed else None


def form_in(form: Form, dtype: torch.dtype, device: torch.device) -> Form:
    """Return the form that a weight has in a network of a dtype, on a device."""
    is_half = device.type == "cpu" and dtype != torch.float32
    return (is_half and Groups.with_float16(form)) or form.in_dtype(dtype)


def make_kernel(
    stored: StoredWeight,
    form: Form,
    dtype: torch.dtype,
    block_size: int,
    capability: Capability,
    owned: bool = False,
) -> Kernel:
    """Return the fastest kernel for a quantised weight on its device.

    Args:
        stored: the weight's tensors, which the kernel may keep.
        form: how it is stored.
        dtype: of the inputs.
        block_size: how many inputs the weight was rotated by (int8).
        capability: of the device.
        owned: whether nobody else reads the tensors, which the kernel may then change.
    """
    on_cpu = capability.kind == "cpu"
    weight = stored["weight"]
    if isinstance(form, Grouped):
        return _grouped(stored, form, dtype, capability, owned)
    if on_cpu and (kind := cpu.int8_kernel(weight)):
        return kind(stored, form, block_size, owned)
    if cuda.Int8.supports(weight, capability):
        return cuda.Int8(stored, block_size, dtype)
    return plain.Int8(stored, block_size, dtype, capability)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return rows divided by their root mean squares, times a weight.

    Args:
        x: shape (n_tokens, dim).
        weight: shape (dim,).
        eps: what is added to mean squares.
    """
    if x.is_cpu and not torch.compiler.is_compiling() and compiled.has_rms_norm(x, weight):
        return compiled.rms_norm(x, weight, eps)
    return plain.rms_norm(x, weight, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``, each (n_tokens, hidden_dim); ``gate`` may be overwritten."""
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and compiled.has_swiglu(gate, up):
        return compiled.swiglu(gate, up)
    hidden = F.silu(gate, inplace=True) * up
    # As a view, so that compiled code doesn't compute it for each output of the next layer.
    return hidden.as_strided(hidden.shape, hidden.stride()) if is_compiling else hidden


def _grouped(
    stored: StoredWeight, form: Grouped, dtype: torch.dtype, capability: Capability, owned: bool
) -> Kernel:
    if form.ordered:
        others = {name: part for name, part in stored.items() if name != "order"}
        kernel = _grouped(others, replace(form, ordered=False), dtype, capability, owned)
        return Ordered(kernel, stored["order"])
    on_cpu = capability.kind == "cpu"
    half = dtype != torch.float32  # else products are exact
    are_rows = half and on_cpu and form.codes == "int8" and not form.group_size
    if are_rows and (kind := cpu.int8_kernel(stored["weight"])):
        return kind(stored, form, 1, owned)
    if half and on_cpu and Groups.supports(form, stored["weight"]):
        return Groups(stored, form, owned=owned)
    fused = None
    if half and capability.compiles and form.codes != "int4":
        fused = cuda.Fused(stored, form, dtype, capability)
    if cuda.Float8.supports(form, stored["weight"], dtype, capability):
        return cuda.Float8(stored, fused or plain.Widened(stored, form, capability))
    if fused:
        return fused
    if half and Digits.supports(form, stored["weight"]):
        if on_cpu and cpu.int4_tile():
            return cpu.Int4(stored, form)
        if cuda.Int4.supports(stored["weight"], dtype, capability):
            return cuda.Int4(stored, form, capability)
    return plain.Widened(stored, form, capability)
