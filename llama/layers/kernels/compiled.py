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
import sys
from math import gcd
from pathlib import Path
from types import ModuleType

import torch

from llama.layers.capability import Capability
from llama.layers.kernels.plain import Widened
from llama.layers.quantization import Grouped, StoredWeight

FEW_TOKENS = 32  # up to which the compiled kernel is faster than widening the weight
BLOCK = 32  # inputs that share a scale


@functools.cache
def numba_code() -> ModuleType | None:
    """Return the module of compiled code; None where numba or an instruction is missing."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or openmp() is None:
        return None
    try:
        return importlib.import_module("llama.layers.kernels.numba_code")
    except ImportError:  # an optional package
        return None


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """Return PyTorch's own OpenMP, whose threads compute; None where it has another."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return ctypes.CDLL(str(library)) if sys.platform == "linux" and library.exists() else None


class Compiled(Widened):
    """Weights as they are stored, by which few tokens are multiplied in compiled code."""

    opaque = True

    def __init__(self, stored: StoredWeight, form: Grouped, capability: Capability):
        super().__init__(
            {name: part.contiguous() for name, part in stored.items()}, form, capability
        )
        self._is_int4 = form.codes == "int4"
        self._n_inputs = stored["weight"].shape[1] * (2 if self._is_int4 else 1)
        self._n_groups = stored[form.scale_names[0]].shape[1]
        group_size = self._n_inputs // self._n_groups
        # Blocks of a group: a power of two, or all.
        self._shift = (group_size // BLOCK - 1).bit_length() if group_size >= BLOCK else 0
        code = numba_code()
        assert code is not None  # as ``supports`` says
        self._code = code
        zero_lanes = gcd(self._n_groups, 8) if form.has_zeros else 0
        self._address = code.compiled(self._is_int4, group_size < BLOCK, zero_lanes)

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
        n_tokens, n_blocks = len(x), self._n_inputs // BLOCK
        codes = torch.empty(n_tokens, self._n_inputs, dtype=torch.int8)
        scales, sums = torch.empty(n_tokens, n_blocks), torch.empty(n_tokens, self._n_groups)
        offsets = torch.empty(n_tokens, n_blocks * 8, dtype=torch.int32)
        rounded = (codes, scales, offsets, sums)
        self._code.round_inputs(
            x.float().contiguous().numpy(), *(part.numpy() for part in rounded), self._is_int4
        )
        out = torch.empty(n_tokens, self.out_features)
        weight, *affine = (self._stored[name] for name in ("weight", *self._form.scale_names))
        tensors = (weight, affine[0], affine[-1], *rounded, out)
        sizes = (self.out_features, n_tokens, n_blocks, self._shift, self._n_groups)
        data = (ctypes.c_int64 * 13)(*(part.data_ptr() for part in tensors), *sizes)
        team = openmp()
        assert team is not None  # as ``supports`` says
        n_threads = ctypes.c_uint(torch.get_num_threads())
        team.GOMP_parallel(ctypes.c_void_p(self._address), data, n_threads, 0)
        return out.to(x.dtype)
