"""The abilities of a device with the installed PyTorch, by which operators are chosen."""

import functools
import os
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Capability:
    """What a device can do. Choices read this record, never a tensor's device.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        compute: CUDA's compute capability; (0, 0) elsewhere.
        varlen_dtypes: those in which PyTorch's FlashAttention takes lengths from tensors.
        compiles: whether kernels on CUDA may compile code (``compile=True``).
    """

    kind: str = "cpu"
    compute: tuple[int, int] = (0, 0)
    varlen_dtypes: tuple[torch.dtype, ...] = ()
    compiles: bool = False

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> "Capability":
        """Return the abilities of a device of this machine."""
        if device.type != "cuda" or torch.version.hip is not None:
            return Capability(device.type)
        compute = torch.cuda.get_device_capability(device)
        dtypes = (torch.float16, torch.bfloat16) if compute >= (8, 0) else ()
        return Capability("cuda", compute, dtypes)


_BF16 = "BF16|FP16|AMX|AVX10|ALL|DEFAULT"  # oneDNN's names of sets that have such instructions
_SETS = {"amx": "AMX|ALL|DEFAULT", "avx512": "512|ALL|DEFAULT", "avx512_bf16": _BF16}


def cpu_abilities() -> dict[str, object]:
    """Return what this processor can do, as far as PyTorch and oneDNN may use it.

    ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` limit them, as to find out how fast a
    processor without some instructions would be.
    """
    # Before torch 2.11 there is no public way to ask, and float32 is the safe answer.
    found = dict(getattr(torch.cpu, "get_capabilities", dict)())
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    sets = most.upper() if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"
    without = tuple(units for units, names in _SETS.items() if not re.search(names, sets))
    return {name: not name.startswith(without) and value for name, value in found.items()}


CPU = cpu_abilities()  # asked for here, since compiled code can't ask
_HAS_BF16 = any(CPU.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_has_bf16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices in hardware."""
    return _HAS_BF16


def cpu_has_amx() -> bool:
    """Return whether this processor has units for matrices of bfloat16."""
    return bool(CPU.get("amx_bf16"))


def fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which this processor multiplies matrices of a dtype fastest.

    Without instructions for it, a product of many bfloat16 rows takes eight times as long.
    """
    return dtype if dtype == torch.bfloat16 and _HAS_BF16 else torch.float32
