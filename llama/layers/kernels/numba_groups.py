"""The code that ``groups.Groups`` has numba compile.

Weights lie in tiles of ``TILE`` outputs, in which the same words of 32 bits of each row are side by
side, and so are the same scales. So a vector has inputs of as many outputs, sums of a block are
scaled once, and memory is read from one end to the other.
"""

# mypy: ignore-errors

from typing import NamedTuple

import numba
from llvmlite import ir
from numba.core.cgutils import for_range, unpack_tuple
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from llama.layers.kernels.compiled import BLOCK, HAS_AMX, HAS_VNNI, LANES, TILE
from llama.layers.kernels.numba_code import (
    AHEAD,
    F32,
    FAR,
    I8,
    I16,
    I32,
    I64,
    INTEGER,
    Vectors,
    part_of_thread,
)

WORDS = BLOCK // 4  # of a block's inputs


class Kind(NamedTuple):
    """What code is compiled for."""

    is_int4: bool  # whether a byte holds two codes of four bits
    in_halves: bool  # whether groups are of 16 inputs, two in a block
    shift: int  # 2 ** shift blocks, or halves of one, are a group
    has_zeros: bool
    has_float16: bool  # of scales and zeros, which are bfloat16 otherwise
    is_half: bool  # whether outputs are written in bfloat16, not in float32


def widen(is_int4, has_float16):
    """Return a function that writes a thread's part of some tiles' weights.

    Its argument points to the addresses of codes, scales, zeros and weights, bfloat16, (n_inputs,
    n_tiles * TILE), then to the numbers of tiles, groups and inputs of a group, and to whether
    zeros count.
    """
    write = _widen(is_int4, has_float16)

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = to_fixed_tuple(numba.carray(data, 8, numba.int64), 8)
        for tile in range(*part_of_thread(given[4])):
            write(given, tile)

    return tiles_of_thread


def _widen(is_int4, has_float16):
    """Return a function that writes a tile's weights."""
    bits = 4 if is_int4 else 8
    n_codes = 32 // bits  # of a word
    sign = -1 << 31 if is_int4 or HAS_VNNI else 0  # of codes without signs

    @intrinsic
    def write(typing, given, tile):
        return numba.void(given, INTEGER), generate

    def generate(context, build, signature, args):
        given, tile = unpack_tuple(build, args[0]), args[1]
        codes, scales, zeros, out, n_tiles, n_groups, size, has_zeros = given
        vector, parts = _Fields(build), range(TILE // LANES)
        numbers = vector.float16 if has_float16 else vector.bfloat16
        per_group = build.sdiv(size, I64(n_codes))
        pitch = build.mul(n_tiles, I64(2 * TILE))  # bytes of an input's weights
        ahead = build.mul(pitch, I64(4 * n_codes))
        nothing = vector.constant(F32, [0] * LANES)
        with for_range(build, n_groups) as groups:
            group = build.add(build.mul(tile, n_groups), groups.index)
            factors, added = [], []
            for part in parts:
                index = build.add(build.mul(group, I64(len(parts))), I64(part))
                factors.append(numbers(scales, index, LANES))
                zero = numbers(zeros, index, LANES)
                is_added = build.icmp_signed("!=", has_zeros, I64(0))
                added.append(build.select(is_added, zero, nothing))
            with for_range(build, per_group) as words:
                word = build.add(build.mul(group, per_group), words.index)
                first = build.add(build.mul(groups.index, per_group), words.index)
                place = build.mul(build.mul(first, I64(n_codes)), pitch)
                place = build.add(build.add(out, place), build.mul(tile, I64(2 * TILE)))
                some = []
                for part in parts:
                    index = build.add(build.mul(word, I64(len(parts))), I64(part))
                    some.append(vector.load(codes, index, I32, LANES))
                for code in range(n_codes):
                    for part in parts:
                        value = vector.field(some[part], bits, code, sign)
                        value = build.fadd(build.fmul(value, factors[part]), added[part])
                        half = vector.rounded(value, LANES)
                        address = build.add(place, I64(2 * LANES * part))
                        build.store(half, build.inttoptr(address, half.type.as_pointer()), align=2)
                    vector.prefetch(build.add(place, ahead), is_written=True)
                    place = build.add(place, pitch)
        return context.get_dummy_value()

    return write


def product(*kind):
    """Return a function that computes a thread's part of the outputs, of weights of a ``Kind``.

    Its argument points to the addresses of codes, scales and zeros of weights, then of inputs
    (``numba_rounding.round_inputs``) and of outputs, (n_tokens, n_rows), then to the numbers of
    rows, blocks, groups and tokens.
    """
    one, two, four = (_multiply(Kind(*kind), n) for n in (1, 2, 4))

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = numba.carray(data, 12, numba.int64)
        addresses, sizes = to_fixed_tuple(given[:8], 8), to_fixed_tuple(given[8:11], 3)
        n_tokens = given[11]
        for tile in range(*part_of_thread(given[8] // TILE)):
            for token in range(0, n_tokens // 4 * 4, 4):
                four(addresses, sizes, tile, token)
            token = n_tokens // 4 * 4
            if n_tokens & 2:
                two(addresses, sizes, tile, token)
            if n_tokens & 1:
                one(addresses, sizes, tile, n_tokens - 1)

    return tiles_of_thread


def _multiply(kind: Kind, n_tokens: int):
    """Return a function that writes a tile's products with some tokens."""
    halves, parts, every = 1 + kind.in_halves, range(TILE // LANES), [0] * LANES
    n_words = WORDS // 2 if kind.is_int4 else WORDS  # of a block's codes
    has_offsets = kind.is_int4 or HAS_VNNI
    is_near = HAS_AMX or n_tokens <= (1 if kind.is_int4 else 2)
    first = AHEAD if is_near else FAR  # of the bytes that are fetched

    @intrinsic
    def write(typing, addresses, sizes, tile, token):
        return numba.void(addresses, sizes, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        (codes, scales, zeros, *inputs, out), sizes = (unpack_tuple(build, x) for x in args[:2])
        (n_rows, n_blocks, n_groups), tile, token = sizes, *args[2:]
        vector, sums = Vectors(build), _Sums(build, kind.is_int4)
        tokens = [build.add(token, I64(i)) for i in range(n_tokens)]
        row = build.mul(tile, I64(TILE))

        def at(address, index, *sizes):
            for size in sizes:
                index = build.mul(index, I64(size) if isinstance(size, int) else size)
            return build.add(address, index)

        def of_tokens(which, kind, per_block):
            """Return a function that loads an element of each token, in every lane."""
            places = [at(inputs[which], each, n_blocks, 4 * per_block) for each in tokens]
            return lambda index: [
                vector.spread(vector.load(place, index, kind, 1), every) for place in places
            ]

        words, scales_of = of_tokens(0, I32, WORDS), of_tokens(1, F32, 1)
        offsets_of, sums_of = of_tokens(2, I32, halves), of_tokens(3, F32, halves)

        numbers = vector.float16 if kind.has_float16 else vector.bfloat16
        codes = at(codes, tile, n_blocks, n_words * TILE * 4)
        scales, zeros = (at(part, tile, n_groups, TILE * 2) for part in (scales, zeros))
        totals = [[vector.zeros(LANES) for _ in parts] for _ in tokens]
        with for_range(build, n_blocks) as loop:
            block = loop.index
            x = [words(at(I64(i), block, WORDS)) for i in range(WORDS)]
            x_scales = scales_of(block)
            for half in range(halves):
                element = at(I64(half), block, halves)
                group = build.lshr(element, I64(kind.shift))
                offsets = offsets_of(element) if has_offsets else [None] * n_tokens
                own = [[sums.begin(offset) for _ in parts] for offset in offsets]
                for i in range(half * n_words // halves, (half + 1) * n_words // halves):
                    word = at(I64(i), block, n_words)
                    for ahead in range(first, first + 4 * TILE, 64):
                        vector.prefetch(build.add(at(codes, word, 4 * TILE), I64(ahead)))
                    for part in parts:
                        w = vector.load(codes, at(I64(part), word, len(parts)), I32, LANES)
                        for j, some in enumerate(sums.codes(w)):  # even inputs lie before odd ones
                            for each, xs in zip(own, x[i + j * WORDS // 2], strict=True):
                                each[part] = sums.add(each[part], some, xs)
                x_sums = sums_of(element) if kind.has_zeros else None
                for part in parts:
                    index = at(I64(part), group, len(parts))
                    scale = numbers(scales, index, LANES)
                    for total, some, offset, factor in zip(
                        totals, own, offsets, x_scales, strict=True
                    ):
                        result = sums.end(some[part], offset)
                        vector.add_product(total[part], result, build.fmul(scale, factor))
                    if kind.has_zeros:
                        zero = numbers(zeros, index, LANES)
                        for total, x_sum in zip(totals, x_sums, strict=True):
                            vector.add_product(total[part], zero, x_sum)
        for each, some in zip(tokens, totals, strict=True):
            place = at(out, build.add(build.mul(each, n_rows), row), 2 if kind.is_half else 4)
            for part, total in enumerate(some):
                result = build.load(total)
                result = vector.rounded(result, LANES) if kind.is_half else result
                vector.store(result, place, I64(part))
        return context.get_dummy_value()

    return write


class _Fields(Vectors):
    """Makes instructions for codes that are widened."""

    def field(self, words, bits, number, sign):
        """Return one of the codes in each word, of which the sign is another, in float32."""
        build = self.build
        left, right, signs = (
            self.constant(I32, [n] * LANES) for n in (32 - bits * (number + 1), 32 - bits, sign)
        )
        codes = build.ashr(build.xor(build.shl(words, left), signs), right)
        return build.sitofp(codes, ir.VectorType(F32, LANES))


class _Sums(Vectors):
    """Makes instructions for sums of codes times inputs, of four neighbours in a lane."""

    def __init__(self, build, is_int4):
        super().__init__(build)
        self.is_int4 = is_int4
        self.bytes = ir.VectorType(I8, 4 * LANES)

    def codes(self, words):
        """Return the codes that words hold: of even inputs and of odd ones, or all."""
        if not self.is_int4:
            return [words]
        upper = self.build.lshr(words, self.constant(I32, [4] * LANES))
        mask = self.constant(I32, [0x0F0F0F0F] * LANES)
        return [self.build.and_(part, mask) for part in (words, upper)]

    def begin(self, offsets):
        if HAS_VNNI:
            return offsets
        return (
            self.constant(I16, [0] * 2 * LANES) if self.is_int4 else self.constant(I32, [0] * LANES)
        )

    def add(self, sums, codes, x):
        """Add to sums. With AVX2 those of codes of four bits have 16, enough for a block's."""
        if HAS_VNNI or not self.is_int4:
            return self.add_fours(sums, codes, x)
        codes, x = (self.build.bitcast(some, self.bytes) for some in (codes, x))
        return self.build.add(sums, self.pairs(codes, x))

    def end(self, sums, offsets):
        """Return sums in float32."""
        if self.is_int4 and not HAS_VNNI:
            sums = self.build.add(self.fours(sums), offsets)
        return self.build.sitofp(sums, ir.VectorType(F32, LANES))
