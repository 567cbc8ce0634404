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
import os
import sys
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llama.layers.batch import RaggedBatch
from llama.layers.capability import Capability, cpu_has_bf16, fast_dtype
from llama.layers.kernels import plain
from llama.layers.kv_cache import KVCache
from llama.layers.quantization import Grouped, StoredWeight

# Up to which compiled code is faster than widening the weight, in groups or plain.
FEW_TOKENS, FEW_OF_PLAIN = 32, 16
FEW_OF_TILES = 4  # rows of int8 inputs up to which it is faster than oneDNN
WIDE = 512  # elements of a token from which code for them is worth compiling
TILED = 1 << 18  # elements of the smallest weight that is worth a second of compiling
_PROCESS = os.getpid()
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
def _tiles_code() -> Any:
    return importlib.import_module("llama.layers.kernels.numba_tiles")


@functools.cache
def _tokens_code() -> Any:
    return importlib.import_module("llama.layers.kernels.numba_tokens")


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
        code.round_inputs()  # compiled before the first prompt, as what follows
        code.widen(fast_dtype(torch.bfloat16))
        _compile_tokens_code()

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
        rounded = x.new_empty(ends.pop(), dtype=torch.uint8)
        places = [rounded.data_ptr() + end for end in ends]
        kind = (n_tokens, n_blocks, self._n_sums // n_blocks, self._is_int4)
        numba_code().round_inputs().ctypes(_int64(wide.data_ptr(), *places, *kind))
        out = wide.new_empty(n_tokens, self.out_features)
        sizes = [self.out_features, n_blocks, self._n_groups, n_tokens]
        _in_parallel(self._product, *self._places(), *places, out.data_ptr(), *sizes)
        return out.to(x.dtype)

    def _products(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.linear(x, self.widened(rows, x.dtype))

    def widened(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weight in float32 or bfloat16."""
        first, last, _ = rows.indices(self.out_features)
        out = torch.empty(last - first, self._n_inputs, dtype=dtype, device="cpu")
        sizes = [len(out), self._n_groups, self._n_inputs // self._n_groups]
        flags = self._is_int4, self._form.has_zeros
        code = numba_code().widen(dtype)
        _in_parallel(code, *self._places(first), out.data_ptr(), *sizes, *flags)
        return out

    def _places(self, row: int = 0) -> list[int]:
        """Return the addresses of a row's codes, scales and zeros."""
        names = self._form.scale_names
        parts = [self._stored[name] for name in ("weight", names[0], names[-1])]
        return [part.data_ptr() + row * part.shape[1] * part.itemsize for part in parts]


def _is_read(*tensors: torch.Tensor) -> bool:
    """Return whether compiled code reads tensors.

    They are bfloat16 on a CPU, have rows without gaps in them, and aren't trained.
    """
    is_half = all(x.dtype == torch.bfloat16 and x.is_cpu and x.stride(-1) == 1 for x in tensors)
    is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return is_half and not is_trained and numba_code() is not None


def has_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether rows, (n_rows, dim), are normalised by compiled code."""
    is_wide = x.dim() == 2 and x.shape[1:] == weight.shape and len(weight) >= WIDE
    return is_wide and x.is_contiguous() and _is_read(x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return normalised rows: an operator of PyTorch takes longer to call than to compute."""
    out, added = torch.empty_like(x), ctypes.c_float(eps)
    places = x.data_ptr(), weight.data_ptr(), ctypes.addressof(added), out.data_ptr()
    _by_rows(_tokens_code().rms_norm(), len(x), *places, *x.shape)
    return out


def has_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Return whether compiled code reads two parts of rows, each (n_rows, dim)."""
    is_wide = gate.dim() == 2 and gate.shape[1] >= WIDE
    are_alike = gate.shape == up.shape and gate.stride() == up.stride()
    return is_wide and are_alike and _is_read(gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of rows, (n_rows, dim), which lie equally far from each other."""
    out = gate.new_empty(gate.shape)
    places = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    _by_rows(_tokens_code().swiglu(), len(gate), *places, *gate.shape, gate.stride(0))
    return out


def has_rotation(
    xqkv: torch.Tensor, freqs_cis: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch
) -> bool:
    """Return whether compiled code reads what ``rotate`` is given, and writes to a cache."""
    if torch.compiler.is_compiling() or not kv_cache.k.is_cpu or kv_cache.position_major:
        return False
    if xqkv.shape[1:].numel() < WIDE:
        return False
    others = (
        (freqs_cis, torch.float32),
        (batch.slots, torch.int64),
        (batch.positions, torch.int64),
    )
    fit = all(part.dtype == dtype and part.is_contiguous() for part, dtype in others)
    return fit and xqkv.is_contiguous() and _is_read(xqkv, kv_cache.k)


def rotate(
    xqkv: torch.Tensor, freqs_cis: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to the cache, in one call.

    Args:
        xqkv: side by side, shape (n_tokens, n_heads + 2 * n_kv_heads, head_dim).
        freqs_cis: float32, shape (n_tokens, head_dim / 2, 2).
        kv_cache: of the layer.
        batch: where the tokens go; those beyond it are padding.

    Returns:
        The queries, shape (n_tokens, n_heads, head_dim); of padding, any.
    """
    keys, values = kv_cache.k, kv_cache.v
    (n_tokens, n_all, head_dim), n_kv_heads = xqkv.shape, keys.shape[1]
    xq = xqkv.new_empty(n_tokens, n_all - 2 * n_kv_heads, head_dim)
    some = (xqkv, freqs_cis, batch.slots, batch.positions, xq, keys, values)
    sizes = (len(batch.slots), xq.shape[1], n_kv_heads, head_dim, len(keys), keys.shape[2])
    places = [part.data_ptr() for part in some]
    _by_rows(_tokens_code().rotate(), sizes[0], *places, *sizes)
    return xq


class Tiles:
    """A weight in oneDNN's order, which compiled code reads for few tokens.

    It is read at the speed of memory; oneDNN, which doesn't prefetch, reaches 0.85 of that. The
    order isn't documented, but found in the packed weight: tiles of 32 or 64 outputs, in which the
    inputs of 32 bits lie together.
    """

    def __init__(self, packed: torch.Tensor, weight: torch.Tensor, width: int):
        self._packed, self._shape = packed, weight.shape  # the former owns the memory
        self._address = torch.ops.mkldnn.data_ptr(packed)
        self._width, self._is_int8 = width, weight.dtype == torch.int8
        self._code = _tiles_code()
        # Compiled before the first prompt.
        self._code.product(self._code.Kind(width, self._is_int8, True))
        if self._is_int8:
            self._code.round_tokens()
        _compile_tokens_code()

    @staticmethod
    def find(packed: torch.Tensor, weight: torch.Tensor) -> "Tiles | None":
        """Return the tiles of a packed weight; None where it is small or its order another."""
        (n_outputs, n_inputs), size = weight.shape, 4 // weight.itemsize
        fits = weight.numel() >= TILED and n_inputs % 64 == 0 and HAS_VNNI
        if not (fits and hasattr(torch.ops.mkldnn, "data_ptr") and numba_code()):
            return None
        some = torch.arange(0, n_outputs, 61)  # each place in a tile, if they are many
        address, n_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
        memory, fitting = (ctypes.c_char * n_bytes).from_address(address), []
        for width in (64, 32):
            n_tiles = -(-n_outputs // width)
            count = n_tiles * width * n_inputs
            if count * weight.itemsize <= n_bytes:
                tiles = torch.frombuffer(memory, dtype=weight.dtype, count=count)
                tiles = tiles.view(n_tiles, n_inputs // size, width, size)
                found = tiles[some // width, :, some % width].flatten(1)
                if torch.equal(found, weight[some]):
                    fitting.append(width)
        # A weight whose outputs are all alike doesn't tell.
        return Tiles(packed, weight, fitting[0]) if len(fitting) == 1 else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of inputs with a weight, both in bfloat16."""
        return self._multiply(x.contiguous(), len(x), x.dtype)

    def int8_product(
        self,
        x: torch.Tensor,
        size: int,
        scale: torch.Tensor,
        added: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the product of inputs, rounded to ``cpu.LEVELS``, with a weight of eight bits.

        Args:
            x: float32.
            size: how many inputs are rotated together; if they aren't, they have two digits.
            scale: of each output, float32, padded to whole tiles, as the next.
            added: to the sum of each output, int32, as digits are above their values.
            dtype: of the product.
        """
        x, (n_tokens, n_inputs) = x.contiguous(), x.shape
        n_digits = 2 if size == 1 else 1
        rotated = x if size == 1 else torch.empty_like(x)
        codes = x.new_empty(n_digits * n_tokens, n_inputs, dtype=torch.uint8)
        scales = x.new_empty(n_digits * n_tokens)
        places = [part.data_ptr() for part in (x, rotated, codes, scales)]
        self._code.round_tokens().ctypes(_int64(*places, n_tokens, n_inputs, n_digits, size))
        others = [part.data_ptr() for part in (scales, scale, added)]
        out = self._multiply(codes, len(codes), dtype if n_digits == 1 else torch.float32, *others)
        return out if n_digits == 1 else (out[:n_tokens] + out[n_tokens:]).to(dtype)

    def _multiply(
        self, x: torch.Tensor, n_tokens: int, dtype: torch.dtype, *others: int
    ) -> torch.Tensor:
        n_outputs, n_inputs = self._shape
        n_tiles = -(-n_outputs // self._width)
        sums = x.new_empty(n_tokens, n_tiles * self._width, dtype=torch.float32)
        is_half = dtype == torch.bfloat16
        out = torch.empty_like(sums, dtype=dtype) if is_half else sums
        kind = self._code.Kind(self._width, self._is_int8, is_half)
        places = [self._address, x.data_ptr(), sums.data_ptr(), out.data_ptr()]
        product = self._code.product(kind)
        _in_parallel(product, *places, n_tiles, n_inputs, n_tokens, *others)
        if out.shape[1] > n_outputs:
            out = out[:, :n_outputs].contiguous()
        return out if is_half else out.to(dtype)


class Bfloat16(plain.Joined):
    """A plain weight in bfloat16, for processors without instructions for it.

    Few tokens read it as it is, where PyTorch's operators widen it first. Sums are in float32.
    """

    opaque = True

    def __init__(self, stored: StoredWeight):
        super().__init__(stored)
        numba_code().bfloat16_product()  # compiled before the first prompt
        _compile_tokens_code()

    @staticmethod
    def is_fastest_for(weight: torch.Tensor) -> bool:
        """Return whether a weight is multiplied fastest by compiled code."""
        fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        return fits and not cpu_has_bf16() and numba_code() is not None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._stored["weight"]
        if len(x) > FEW_OF_PLAIN:
            return plain.linear(x, weight)
        wide = x.float().contiguous()
        out = wide.new_empty(len(x), self.out_features)
        places = [part.data_ptr() for part in (weight, wide, out)]
        _in_parallel(numba_code().bfloat16_product().address, *places, *weight.shape, len(x))
        return out.to(x.dtype)


def _compile_tokens_code() -> None:
    code = _tokens_code()
    for function in (code.rms_norm, code.swiglu, code.rotate):
        function()


def _int64(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _by_rows(function: Any, n_rows: int, *values: int) -> None:
    """Call a function of rows in PyTorch's threads; of a few, in this one."""
    if n_rows <= 4:
        function.ctypes(_int64(*values))
    else:
        _in_parallel(function.address, *values)


def _in_parallel(address: int, *values: int) -> None:
    """Call a function with a pointer to some values in each of PyTorch's threads."""
    data, n_threads = _int64(*values), ctypes.c_uint(torch.get_num_threads())
    openmp().GOMP_parallel(ctypes.c_void_p(address), data, n_threads, ctypes.c_uint(0))
