"""A kernel for x86 processors that numba compiles (``llama[fast]``): codes as they are stored.

Few tokens are multiplied in integers: inputs are rounded to eight bits in blocks of 32, each with a
scale of its own, as llama.cpp does. Groups of 16 take no longer than groups of 32, and nothing is
brought into another order.

On an AMD EPYC with AVX2 alone a token is multiplied by four bits at 2.2 times the speed of
PyTorch's int4 operator in groups of 32, and 4.4 times in groups of 16; by eight bits at 3.9 times
(``benchmarks/kernels.py``).
"""

import ctypes
import functools
import importlib
import itertools
import sys
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llama.layers.capability import Capability, cpu_has_bf16, fast_dtype
from llama.layers.kernels import plain
from llama.layers.quantization import Grouped, StoredWeight

# Up to which compiled code is faster than widening the weight, in groups or plain.
FEW_TOKENS, FEW_OF_PLAIN = 32, 16
BLOCK = 32  # inputs that share a scale
_CAPABILITIES: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
# Instructions that add four products of eight bits.
HAS_VNNI = all(_CAPABILITIES.get(name) for name in ("avx512_vnni", "avx512_vl"))


@functools.cache
def numba_code() -> Any:
    """Return the module of compiled code; None where numba, AVX2 or the team is missing."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or not openmp():
        return None
    try:
        return importlib.import_module("llama.layers.kernels.numba_code")
    except ImportError:  # an optional package
        return None


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


class Compiled(plain.Widened):
    """Weights as they are stored, by which few tokens are multiplied in compiled code."""

    opaque = True

    def __init__(self, stored: StoredWeight, form: Grouped, capability: Capability):
        stored = {name: part.contiguous() for name, part in stored.items()}
        super().__init__(stored, form, capability)
        self._is_int4 = form.codes == "int4"
        self._n_inputs = stored["weight"].shape[1] * (2 if self._is_int4 else 1)
        self._n_groups = stored[form.scale_names[0]].shape[1]
        n_blocks, group_size = self._n_inputs // BLOCK, self._n_inputs // self._n_groups
        in_halves = group_size < BLOCK
        # Blocks of a group are a power of two, or all.
        shift = 0 if in_halves else (group_size // BLOCK - 1).bit_length()
        self._n_sums = n_blocks * (2 if in_halves else 1)
        code = numba_code()
        kind = code.Kind(self._is_int4, in_halves, shift, form.has_zeros, gcd(n_blocks, 8))
        self._product = code.product(kind)
        code.widen(fast_dtype(torch.bfloat16))  # compiled before the first prompt

    @staticmethod
    def supports(form: Grouped, weight: torch.Tensor) -> bool:
        """Return whether code for weights of a form can be compiled here."""
        if form.codes == "float8" or form.scale_dtype != torch.bfloat16:
            return False
        n_inputs = weight.shape[1] * (2 if form.codes == "int4" else 1)
        size = form.group_size
        fits = size == 0 or (size >= 16 and size & (size - 1) == 0)
        return fits and n_inputs % BLOCK == 0 and numba_code() is not None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > FEW_TOKENS:
            return super().product(x)
        wide, n_tokens, n_blocks = x.float().contiguous(), len(x), self._n_inputs // BLOCK
        sizes = [self._n_inputs, 4 * n_blocks, 4 * self._n_sums, 4 * self._n_sums]
        ends = [n_tokens * end for end in (0, *itertools.accumulate(sizes))]
        rounded = torch.empty(ends.pop(), dtype=torch.uint8)
        places = [rounded.data_ptr() + end for end in ends]
        kind = (n_tokens, n_blocks, self._n_sums // n_blocks, self._is_int4)
        numba_code().round_inputs.ctypes(_int64(wide.data_ptr(), *places, *kind))
        out = torch.empty(n_tokens, self.out_features)
        sizes = [self.out_features, n_blocks, self._n_groups, n_tokens]
        _in_parallel(self._product, *self._places(), *places, out.data_ptr(), *sizes)
        return out.to(x.dtype)

    def _products(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.linear(x, self.widened(rows, x.dtype))

    def widened(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weight in float32 or bfloat16."""
        first, last, _ = rows.indices(self.out_features)
        out = torch.empty(last - first, self._n_inputs, dtype=dtype)
        sizes = [len(out), self._n_groups, self._n_inputs // self._n_groups]
        flags = self._is_int4, self._form.has_zeros
        _in_parallel(
            numba_code().widen(dtype), *self._places(first), out.data_ptr(), *sizes, *flags
        )
        return out

    def _places(self, row: int = 0) -> list[int]:
        """Return the addresses of a row's codes, scales and zeros."""
        names = self._form.scale_names
        parts = [self._stored[name] for name in ("weight", names[0], names[-1])]
        return [part.data_ptr() + row * part.shape[1] * part.itemsize for part in parts]


class Bfloat16(plain.Joined):
    """A plain weight in bfloat16, for processors without instructions for it.

    Few tokens read it as it is, where PyTorch's operators widen it first. Sums are in float32.
    """

    opaque = True

    @staticmethod
    def is_fastest_for(weight: torch.Tensor) -> bool:
        """Return whether a weight is multiplied fastest by compiled code."""
        fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        return fits and not cpu_has_bf16() and numba_code() is not None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._stored["weight"]
        if len(x) > FEW_OF_PLAIN:
            return plain.linear(x, weight)
        wide, out = x.float().contiguous(), torch.empty(len(x), self.out_features)
        places = [part.data_ptr() for part in (weight, wide, out)]
        _in_parallel(numba_code().bfloat16_product.address, *places, *weight.shape, len(x))
        return out.to(x.dtype)


def _int64(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _in_parallel(address: int, *values: int) -> None:
    """Call a function with a pointer to some values in each of PyTorch's threads."""
    data, n_threads = _int64(*values), ctypes.c_uint(torch.get_num_threads())
    openmp().GOMP_parallel(ctypes.c_void_p(address), data, n_threads, ctypes.c_uint(0))
