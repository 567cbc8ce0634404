"""The code that numba compiles for what a token needs besides products with weights.

For one token an operator of PyTorch takes longer to call than to compute.
"""

# mypy: ignore-errors

import math

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from llama.layers.kernels.numba_code import (
    FLOAT,
    I8,
    INTEGER,
    ZERO,
    bfloat16,
    compiled_once,
    part_of_thread,
    pointer,
    rounded,
)

# Of the series of 2 ** x.
C0, C1, C2, C3, C4, C5, C6 = (FLOAT(math.log(2) ** k / math.factorial(k)) for k in range(7))


@numba.njit(fastmath={"nsz", "contract"}, error_model="numpy")
def exp(x):
    """Return an exponential, to float32's precision, by operations that vectors have."""
    # A NaN is lost here, but not where ``swiglu`` divides the input itself.
    scaled = min(max(x * FLOAT(math.log2(math.e)), FLOAT(-126)), FLOAT(127))
    whole = np.rint(scaled)
    f = scaled - whole
    series = C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    power = bfloat16(numba.uint16((numba.int32(whole) + 127) << 7))  # its exponent alone
    return series * power


@compiled_once("reassoc", "nsz", "contract")
def rms_norm(data):
    """Write a thread's part of normalised rows.

    ``data`` points to the addresses of rows, bfloat16, (n_rows, dim), of their weights and of
    outputs, bfloat16, then to the numbers of rows and of their elements, and to the bits of what is
    added to mean squares, float32.
    """
    given = numba.carray(data, 6, numba.int64)
    n_rows, dim, eps = given[3], given[4], numba.carray(data, 12, FLOAT)[10]
    x = numba.carray(pointer(given[0]), (n_rows, dim), numba.uint16)
    weight = numba.carray(pointer(given[1]), (dim,), numba.uint16)
    out = numba.carray(pointer(given[2]), (n_rows, dim), numba.uint16)
    for row in range(*part_of_thread(n_rows)):
        some, own, total = x[row], out[row], ZERO
        for i in range(dim):
            value = bfloat16(some[i])
            total += value * value
        scale = FLOAT(1) / np.sqrt(total / FLOAT(dim) + eps)
        for i in range(dim):
            own[i] = rounded(bfloat16(some[i]) * scale * bfloat16(weight[i]))


@compiled_once("nsz", "contract")
def swiglu(data):
    """Write a thread's part of the products of ``silu(gate)`` and ``up``.

    ``data`` points to the addresses of both, bfloat16, and of outputs, bfloat16, (n_rows, dim),
    then to the numbers of rows, of their elements, and of those from a row of ``gate`` and ``up``
    to the next.
    """
    given = numba.carray(data, 6, numba.int64)
    n_rows, dim, step = given[3], given[4], given[5]
    gate = numba.carray(pointer(given[0]), (n_rows, step), numba.uint16)
    up = numba.carray(pointer(given[1]), (n_rows, step), numba.uint16)
    out = numba.carray(pointer(given[2]), (n_rows, dim), numba.uint16)
    for row in range(*part_of_thread(n_rows)):
        some, factors, own = gate[row], up[row], out[row]
        for i in range(dim):
            x = bfloat16(some[i])
            own[i] = rounded(x / (FLOAT(1) + exp(-x)) * bfloat16(factors[i]))


@compiled_once()
def add(data):
    """Write a thread's part of the sums of two tensors' rows.

    ``data`` points to the addresses of both and of outputs, bfloat16, (n_rows, dim), then to the
    numbers of rows and of their elements.
    """
    given = numba.carray(data, 5, numba.int64)
    n_rows, dim = given[3], given[4]
    first = numba.carray(pointer(given[0]), (n_rows, dim), numba.uint16)
    second = numba.carray(pointer(given[1]), (n_rows, dim), numba.uint16)
    out = numba.carray(pointer(given[2]), (n_rows, dim), numba.uint16)
    for row in range(*part_of_thread(n_rows)):
        for i in range(dim):
            out[row, i] = rounded(bfloat16(first[row, i]) + bfloat16(second[row, i]))


@compiled_once()
def to_float32(data):
    """Write a thread's part of some rows in float32.

    ``data`` points to the addresses of rows, bfloat16, (n_rows, dim), and of outputs, then to the
    numbers of rows and of their elements.
    """
    given = numba.carray(data, 4, numba.int64)
    n_rows, dim = given[2], given[3]
    x = numba.carray(pointer(given[0]), (n_rows, dim), numba.uint16)
    out = numba.carray(pointer(given[1]), (n_rows, dim), FLOAT)
    for row in range(*part_of_thread(n_rows)):
        for i in range(dim):
            out[row, i] = bfloat16(x[row, i])


@compiled_once()
def to_bfloat16(data):
    """Write a thread's part of some rows in bfloat16; ``data`` is as for ``to_float32``."""
    given = numba.carray(data, 4, numba.int64)
    n_rows, dim = given[2], given[3]
    x = numba.carray(pointer(given[0]), (n_rows, dim), FLOAT)
    out = numba.carray(pointer(given[1]), (n_rows, dim), numba.uint16)
    for row in range(*part_of_thread(n_rows)):
        for i in range(dim):
            out[row, i] = rounded(x[row, i])


@compiled_once()
def gather(data):
    """Copy a thread's part of some rows of a table, or of tiles.

    ``data`` points to the addresses of the table, (n_rows / width, n_words, width), in words of 32
    bits, of the rows' numbers, int64, and of the copies, (n, n_words), then to the numbers of
    copies, of words, of rows, and to the width. A number beyond the table is its last row's.
    """
    given = numba.carray(data, 7, numba.int64)
    n, n_words, n_rows, width = given[3], given[4], given[5], given[6]
    shape = (-(-n_rows // width), n_words, width)
    table = numba.carray(pointer(given[0]), shape, numba.uint32)
    numbers = numba.carray(pointer(given[1]), (n,), numba.int64)
    out = numba.carray(pointer(given[2]), (n, n_words), numba.uint32)
    for i in range(*part_of_thread(n)):
        number = min(max(numbers[i], 0), n_rows - 1)
        tile, place = number // width, number % width
        for word in range(n_words):
            out[i, word] = table[tile, word, place]


_barrier = numba.types.ExternalFunction("llama_barrier", numba.void())


@intrinsic
def _call(typing, function, data):
    """Call a function at an address with a pointer."""

    def generate(context, build, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
        function = build.inttoptr(args[0], kind.as_pointer())
        build.call(function, [build.inttoptr(args[1], I8.as_pointer())])
        return context.get_dummy_value()

    return numba.void(INTEGER, INTEGER), generate


@compiled_once()
def replay(data):
    """Call functions in each thread, one after another: the next when all are through with one.

    ``data`` points to the number of functions, then to each one's address and its data's.
    """
    n_calls = numba.carray(data, 1, numba.int64)[0]
    calls = numba.carray(data, 1 + 2 * n_calls, numba.int64)
    for i in range(1, 1 + 2 * n_calls, 2):
        _call(calls[i], calls[i + 1])
        _barrier()


@compiled_once("contract")
def rotate(data):
    """Rotate a thread's part of queries and keys, and write the latter and values to the cache.

    ``data`` points to the addresses of what is read, then of what is written:

    - queries, keys and values side by side, bfloat16, (n_tokens, n_heads + 2 * n_kv_heads,
      head_dim).
    - cosines and sines, float32, (n_tokens, head_dim / 2, 2).
    - slots and positions, int64, (n_tokens,).
    - queries, bfloat16, (n_tokens, n_heads, head_dim).
    - cached keys and values, bfloat16, (n_slots, n_kv_heads, max_seq_len, head_dim).

    then to the numbers of tokens, heads, key/value heads, elements of a head, slots and positions,
    and to how far rows of the first lie from each other.
    """
    given = numba.carray(data, 14, numba.int64)
    n_tokens, n_heads, n_kv_heads, head_dim = given[7], given[8], given[9], given[10]
    # Pairs are one number, whose lower half is the first of both.
    half, n_all = head_dim // 2, n_heads + 2 * n_kv_heads
    size = (given[11], n_kv_heads, given[12], half)
    freqs = numba.carray(pointer(given[1]), (n_tokens, half, 2), FLOAT)
    slots = numba.carray(pointer(given[2]), (n_tokens,), numba.int64)
    positions = numba.carray(pointer(given[3]), (n_tokens,), numba.int64)
    queries = numba.carray(pointer(given[4]), (n_tokens, n_heads, half), numba.uint32)
    keys = numba.carray(pointer(given[5]), size, numba.uint32)
    values = numba.carray(pointer(given[6]), size, numba.uint32)
    for token in range(*part_of_thread(n_tokens)):
        slot, position, angles = slots[token], positions[token], freqs[token]
        x = numba.carray(pointer(given[0] + 2 * token * given[13]), (n_all, half), numba.uint32)
        for head in range(n_heads):
            _rotate(x[head], angles, queries[token, head])
        for head in range(n_kv_heads):
            _rotate(x[n_heads + head], angles, keys[slot, head, position])
            value, cached = x[n_heads + n_kv_heads + head], values[slot, head, position]
            for i in range(half):
                cached[i] = value[i]


@numba.njit(fastmath={"contract"})
def _rotate(pairs, angles, out):
    for i in range(len(pairs)):
        pair, cos, sin = pairs[i], angles[i, 0], angles[i, 1]
        real, imag = bfloat16(numba.uint16(pair)), bfloat16(numba.uint16(pair >> 16))
        first, second = rounded(real * cos - imag * sin), rounded(real * sin + imag * cos)
        out[i] = numba.uint32(first) | numba.uint32(second) << numba.uint32(16)
