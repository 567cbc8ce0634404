"""The code that numba compiles to round inputs to eight bits."""

# mypy: ignore-errors

import numba
import numpy as np
from numba.extending import intrinsic

from llama.layers.kernels.compiled import BLOCK, LANES
from llama.layers.kernels.numba_code import (
    F32,
    FLOAT,
    I64,
    INTEGER,
    ZERO,
    Vectors,
    bfloat16,
    compiled,
    part_of_thread,
    pointer,
    thread_number,
)

SIZES = (32, 64)  # of blocks of a weight whose rows have 64 inputs, or multiples
LEVELS = 127  # of an input on either side of zero
ABOVE = LEVELS + 1  # of codes without signs: how much they are above their values


@numba.njit
def _same(value):
    return value


def _elements(is_half):
    """Return the type of inputs in memory, bfloat16 or float32, and what makes them float32."""
    return (numba.uint16, bfloat16) if is_half else (FLOAT, _same)


def round_inputs(is_half):
    """Return a function that rounds a thread's part of inputs to eight bits in blocks of 32.

    Its argument points to the addresses of inputs, (n_tokens, n_inputs), bfloat16 or float32, and
    of what is written, then to the numbers of tokens and blocks, to how many groups a block has at
    least, one or two, and to whether the weight has codes of four bits:

    - codes, int8, the shape of the inputs. For int4 a block's even inputs lie before its odd ones,
      as the lower bits of its bytes and the upper ones.
    - scales, float32, (n_tokens, n_blocks).
    - offsets, int32, (n_tokens, groups), to be added to a group's sum, as the weight's codes are
      multiplied without signs, 8 above their values or 128.
    - sums of inputs, float32, (n_tokens, groups), which zeros are multiplied by.
    """
    element, wide = _elements(is_half)

    @compiled("reassoc", "nsz")
    def tokens_of_thread(data):
        given = numba.carray(data, 9, numba.int64)
        places, sizes = given[:5], given[5:]
        n_tokens, n_blocks, halves, is_int4 = sizes[0], sizes[1], sizes[2], sizes[3] != 0
        x = numba.carray(pointer(places[0]), (n_tokens, n_blocks, BLOCK), element)
        codes = numba.carray(pointer(places[1]), (n_tokens, n_blocks, BLOCK), numba.int8)
        scales = numba.carray(pointer(places[2]), (n_tokens, n_blocks), numba.float32)
        offsets = numba.carray(pointer(places[3]), (n_tokens, n_blocks, halves), numba.int32)
        sums = numba.carray(pointer(places[4]), (n_tokens, n_blocks, halves), numba.float32)
        size, above = BLOCK // halves, FLOAT(8) if is_int4 else FLOAT(128)
        for token in range(*part_of_thread(n_tokens)):
            for block in range(n_blocks):
                some, own = x[token, block], codes[token, block]
                largest, total = ZERO, ZERO
                for i in range(BLOCK):
                    largest = max(largest, abs(wide(some[i])))
                for i in range(BLOCK):
                    total += wide(some[i]) * ZERO  # not a number, if one of them isn't
                inverse = FLOAT(127) / largest if largest > 0 else ZERO
                scale = largest / FLOAT(127) + total
                scales[token, block] = scale
                for half in range(halves):
                    total, count = ZERO, ZERO
                    for i in range(half * size, half * size + size):
                        total += wide(some[i])
                        count += np.rint(wide(some[i]) * inverse)
                    sums[token, block, half] = total
                    offsets[token, block, half] = -above * count
                if is_int4:
                    for i in range(BLOCK // 2):
                        own[i] = np.rint(wide(some[2 * i]) * inverse)
                        own[BLOCK // 2 + i] = np.rint(wide(some[2 * i + 1]) * inverse)
                else:
                    for i in range(BLOCK):
                        own[i] = np.rint(wide(some[i]) * inverse)

    return tokens_of_thread


def _rotate(is_half):
    """Return a function that multiplies a block by the Hadamard matrix of its size.

    It adds and subtracts halves.
    """

    @intrinsic
    def rotate(typing, x, out, size):
        return numba.void(INTEGER, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        vector = Vectors(build)
        for size in SIZES:
            with build.if_then(build.icmp_signed("==", args[2], I64(size))):
                places = [I64(i) for i in range(size // LANES)]
                if is_half:
                    parts = [vector.bfloat16(args[0], place, LANES) for place in places]
                else:
                    parts = [vector.load(args[0], place, F32, LANES) for place in places]
                for half in (1 << i for i in range((LANES - 1).bit_length())):
                    others = [i ^ half for i in range(LANES)]
                    signs = vector.constant(F32, [-1.0 if i & half else 1.0 for i in range(LANES)])
                    fma = f"fma.v{LANES}f32"
                    parts = [
                        vector.call(fma, part.type, part, signs, vector.spread(part, others))
                        for part in parts
                    ]
                for half in (1 << i for i in range((len(parts) - 1).bit_length())):
                    parts = [
                        build.fsub(parts[i ^ half], part)
                        if i & half
                        else build.fadd(part, parts[i ^ half])
                        for i, part in enumerate(parts)
                    ]
                scale = vector.constant(F32, [size**-0.5] * LANES)
                for i, part in enumerate(parts):
                    vector.store(build.fmul(part, scale), args[1], I64(i))
        return context.get_dummy_value()

    return rotate


@numba.njit(fastmath={"nnan", "nsz", "reassoc"})  # a NaN is restored below
def _largest(some):
    largest = ZERO
    for i in range(len(some)):
        largest = max(largest, abs(some[i]))
    return largest


@numba.njit(fastmath={"nsz", "reassoc"})
def _zero_or_nan(some):
    total = ZERO
    for i in range(len(some)):
        total += some[i] * ZERO
    return total


def round_tokens(is_half):
    """Return a function that rotates a thread's part of inputs, and rounds them to ``LEVELS``.

    Its argument points to the addresses of inputs, (n_tokens, n_inputs), bfloat16 or float32, of
    memory for a token of each thread, float32, and of what is written, then to the numbers of
    tokens, of inputs, of digits, one or two, of the inputs that are rotated together, 1 or one of
    ``SIZES``, of those that share a scale, and to what codes are above their values:

    - codes, of eight bits, (n_digits, n_tokens, n_inputs). The second digit is of what the first
      leaves.
    - scales, float32, (n_digits, n_tokens, n_spans).
    - offsets, int32, (n_digits, n_tokens, n_spans), to be added to a span's sum if the weight's
      codes are multiplied without signs.
    """
    (element, wide), rotate = _elements(is_half), _rotate(is_half)
    n_bytes = 2 if is_half else 4

    @compiled()
    def tokens_of_thread(data):
        given = numba.carray(data, 11, numba.int64)
        n_tokens, n_inputs, n_digits, size, span = given[5], given[6], given[7], given[8], given[9]
        n_spans = -(-n_inputs // span)
        x = numba.carray(pointer(given[0]), (n_tokens, n_inputs), element)
        memory = given[1] + thread_number() * n_inputs * 4
        row = numba.carray(pointer(memory), (n_inputs,), FLOAT)
        codes = numba.carray(pointer(given[2]), (n_digits, n_tokens, n_inputs), numba.uint8)
        scales = numba.carray(pointer(given[3]), (n_digits, n_tokens, n_spans), FLOAT)
        offsets = numba.carray(pointer(given[4]), (n_digits, n_tokens, n_spans), numba.int32)
        levels, above = FLOAT(LEVELS), numba.int32(given[10])
        for token in range(*part_of_thread(n_tokens)):
            if size > 1:
                for i in range(0, n_inputs, size):
                    rotate(given[0] + n_bytes * (token * n_inputs + i), memory + 4 * i, size)
            else:
                given_row = x[token]
                for i in range(n_inputs):
                    row[i] = wide(given_row[i])
            for number in range(n_spans):
                begin, end = number * span, min((number + 1) * span, n_inputs)
                some, own = row[begin:end], codes[0, token, begin:end]
                largest, total = max(_largest(some), FLOAT(1e-30)), numba.int32(0)
                scale = levels / largest
                scales[0, token, number] = largest / levels + _zero_or_nan(some)
                if n_digits == 1:
                    for i in range(len(some)):
                        code = numba.int32(np.rint(some[i] * scale))
                        own[i] = code + above
                        total += code
                else:
                    rest, left = codes[1, token, begin:end], numba.int32(0)
                    scales[1, token, number] = scales[0, token, number] / (2 * levels)
                    for i in range(len(some)):
                        first = np.rint(some[i] * scale)
                        code = numba.int32(first)
                        own[i] = code + above
                        total += code
                        code = numba.int32(np.rint((some[i] * scale - first) * (2 * levels)))
                        rest[i] = code + above
                        left += code
                    offsets[1, token, number] = -ABOVE * left
                offsets[0, token, number] = -ABOVE * total

    return tokens_of_thread
