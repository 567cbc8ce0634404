"""Code that numba compiles for x86 processors (``llama[fast]``): what lies between products.

``tiles.py`` multiplies by plain weights and int8's, ``groups.py`` by those in groups.
"""

import ctypes
import functools
import struct
from typing import Any

import torch
import torch.nn.functional as F

from llama.layers.batch import RaggedBatch
from llama.layers.capability import CPU, cpu_has_amx
from llama.layers.kernels.machine_code import code, has_numba
from llama.layers.kernels.openmp import by_rows, in_parallel
from llama.layers.kv_cache import KVCache

FEW_TOKENS = 32  # whose attention is compiled, and AMX's products
WIDE = 512  # elements of a token from which code for them is worth compiling
# Up to which positions compiled attention is as fast as PyTorch's, with 8 queries for a key.
MOST_POSITIONS = 4096
BLOCK = 32  # inputs that share a scale, where a weight's do
SPAN = 256  # inputs that share one where a weight's rows have one
# Instructions that add four products of eight bits.
HAS_VNNI = all(CPU.get(name) for name in ("avx512_vnni", "avx512_vl"))
HAS_BF16 = HAS_VNNI and bool(CPU.get("avx512_bf16"))
# Whether the system lets this process use AMX, which is asked for here.
HAS_AMX = HAS_VNNI and cpu_has_amx() and getattr(torch.cpu, "_init_amx", bool)()
ROWS = 16  # tokens that AMX multiplies at once
# Keys whose scores are computed at a time, and tokens for which keys or weights are in the cache.
KEYS, TOKENS = 64, 64
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


def compile_tokens_code() -> None:
    for function in ("rms_norm", "swiglu", "rotate"):
        code("numba_tokens", function)


def compile_prompts(dtype: torch.dtype, n_heads: int, head_dim: int) -> bool:
    """Compile ``attend_prompt`` before the first prompt; return whether it serves such heads."""
    is_served = HAS_AMX and dtype == torch.bfloat16 and _serves(n_heads, head_dim) and has_numba()
    if is_served:
        code("numba_prompts", "attend", head_dim)
    return is_served


def _serves(n_heads: int, head_dim: int) -> bool:
    return head_dim % 32 == 0 and n_heads * head_dim >= WIDE


def has_prompt_attention(q: torch.Tensor, kv_cache: KVCache, slots: slice | torch.Tensor) -> bool:
    """Return whether ``attend_prompt`` computes the attention of queries as it has, of one slot."""
    (n_tokens, n_heads, head_dim), keys = q.shape, kv_cache.k
    if not (HAS_AMX and isinstance(slots, slice) and slots.stop - slots.start == 1):
        return False
    if torch.compiler.is_compiling() or not keys.is_cpu or kv_cache.position_major:
        return False
    fits = n_tokens >= ROWS and _serves(n_heads, head_dim)
    return fits and q.is_contiguous() and is_read(q, keys)


def attend_prompt(
    q: torch.Tensor, kv_cache: KVCache, slots: slice | torch.Tensor, kv_len: int
) -> torch.Tensor:
    """Return the attention of a sequence's last tokens, each to the positions up to its own.

    Args:
        q: shape (n_tokens, n_heads, head_dim).
        kv_cache: of the layer, which holds the tokens' own keys and values.
        slots: the sequence's alone.
        kv_len: how many positions it has, these tokens' included.
    """
    [keys], [values] = kv_cache.k[slots], kv_cache.v[slots]
    out = torch.empty_like(q)
    (n_tokens, n_heads, head_dim), (n_kv_heads, max_seq_len, _) = q.shape, keys.shape
    # Of keys and values in order, of scores and weights, and of each token's sums.
    sizes = (
        8 * KEYS * head_dim,
        6 * ROWS * KEYS,
        TOKENS * n_heads // n_kv_heads * 4 * (head_dim + 2),
    )
    n_bytes = 64 + sum(sizes)
    memory = q.new_empty(torch.get_num_threads() * n_bytes, dtype=torch.uint8)
    places = [part.data_ptr() for part in (q, keys, values, out, memory)]
    others = (n_tokens, n_heads, n_kv_heads, max_seq_len, kv_len, n_bytes)
    address = code("numba_prompts", "attend", head_dim).address
    in_parallel(address, *places, ctypes.addressof(amx_registers(ROWS)), *others)
    return out


@functools.cache
def amx_registers(n_tokens: int) -> Any:
    """Return how AMX's registers are used for up to ``ROWS`` tokens: rows, each of 64 bytes."""
    rows = [n_tokens] * 5 + [16] * 3  # of sums and inputs, of weights
    sizes = [64] * 8 + [0] * 8, rows + [0] * 8
    return ctypes.create_string_buffer(struct.pack("<2B14x16H16B", 1, 0, *sizes[0], *sizes[1]))


def gather(
    table: torch.Tensor, rows: torch.Tensor, n_rows: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return copies of a table's rows, (n, n_words), int32.

    Args:
        table: contiguous, of words of 32 bits, (n_rows, n_words), or of tiles, (n_tiles, n_words,
            width).
        rows: numbers of rows, int64, shape (n,); one beyond the table is its last row's.
        n_rows: of the table.
        out: where to write them, if somewhere else than in new memory.
    """
    width, rows = table.shape[2] if table.dim() == 3 else 1, rows.contiguous()
    if out is None:
        out = torch.empty(len(rows), table.shape[1], dtype=torch.int32, device="cpu")
    places = (table.data_ptr(), rows.data_ptr(), out.data_ptr())
    by_rows(code("numba_tokens", "gather"), len(rows), *places, *out.shape, n_rows, width)
    return out


def in_tiles(part: torch.Tensor, mask: int = 0, owned: bool = False) -> torch.Tensor:
    """Bring rows of words or scales into the order of tiles, (n_tiles, n_elements, TILE).

    Args:
        part: the rows; of codes four are a word.
        mask: what each word is combined with.
        owned: whether to change them where they are.
    """
    order = code("numba_code", "order", 4 if part.itemsize == 1 else part.itemsize)
    missing = -len(part) % TILE
    if missing:
        part = F.pad(part, (0, 0, 0, missing))
    elif not (owned and part.is_contiguous()):
        part = part.clone(memory_format=torch.contiguous_format)
    if part.itemsize == 1:
        part = part.view(torch.int32)
    n_tiles, width = len(part) // TILE, part.shape[1]
    n_bytes = torch.get_num_threads() * TILE * width * part.itemsize
    scratch = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    sizes = (n_tiles, width, mask, scratch.data_ptr())
    in_parallel(order.address, part.data_ptr(), *sizes)
    return part.view(n_tiles, width, TILE)
