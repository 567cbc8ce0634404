"""Code that numba compiles for x86 processors (``llama[fast]``): few tokens, and small operators.

Few tokens are multiplied by plain weights and by those in oneDNN's order; ``groups.py`` has those
in groups.
"""

import ctypes
import struct

import torch

from llama.layers.batch import RaggedBatch
from llama.layers.capability import CPU, cpu_has_bf16
from llama.layers.kernels import plain
from llama.layers.kernels.machine_code import code, has_numba
from llama.layers.kernels.openmp import by_rows, in_parallel
from llama.layers.kv_cache import KVCache
from llama.layers.quantization import StoredWeight

FEW_TOKENS = 32  # whose attention is compiled
FEW_OF_PLAIN = 16  # up to which compiled code is faster than widening a plain weight
# Rows of inputs in eight bits, and in bfloat16, up to which it is faster than oneDNN.
FEW_OF_TILES, FEW_OF_HALVES = 8, 4
WIDE = 512  # elements of a token from which code for them is worth compiling
# Up to which positions compiled attention is as fast as PyTorch's, with 8 queries for a key.
MOST_POSITIONS = 4096
TILED = 1 << 18  # elements of the smallest weight that is worth a second of compiling
BLOCK = 32  # inputs that share a scale
# Instructions that add four products of eight bits.
HAS_VNNI = all(CPU.get(name) for name in ("avx512_vnni", "avx512_vl"))
LANES = 16 if HAS_VNNI else 8  # of 32 bits in a vector
TILE = 2 * LANES  # outputs of a weight in groups that lie side by side


def is_read(*tensors: torch.Tensor) -> bool:
    """Return whether compiled code reads tensors.

    They are bfloat16 on a CPU, have rows without gaps in them, and aren't trained.
    """
    is_half = all(x.dtype == torch.bfloat16 and x.is_cpu and x.stride(-1) == 1 for x in tensors)
    is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return is_half and not is_trained and has_numba()


def has_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether rows, (n_rows, dim), are normalised by compiled code."""
    is_wide = x.dim() == 2 and x.shape[1:] == weight.shape and len(weight) >= WIDE
    return is_wide and x.is_contiguous() and is_read(x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return normalised rows: an operator of PyTorch takes longer to call than to compute."""
    out, bits = torch.empty_like(x), int.from_bytes(struct.pack("<f", eps), "little")
    places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    by_rows(code("numba_tokens", "rms_norm"), len(x), *places, *x.shape, bits)
    return out


def has_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Return whether compiled code reads two parts of rows, each (n_rows, dim)."""
    is_wide = gate.dim() == 2 and gate.shape[1] >= WIDE
    are_alike = gate.shape == up.shape and gate.stride() == up.stride()
    return is_wide and are_alike and is_read(gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of rows, (n_rows, dim), which lie equally far from each other."""
    out = gate.new_empty(gate.shape)
    places = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    by_rows(code("numba_tokens", "swiglu"), len(gate), *places, *gate.shape, gate.stride(0))
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
    return fit and xqkv.stride(1) == xqkv.shape[2] and is_read(xqkv, kv_cache.k)


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
    sizes = [len(batch.slots), xq.shape[1], n_kv_heads, head_dim, len(keys), keys.shape[2]]
    sizes.append(xqkv.stride(0))
    places = [part.data_ptr() for part in some]
    by_rows(code("numba_tokens", "rotate"), sizes[0], *places, *sizes)
    return xq


def has_attention(q: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch) -> bool:
    """Return whether ``attend`` is faster than an operator of PyTorch, for queries as it has."""
    (n_tokens, n_heads, head_dim), keys = q.shape, kv_cache.k
    if torch.compiler.is_compiling() or not keys.is_cpu or kv_cache.position_major:
        return False
    if n_tokens > FEW_TOKENS or n_tokens > len(batch.slots) or n_heads * head_dim < WIDE:
        return False
    fits = head_dim % (2 * LANES) == 0 and head_dim <= 256 and keys.shape[2] >= LANES
    are_few = all(call.kv_len <= MOST_POSITIONS for call in batch.calls)
    are_whole = all(x.dtype == torch.int64 for x in (batch.slots, batch.positions))
    return fits and are_few and are_whole and q.is_contiguous() and is_read(q, keys)


def attend(q: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch) -> torch.Tensor:
    """Return the attention of few tokens, each to the positions of its slot up to its own.

    Args:
        q: shape (n_tokens, n_heads, head_dim).
        kv_cache: of the layer, which holds the tokens' own keys and values.
        batch: where the tokens are.
    """
    keys, out = kv_cache.k, torch.empty_like(q)
    most = min(keys.shape[2], MOST_POSITIONS)
    scores = q.new_empty(torch.get_num_threads() * most, dtype=torch.float32)
    some = (q, batch.slots, batch.positions, keys, kv_cache.v, scores, out)
    sizes = (*q.shape[:2], *keys.shape[1:3], most)
    address = code("numba_attention", "attend", q.shape[2]).address
    in_parallel(address, *(part.data_ptr() for part in some), *sizes)
    return out


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
        # Compiled before the first prompt.
        code("numba_tiles", "product", width, self._is_int8, True)
        if self._is_int8:
            code("numba_tiles", "round_tokens")
        compile_tokens_code()

    @staticmethod
    def find(packed: torch.Tensor, weight: torch.Tensor) -> "Tiles | None":
        """Return the tiles of a packed weight; None where it is small or its order another."""
        (n_outputs, n_inputs), size = weight.shape, 4 // weight.itemsize
        fits = weight.numel() >= TILED and n_inputs % 64 == 0 and HAS_VNNI
        if not (fits and hasattr(torch.ops.mkldnn, "data_ptr") and has_numba()):
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
        by_rows(
            code("numba_tiles", "round_tokens"),
            n_tokens,
            *places,
            n_tokens,
            n_inputs,
            n_digits,
            size,
        )
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
        kind = (self._width, self._is_int8, is_half)
        places = [self._address, x.data_ptr(), sums.data_ptr(), out.data_ptr()]
        product = code("numba_tiles", "product", *kind).address
        in_parallel(product, *places, n_tiles, n_inputs, n_tokens, *others)
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
        code("numba_code", "bfloat16_product")  # compiled before the first prompt
        compile_tokens_code()

    @staticmethod
    def is_fastest_for(weight: torch.Tensor) -> bool:
        """Return whether a weight is multiplied fastest by compiled code."""
        fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        return fits and not cpu_has_bf16() and has_numba()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._stored["weight"]
        if len(x) > FEW_OF_PLAIN:
            return plain.linear(x, weight)
        wide = x.float().contiguous()
        out = wide.new_empty(len(x), self.out_features)
        places = [part.data_ptr() for part in (weight, wide, out)]
        in_parallel(code("numba_code", "bfloat16_product").address, *places, *weight.shape, len(x))
        return out.to(x.dtype)


def compile_tokens_code() -> None:
    for function in ("rms_norm", "swiglu", "rotate"):
        code("numba_tokens", function)
