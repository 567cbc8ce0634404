"""The code that ``tiles.Tiles`` has numba compile."""

# mypy: ignore-errors

import functools
from typing import NamedTuple

import numba
from llvmlite import binding, ir
from numba.core.cgutils import alloca_once, alloca_once_value, for_range, unpack_tuple
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from llama.layers.kernels.compiled import HAS_BF16, HAS_VNNI, LANES, ROWS, SPAN, TOKENS
from llama.layers.kernels.numba_code import (
    AHEAD,
    F32,
    FAR,
    I8,
    I32,
    I64,
    INTEGER,
    Vectors,
    part_of_thread,
    thread_number,
)

MOST = 6  # tokens that are multiplied at once
WORDS = 512  # of an output in bfloat16, which are in the cache in further passes


class Kind(NamedTuple):
    """What code is compiled for."""

    width: int  # outputs of a tile
    is_int8: bool  # whether weights have eight bits; else they are bfloat16, as inputs then are
    is_half: bool  # whether outputs are written in bfloat16, not in float32
    has_amx: bool  # whether AMX multiplies


def product(*kind):
    """Return a function that computes a thread's part of the outputs, of tiles of a ``Kind``.

    Its argument points to the addresses of tiles, of inputs, (n_tokens, n_inputs), and of what is
    written, sums of 32 bits and outputs, (n_tokens, n_tiles * width), to the numbers of tiles,
    inputs and tokens, and to the address of AMX's configuration. Inputs are bfloat16, float32
    where no instruction multiplies that. For eight bits they are codes
    (``numba_rounding.round_tokens``), and three more addresses follow: of the scales of tokens, of
    those of outputs, and of what is added to the sums of an output, int32, with AMX, otherwise to
    those of a token. With AMX there are as many sums as outputs; otherwise each thread has those of
    a tile and at most ``TOKENS``.
    """
    kind = Kind(*kind)
    return (_by_matrices if kind.has_amx else _by_vectors)(kind, _finish(kind))


def _finish(kind: Kind):
    """Return a function that writes a tile's outputs, given where sums are and their pitch."""
    width, is_int8, is_half, has_amx = kind
    n_bytes = 2 if is_half else 4

    @intrinsic
    def write(typing, sums, out, of_token, of_outputs, added):
        return numba.void(*[INTEGER] * 5), generate

    def generate(context, build, signature, args):
        sums, out, of_token, of_outputs, added = args
        vector = Vectors(build)
        for i in (I64(i) for i in range(width // LANES)):
            result = vector.load(sums, i, I32 if is_int8 and has_amx else F32, LANES)
            if is_int8 and has_amx:
                result = build.add(result, vector.load(added, i, I32, LANES))
                result = build.sitofp(result, ir.VectorType(F32, LANES))
                factor = vector.spread(vector.load(of_token, I64(0), F32, 1), [0] * LANES)
                result = build.fmul(result, factor)
            if is_int8:
                result = build.fmul(result, vector.load(of_outputs, i, F32, LANES))
            vector.store(vector.rounded(result, LANES) if is_half else result, out, i)
        return context.get_dummy_value()

    @numba.njit
    def finish(given, sums, pitch, first, begin, end):
        for token in range(begin, end):
            own = sums + (token - begin) * pitch
            place = given[3] + (token * given[4] * width + first) * n_bytes
            if is_int8:
                write(own, place, given[8] + 4 * token, given[9] + 4 * first, given[10] + 4 * first)
            else:
                write(own, place, 0, 0, 0)

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
        pitch = given[4] * width * 4  # bytes of a token's sums
        for tile in range(*part_of_thread(given[4])):
            for token in range(0, n_tokens, ROWS):
                multiply(places, tile, max(min(token, n_tokens - ROWS), 0))
            finish(given, given[2] + 4 * tile * width, pitch, tile * width, 0, n_tokens)
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
    """Multiply ``MOST`` tokens in a pass by some words, which later passes read from the cache.

    Each pass prefetches its part of the next words, so that reading and multiplying overlap.
    """
    width, is_int8, multiply = kind.width, kind.is_int8, _vectors(kind)
    pitch = 4 * width  # bytes of a word of each output
    n_of_word = 4 if is_int8 else 2  # inputs
    most = SPAN // n_of_word if is_int8 else WORDS
    x_bytes = 4 * n_of_word if _is_widened(kind) else 4
    n_near = (1 if _is_widened(kind) else 3) if HAS_VNNI else 0  # tokens that only wait for memory

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = numba.carray(data, 11, numba.int64)
        n_words, n_tokens = given[5] // n_of_word, given[6]
        n_spans = -(-n_words // most)
        sums = given[2] + thread_number() * min(n_tokens, TOKENS) * pitch
        n_blocks = -(-n_tokens // TOKENS)
        for block in range(n_blocks):
            begin, end = n_tokens * block // n_blocks, n_tokens * (block + 1) // n_blocks
            n_passes = -(-(end - begin) // MOST)
            line = pitch // n_passes
            for tile in range(*part_of_thread(given[4])):
                for span in range(n_spans):
                    first = span * most
                    n, place = min(n_words - first, most), (tile * n_words + first) * pitch
                    place += given[0]
                    for i in range(n_passes):
                        token = (end - begin) * i // n_passes
                        n_own = (end - begin) * (i + 1) // n_passes - token
                        ahead = n * (pitch + i * line)
                        if n_passes == 1:
                            ahead = AHEAD if n_own <= n_near else FAR
                        x = given[1] + ((begin + token) * n_words + first) * x_bytes
                        number = 4 * ((begin + token) * n_spans + span)
                        of_tokens = (given[8] + number, given[10] + number) if is_int8 else (0, 0)
                        places = (place, x, sums + token * pitch, place + ahead, *of_tokens)
                        multiply(places, (n_own, n, n_words * x_bytes, line, 4 * n_spans), span)
                finish(given, sums, pitch, tile * width, begin, end)

    return tiles_of_thread


def _is_widened(kind: Kind):
    return not kind.is_int8 and not HAS_BF16


def _vectors(kind: Kind):
    """Return a function that adds some words' products with up to ``MOST`` tokens to their sums.

    Its arguments are the addresses of words, of inputs, of sums, of what is fetched and, of eight
    bits, of the tokens' scales and offsets; how many tokens and words there are, the bytes of a
    token's inputs, those that are fetched for each word, and those of a token's scales; and 0 if
    the sums aren't begun yet.
    """
    vectors, every = range(kind.width // LANES), [0] * LANES

    @intrinsic
    def write(typing, places, sizes, first):
        return numba.void(places, sizes, INTEGER), generate

    def generate(context, build, signature, args):
        sizes = unpack_tuple(build, args[1])
        for n_tokens in range(1, MOST + 1):
            with build.if_then(build.icmp_signed("==", sizes[0], I64(n_tokens))):
                multiply(build, n_tokens, unpack_tuple(build, args[0]), sizes[1:], args[2])
        return context.get_dummy_value()

    def multiply(build, n_tokens, places, sizes, first):
        (tiles, x, out, fetched, *of_tokens), (n_words, pitch, line, of_token) = places, sizes
        vector = _Products(build)

        def at(address, index, n_bytes):
            n_bytes = I64(n_bytes) if isinstance(n_bytes, int) else n_bytes
            return build.add(address, build.mul(index, n_bytes))

        tokens = [I64(i) for i in range(n_tokens)]
        inputs = [at(x, token, pitch) for token in tokens]
        outputs = [at(out, token, 4 * kind.width) for token in tokens]
        nothing, is_first = vector.constant(F32, every), build.icmp_signed("==", first, I64(0))
        begun = [
            [
                build.select(is_first, nothing, vector.load(place, I64(i), F32, LANES))
                for i in vectors
            ]
            for place in outputs
        ]
        if kind.is_int8:
            scales, offsets = (
                [
                    vector.spread(vector.load(at(place, token, of_token), I64(0), kind_, 1), every)
                    for token in tokens
                ]
                for place, kind_ in zip(of_tokens, (F32, I32), strict=True)
            )
            none = vector.constant(I32, every)
            firsts = [[offset if HAS_VNNI else none for _ in vectors] for offset in offsets]
        else:
            firsts = begun
        sums = [[alloca_once_value(build, some) for some in own] for own in firsts]
        with for_range(build, n_words) as loop:
            place = at(tiles, loop.index, 4 * kind.width)
            words = [vector.load(place, I64(i), I32, LANES) for i in vectors]
            ahead = at(fetched, loop.index, line)
            for i in vectors:
                vector.prefetch(
                    build.add(ahead, build.udiv(build.mul(line, I64(i)), I64(len(vectors))))
                )
            for own, start in zip(sums, inputs, strict=True):
                for weights, some in vector.factors(kind, words, start, loop.index):
                    for total, weight in zip(own, weights, strict=True):
                        vector.add(kind, total, weight, some)
        for token, place in enumerate(outputs):
            for i, total in enumerate(sums[token]):
                result = build.load(total)
                if kind.is_int8:
                    result = build.sitofp(result, nothing.type)
                    factors = (result, scales[token], begun[token][i])
                    result = vector.call(f"fma.v{LANES}f32", nothing.type, *factors)
                vector.store(result, place, I64(i))

    return write


class _Products(Vectors):
    """Makes instructions for sums of products, of inputs that a word of 32 bits holds."""

    def factors(self, kind: Kind, words, x, index):
        """Return pairs of words and a token's inputs at an index, in each lane."""

        def spread(index, element):
            return self.spread(self.load(x, index, element, 1), [0] * LANES)

        if not _is_widened(kind):
            return [(words, spread(index, I32))]
        shift, mask = (self.constant(I32, [n] * LANES) for n in (16, -1 << 16))
        # Bfloat16 is the upper half of float32.
        first = [self.floats(self.build.shl(word, shift)) for word in words]
        second = [self.floats(self.build.and_(word, mask)) for word in words]
        index = self.build.mul(index, I64(2))
        return [
            (first, spread(index, F32)),
            (second, spread(self.build.add(index, I64(1)), F32)),
        ]

    def add(self, kind: Kind, total, weights, x):
        """Add products to a total in memory."""
        if _is_widened(kind):
            self.add_product(total, weights, x)
            return
        before = self.build.load(total)
        if kind.is_int8:
            result = self.add_fours(before, weights, x)
        else:
            # Before LLVM 16 the instruction took words.
            is_typed = binding.llvm_version_info[0] >= 16
            pairs = ir.VectorType(_Bfloat16(), 2 * LANES) if is_typed else x.type
            factors = (self.build.bitcast(some, pairs) for some in (x, weights))
            result = self.call("x86.avx512bf16.dpbf16ps.512", before.type, before, *factors)
        self.build.store(result, total)


class _Bfloat16(ir.types.Type):
    """LLVM's type, which llvmlite lacks."""

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _Bfloat16)

    def __hash__(self):
        return hash(_Bfloat16)
