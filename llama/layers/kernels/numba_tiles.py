"""The code that ``tiles.Tiles`` has numba compile."""

# mypy: ignore-errors

import functools
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import alloca_once, for_range, unpack_tuple
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from llama.layers.kernels.compiled import LANES, ROWS
from llama.layers.kernels.numba_code import (
    AHEAD,
    F32,
    FLOAT,
    I8,
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

TOKENS = 48  # whose inputs stay in the cache from one tile to the next
LEVELS = 127  # of an input on either side of zero


class Kind(NamedTuple):
    """What code is compiled for."""

    width: int  # outputs of a tile
    is_int8: bool  # whether weights have eight bits; else they are bfloat16, as inputs then are
    is_half: bool  # whether outputs are written in bfloat16, not in float32
    has_amx: bool  # whether AMX multiplies


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
    written, sums of 32 bits and outputs, both (n_tokens, n_tiles * width), to the numbers of tiles,
    inputs and tokens, and to the address of AMX's configuration. Inputs are bfloat16, without AMX
    float32. For eight bits, with AMX alone, they are uint8, and three more addresses follow: of the
    scales of tokens, of those of outputs, and of what is added to an output's sum, int32.
    """
    kind = Kind(*kind)
    return (_by_matrices if kind.has_amx else _by_vectors)(kind, _finish(kind))


def _finish(kind: Kind):
    """Return a function that writes a tile's outputs, given their sums."""
    width, is_int8, is_half, _ = kind
    written = numba.uint16 if is_half else FLOAT

    @numba.njit
    def finish(given, first, begin, end):
        n_tokens, n_outputs = given[6], given[4] * width
        sums = numba.carray(
            pointer(given[2]), (n_tokens, n_outputs), numba.int32 if is_int8 else FLOAT
        )
        out = numba.carray(pointer(given[3]), (n_tokens, n_outputs), written)
        for token in range(begin, end):
            for i in range(first, first + width):
                result = sums[token, i]
                if is_int8:
                    of_outputs = numba.carray(pointer(given[9]), (n_outputs,), FLOAT)
                    added = numba.carray(pointer(given[10]), (n_outputs,), numba.int32)
                    of_token = numba.carray(pointer(given[8]), (n_tokens,), FLOAT)[token]
                    result = FLOAT(result + added[i]) * of_outputs[i] * of_token
                out[token, i] = rounded(result) if is_half else result

    return finish


def _by_matrices(kind: Kind, finish):
    multiply, width = _matrix(kind), kind.width

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = numba.carray(data, 11, numba.int64)
        places, n_tokens = to_fixed_tuple(given[:6], 6), given[6]
        before = space()
        keep(before)  # as others left AMX, who may go on with it
        configure(given[7])
        for tile in range(*part_of_thread(given[4])):
            for token in range(0, n_tokens, ROWS):
                multiply(places, tile, max(min(token, n_tokens - ROWS), 0))
            finish(given, tile * width, 0, n_tokens)
        configure(before)

    return tiles_of_thread


@intrinsic
def space(typing):
    """Return the address of a configuration of AMX in the caller's own memory."""

    def generate(context, build, signature, args):
        return build.ptrtoint(alloca_once(build, ir.ArrayType(I8, 64)), I64)

    return INTEGER(), generate


def _on_memory(name):
    """Return a function that calls an instruction with an address."""

    @intrinsic
    def call(typing, place):
        def generate(context, build, signature, args):
            pointer = build.inttoptr(args[0], I8.as_pointer())
            Vectors(build).call(name, ir.VoidType(), pointer)
            return context.get_dummy_value()

        return numba.void(INTEGER), generate

    return call


keep, configure = _on_memory("x86.sttilecfg"), _on_memory("x86.ldtilecfg")


class Matrices(Vectors):
    """Makes instructions of AMX, for registers of up to 16 rows of 64 bytes."""

    def __init__(self, build, product="tdpbf16ps"):
        super().__init__(build)
        self.product = product

    def clear(self, register):
        self.call("x86.tilezero", ir.VoidType(), I8(register))

    def load(self, register, place, pitch, is_read_once=False):
        self._move("tileloaddt164" if is_read_once else "tileloadd64", register, place, pitch)

    def store(self, register, place, pitch):
        self._move("tilestored64", register, place, pitch)

    def add_product(self, total, first, second):
        """Add a product to a register; of the second each word belongs to another output."""
        registers = (I8(register) for register in (total, first, second))
        self.call(f"x86.{self.product}", ir.VoidType(), *registers)

    def _move(self, name, register, place, pitch):
        pointer = self.build.inttoptr(place, I8.as_pointer())
        self.call(f"x86.{name}", ir.VoidType(), I8(register), pointer, pitch)


def _matrix(kind: Kind):
    """Return a function that writes the sums of a tile's products with up to ``ROWS`` tokens.

    AMX's registers 0 to 3 hold sums, each of 16 outputs, 4 the inputs, and the others weights, of
    16 words of each output.
    """
    width, is_int8, *_ = kind
    parts, line = range(width // 16), 64

    @intrinsic
    def write(typing, places, tile, token):
        return numba.void(places, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        (tiles, x, out, _, n_tiles, n_inputs), tile, token = unpack_tuple(build, args[0]), *args[1:]
        vector, n_bytes = Vectors(build), build.mul(n_inputs, I64(1 if is_int8 else 2))

        def at(address, *sizes):
            return build.add(address, functools.reduce(build.mul, sizes))

        amx = Matrices(build, "tdpbusd" if is_int8 else "tdpbf16ps")
        pitch = build.mul(n_tiles, I64(4 * width))  # bytes of a token's sums
        tiles, x = at(tiles, tile, n_bytes, I64(width)), at(x, token, n_bytes)
        out = at(at(out, token, pitch), tile, I64(4 * width))
        for part in parts:
            amx.clear(part)
        with for_range(build, build.sdiv(n_bytes, I64(line))) as loop:
            place = at(tiles, loop.index, I64(line * width))
            amx.load(4, at(x, loop.index, I64(line)), n_bytes)
            for part in parts:
                own, register = build.add(place, I64(line * part)), 5 + part % 3
                amx.load(register, own, I64(4 * width), is_read_once=True)
                amx.add_product(part, 4, register)
                for ahead in range(16):  # twice as far as for vectors: it reads as much at once
                    vector.prefetch(build.add(place, I64(line * (16 * part + ahead) + 2 * AHEAD)))
        for part in parts:
            amx.store(part, build.add(out, I64(line * part)), pitch)
        return context.get_dummy_value()

    return write


def _by_vectors(kind: Kind, finish):
    width = kind.width
    # As many sums fit into registers.
    n_most = 6 if width == 2 * LANES else 4
    one, two, four, most = (_vectors(width, n) for n in (1, 2, 4, n_most))

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = numba.carray(data, 10, numba.int64)
        places, n_tokens = to_fixed_tuple(given[:6], 6), given[6]
        for begin in range(0, n_tokens, TOKENS):
            end = min(begin + TOKENS, n_tokens)
            for tile in range(*part_of_thread(given[4])):
                token = begin
                while end - token >= n_most:
                    most(places, tile, token)
                    token += n_most
                while end - token >= 4:
                    four(places, tile, token)
                    token += 4
                while end - token >= 2:
                    two(places, tile, token)
                    token += 2
                while token < end:
                    one(places, tile, token)
                    token += 1
                finish(given, tile * width, begin, end)

    return tiles_of_thread


def _vectors(width: int, n_tokens: int):
    """Return a function that writes the sums of a tile's products with some tokens."""
    vectors = range(width // LANES)

    @intrinsic
    def write(typing, places, tile, token):
        return numba.void(places, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        (tiles, x, out, _, n_tiles, n_inputs), tile, token = unpack_tuple(build, args[0]), *args[1:]
        vector, n_words = Vectors(build), build.sdiv(n_inputs, I64(2))
        shift, mask = (vector.constant(I32, [n] * LANES) for n in (16, -1 << 16))

        def at(address, index, n_bytes):
            return build.add(address, build.mul(index, I64(n_bytes)))

        tiles = at(tiles, build.mul(tile, n_words), 4 * width)
        tokens = [build.add(token, I64(i)) for i in range(n_tokens)]
        inputs = [at(x, build.mul(each, n_inputs), 4) for each in tokens]
        sums = [[vector.zeros(LANES) for _ in vectors] for _ in tokens]
        with for_range(build, n_words) as loop:
            place = at(tiles, loop.index, 4 * width)
            words = [vector.load(place, I64(i), I32, LANES) for i in vectors]
            # Bfloat16 is the upper half of float32.
            weights = (
                [vector.floats(build.shl(word, shift)) for word in words],
                [vector.floats(build.and_(word, mask)) for word in words],
            )
            for ahead in range(AHEAD, AHEAD + 4 * width, 64):
                vector.prefetch(build.add(place, I64(ahead)))
            for own, start in zip(sums, inputs, strict=True):
                for i, halves in enumerate(weights):
                    index = build.add(build.mul(loop.index, I64(2)), I64(i))
                    some = vector.spread(vector.load(start, index, F32, 1), [0] * LANES)
                    for total, weight in zip(own, halves, strict=True):
                        vector.add_product(total, weight, some)
        for each, own in zip(tokens, sums, strict=True):
            place = at(at(out, build.mul(each, n_tiles), 4 * width), tile, 4 * width)
            for i, total in zip(vectors, own, strict=True):
                result = build.load(total)
                pointer = build.inttoptr(at(place, I64(i), 4 * LANES), result.type.as_pointer())
                build.store(result, pointer, align=4)
        return context.get_dummy_value()

    return write
