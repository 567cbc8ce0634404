"""The code that ``compiled.Tiles`` has numba compile, for AVX-512."""

# mypy: ignore-errors

from typing import NamedTuple

import numba
import numpy as np
from numba.core.cgutils import for_range, unpack_tuple
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from llama.layers.kernels.compiled import LANES
from llama.layers.kernels.numba_code import (
    AHEAD,
    F32,
    FLOAT,
    I32,
    I64,
    INTEGER,
    ZERO,
    Vectors,
    compiled_once,
    part_of_thread,
    pointer,
    rotate_blocks,
    rounded,
)

LEVELS = 127  # of an input on either side of zero


class Kind(NamedTuple):
    """What code is compiled for."""

    width: int  # outputs of a tile
    is_int8: bool  # whether weights have eight bits; else they are bfloat16, as inputs then are
    is_half: bool  # whether outputs are written in bfloat16, not in float32


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


@compiled_once()
def round_tokens(data):
    """Rotate a thread's part of the tokens' inputs, and round them to ``LEVELS`` around zero.

    ``data`` points to the addresses of inputs, float32, (n_tokens, n_inputs), then of what is
    written, and to the numbers of tokens, of inputs, of digits, one or two, and of the inputs that
    are rotated together, a power of two:

    - rotated inputs, float32, their shape.
    - codes, uint8, (n_digits, n_tokens, n_inputs), ``LEVELS + 1`` above their values. The second
      digit is of what the first leaves.
    - scales, float32, (n_digits, n_tokens).
    """
    given = numba.carray(data, 8, numba.int64)
    n_tokens, n_inputs, n_digits, size = given[4], given[5], given[6], given[7]
    x = numba.carray(pointer(given[0]), (n_tokens, n_inputs), FLOAT)
    rotated = numba.carray(pointer(given[1]), (n_tokens, n_inputs), FLOAT)
    codes = numba.carray(pointer(given[2]), (n_digits, n_tokens, n_inputs), numba.uint8)
    scales = numba.carray(pointer(given[3]), (n_digits, n_tokens), FLOAT)
    levels, above = FLOAT(LEVELS), FLOAT(LEVELS + 1.5)
    for token in range(*part_of_thread(n_tokens)):
        some, own, rest = x[token], codes[0, token], codes[n_digits - 1, token]
        if size > 1:
            some = rotated[token]
            rotate_blocks(x[token], size, some)
        largest = max(_largest(some), FLOAT(1e-30))
        scale = levels / largest
        scales[0, token] = largest / levels + _zero_or_nan(some)
        if n_digits == 1:
            for i in range(n_inputs):
                own[i] = numba.int32(some[i] * scale + above)
        else:
            scales[1, token] = scales[0, token] / (2 * levels)
            for i in range(n_inputs):
                first = np.rint(some[i] * scale)
                own[i] = numba.int32(first + above)
                rest[i] = numba.int32((some[i] * scale - first) * (2 * levels) + above)


def product(*kind):
    """Return a function that computes a thread's part of the outputs, of tiles of a ``Kind``.

    Its argument points to the addresses of tiles, of inputs, (n_tokens, n_inputs), and of what is
    written, sums of 32 bits and outputs, both (n_tokens, n_tiles * width), then to the numbers of
    tiles, inputs and tokens. For eight bits inputs are uint8, and three more addresses follow: of
    the scales of tokens, of those of outputs, and of what is added to an output's sum, int32.
    """
    width, is_int8, is_half = kind
    one, two, four = (_tile(Kind(*kind), n) for n in (1, 2, 4))
    written = numba.uint16 if is_half else FLOAT

    @numba.njit
    def finish(given, first, token):
        n_tokens, n_outputs = given[6], given[4] * width
        sums = numba.carray(
            pointer(given[2]), (n_tokens, n_outputs), numba.int32 if is_int8 else FLOAT
        )
        out = numba.carray(pointer(given[3]), (n_tokens, n_outputs), written)
        for i in range(first, first + width):
            result = sums[token, i]
            if is_int8:
                of_outputs = numba.carray(pointer(given[8]), (n_outputs,), FLOAT)
                added = numba.carray(pointer(given[9]), (n_outputs,), numba.int32)
                of_token = numba.carray(pointer(given[7]), (n_tokens,), FLOAT)[token]
                result = FLOAT(result + added[i]) * of_outputs[i] * of_token
            out[token, i] = rounded(result) if is_half else result

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = numba.carray(data, 10, numba.int64)
        places, n_tokens = to_fixed_tuple(given[:6], 6), given[6]
        for tile in range(*part_of_thread(given[4])):
            token = 0
            while n_tokens - token >= 4:
                four(places, tile, token)
                token += 4
            while n_tokens - token >= 2:
                two(places, tile, token)
                token += 2
            while token < n_tokens:
                one(places, tile, token)
                token += 1
            for token in range(n_tokens):
                finish(given, tile * width, token)

    return tiles_of_thread


def _tile(kind: Kind, n_tokens: int):
    """Return a function that writes the sums of a tile's products with some tokens."""
    width, is_int8, _ = kind
    size, element = (4, I32) if is_int8 else (2, F32)  # inputs in 32 bits, and what is added up
    vectors = range(width // LANES)

    @intrinsic
    def write(typing, places, tile, token):
        return numba.void(places, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        (tiles, x, out, _, n_tiles, n_inputs), tile, token = unpack_tuple(build, args[0]), *args[1:]
        vector, n_steps = Vectors(build), build.sdiv(n_inputs, I64(size))

        def at(address, index, n_bytes):
            return build.add(address, build.mul(index, I64(n_bytes)))

        def parts(words):
            """Return what is multiplied: of bfloat16, the upper half of float32, either number."""
            if is_int8:
                return [words]
            shift, mask = (vector.constant(I32, [n] * LANES) for n in (16, -1 << 16))
            return [vector.floats(build.shl(words, shift)), vector.floats(build.and_(words, mask))]

        def add(total, weight, some):
            if is_int8:
                name, before = "x86.avx512.vpdpbusd.512", build.load(total)
                build.store(vector.call(name, some.type, before, some, weight), total)
            else:
                vector.add_product(total, weight, some)

        tiles = at(tiles, build.mul(tile, n_steps), 4 * width)
        tokens = [build.add(token, I64(i)) for i in range(n_tokens)]
        inputs = [at(x, build.mul(each, n_steps), 4) for each in tokens]
        sums = [[vector.zeros(LANES, element) for _ in vectors] for _ in tokens]
        with for_range(build, n_steps) as loop:
            place = at(tiles, loop.index, 4 * width)
            weights = [parts(vector.load(place, I64(i), I32, LANES)) for i in vectors]
            for i in vectors:
                vector.prefetch(build.add(place, I64(4 * LANES * i + AHEAD)))
            for own, start in zip(sums, inputs, strict=True):
                words = vector.spread(vector.load(start, loop.index, I32, 1), [0] * LANES)
                for i, some in enumerate(parts(words)):
                    for total, weight in zip(own, weights, strict=True):
                        add(total, weight[i], some)
        for each, own in zip(tokens, sums, strict=True):
            place = at(at(out, build.mul(each, n_tiles), 4 * width), tile, 4 * width)
            for i, total in zip(vectors, own, strict=True):
                result = build.load(total)
                pointer = build.inttoptr(at(place, I64(i), 4 * LANES), result.type.as_pointer())
                build.store(result, pointer, align=4)
        return context.get_dummy_value()

    return write
