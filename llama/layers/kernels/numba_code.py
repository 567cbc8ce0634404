"""The code that numba compiles for weights as they are stored, and what all such code needs."""

# mypy: ignore-errors

import functools
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import alloca_once_value, for_range, get_or_insert_function, unpack_tuple
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from llama.layers.kernels.compiled import BLOCK, HAS_VNNI
from llama.layers.kernels.machine_code import add_symbols

AHEAD = 2048  # bytes of a weight that are fetched before they are read
I8, I16, I32, I64, F32 = *(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType()
INTEGER, FLOAT, ZERO = numba.types.int64, numba.float32, numba.float32(0)

add_symbols()
thread_number, _thread_count = (
    numba.types.ExternalFunction(f"llama_thread_{name}", numba.int32())
    for name in ("number", "count")
)


class Kind(NamedTuple):
    """What code is compiled for."""

    is_int4: bool  # whether a byte holds two codes of four bits
    in_halves: bool  # whether groups are of 16 inputs, two in a block
    shift: int  # 2 ** shift blocks, or halves of one, are a group
    has_zeros: bool
    lanes: int  # blocks that are scaled at once, which divides a row's


def compiled_once(*fastmath):
    """Return a decorator of a function of a pointer, which makes a call return it compiled."""

    def decorate(function):
        kind = numba.void(numba.types.voidptr)
        return functools.cache(
            lambda: numba.cfunc(kind, fastmath=set(fastmath), error_model="numpy")(function)
        )

    return decorate


@intrinsic
def pointer(typing, address):
    """Return an address as a pointer, of which ``carray`` makes an array."""

    def generate(context, build, signature, args):
        return build.inttoptr(args[0], I8.as_pointer())

    return numba.types.voidptr(INTEGER), generate


@intrinsic
def bfloat16(typing, bits):
    """Return bfloat16's bits as float32, whose upper half they are."""

    def generate(context, build, signature, args):
        return build.bitcast(build.shl(build.zext(args[0], I32), I32(16)), F32)

    return FLOAT(numba.uint16), generate


@numba.njit
def part_of_thread(n_rows):
    """Return the first row of a thread's part and the first behind it."""
    thread, count = thread_number(), _thread_count()
    return n_rows * thread // count, n_rows * (thread + 1) // count


@compiled_once("reassoc", "nsz")
def round_inputs(data):
    """Round a thread's part of the tokens' inputs to eight bits, in blocks of 32.

    ``data`` points to the addresses of inputs, float32, (n_tokens, n_inputs), and of what is
    written, then to the numbers of tokens and blocks, to how many groups a block has at least, one
    or two, and to whether the weight has codes of four bits:

    - codes, int8, the shape of the inputs. For int4 a block's even inputs lie before its odd ones,
      as the lower bits of its bytes and the upper ones.
    - scales, float32, (n_tokens, n_blocks).
    - offsets, float32, (n_tokens, groups): of codes that are multiplied without signs, 8 above
      their values or 128, what a group's scale is multiplied by too much.
    - sums of inputs, float32, (n_tokens, groups), which zeros are multiplied by.
    """
    places, sizes = numba.carray(data, 9, numba.int64)[:5], numba.carray(data, 9, numba.int64)[5:]
    n_tokens, n_blocks, halves, is_int4 = sizes[0], sizes[1], sizes[2], sizes[3] != 0
    x = numba.carray(pointer(places[0]), (n_tokens, n_blocks, BLOCK), numba.float32)
    codes = numba.carray(pointer(places[1]), (n_tokens, n_blocks, BLOCK), numba.int8)
    scales = numba.carray(pointer(places[2]), (n_tokens, n_blocks), numba.float32)
    offsets = numba.carray(pointer(places[3]), (n_tokens, n_blocks, halves), numba.float32)
    sums = numba.carray(pointer(places[4]), (n_tokens, n_blocks, halves), numba.float32)
    size, above = BLOCK // halves, FLOAT(8) if is_int4 else FLOAT(128)
    for token in range(*part_of_thread(n_tokens)):
        for block in range(n_blocks):
            some, own = x[token, block], codes[token, block]
            largest, total = ZERO, ZERO
            for i in range(BLOCK):
                largest = max(largest, abs(some[i]))
            for i in range(BLOCK):
                total += some[i] * ZERO  # not a number, if one of them isn't
            inverse = FLOAT(127) / largest if largest > 0 else ZERO
            scale = largest / FLOAT(127) + total
            scales[token, block] = scale
            for half in range(halves):
                total, count = ZERO, ZERO
                for i in range(half * size, half * size + size):
                    total += some[i]
                    count += np.rint(some[i] * inverse)
                sums[token, block, half] = total
                offsets[token, block, half] = -above * count * scale
            if is_int4:
                for i in range(BLOCK // 2):
                    own[i] = np.rint(some[2 * i] * inverse)
                    own[BLOCK // 2 + i] = np.rint(some[2 * i + 1] * inverse)
            else:
                for i in range(BLOCK):
                    own[i] = np.rint(some[i] * inverse)


@intrinsic
def rounded(typing, value):
    """Return the bits of bfloat16 that float32 is rounded to, to even halfway.

    A NaN stays one if its lower half is zero, as of those that come from bfloat16.
    """

    def generate(context, build, signature, args):
        bits = build.bitcast(args[0], I32)
        odd = build.and_(build.lshr(bits, I32(16)), I32(1))
        bits = build.add(bits, build.add(odd, I32(0x7FFF)))
        return build.trunc(build.lshr(bits, I32(16)), I16)

    return numba.uint16(FLOAT), generate


@numba.njit
def _same(value):
    return value


def widen(is_half):
    """Return a function that writes a thread's part of some rows' weights.

    Its argument points to the addresses of codes, scales, zeros and weights, bfloat16 or float32,
    then to the numbers of rows, groups and inputs of a group, to whether codes have four bits, and
    whether zeros count.
    """
    kind, written = (numba.uint16, rounded) if is_half else (FLOAT, _same)

    @numba.cfunc(numba.void(numba.types.voidptr))
    def rows_of_thread(data):
        given = numba.carray(data, 9, numba.int64)
        n_rows, n_groups, size, is_int4 = given[4], given[5], given[6], given[7]
        has_zeros, width = given[8], size // 2 if is_int4 else size
        codes = numba.carray(pointer(given[0]), (n_rows, n_groups, width), numba.uint8)
        scales = numba.carray(pointer(given[1]), (n_rows, n_groups), numba.uint16)
        zeros = numba.carray(pointer(given[2]), (n_rows, n_groups), numba.uint16)
        out = numba.carray(pointer(given[3]), (n_rows, n_groups, size), kind)
        for row in range(*part_of_thread(n_rows)):
            for group in range(n_groups):
                scale = bfloat16(scales[row, group])
                zero = bfloat16(zeros[row, group]) if has_zeros else ZERO
                some, own = codes[row, group], out[row, group]
                if is_int4:
                    for i in range(width):
                        low, high = numba.int32(some[i] & 15) - 8, numba.int32(some[i] >> 4) - 8
                        own[2 * i] = written(FLOAT(low) * scale + zero)
                        own[2 * i + 1] = written(FLOAT(high) * scale + zero)
                else:
                    for i in range(width):
                        own[i] = written(FLOAT(numba.int8(some[i])) * scale + zero)

    return rows_of_thread


@compiled_once("reassoc", "nsz", "contract")
def bfloat16_product(data):
    """Write a thread's part of the products with a plain weight.

    ``data`` points to the addresses of the weight, bfloat16, (n_rows, n_inputs), of inputs and of
    outputs, float32, (n_tokens, …), then to the numbers of rows, inputs and tokens.
    """
    given = numba.carray(data, 6, numba.int64)
    n_rows, n_inputs, n_tokens = given[3], given[4], given[5]
    weight = numba.carray(pointer(given[0]), (n_rows, n_inputs), numba.uint16)
    x = numba.carray(pointer(given[1]), (n_tokens, n_inputs), numba.float32)
    out = numba.carray(pointer(given[2]), (n_tokens, n_rows), numba.float32)
    for row in range(*part_of_thread(n_rows)):
        own, fours = weight[row], n_tokens // 4 * 4
        for token in range(0, fours, 4):
            first, second, third, fourth = ZERO, ZERO, ZERO, ZERO
            for i in range(n_inputs):
                value = bfloat16(own[i])
                first += value * x[token, i]
                second += value * x[token + 1, i]
                third += value * x[token + 2, i]
                fourth += value * x[token + 3, i]
            out[token, row], out[token + 1, row] = first, second
            out[token + 2, row], out[token + 3, row] = third, fourth
        for token in range(fours, n_tokens):
            total = ZERO
            for i in range(n_inputs):
                total += bfloat16(own[i]) * x[token, i]
            out[token, row] = total


def product(*kind):
    """Return a function that computes a thread's part of the outputs, of weights of a ``Kind``.

    Its argument points to the addresses of codes, scales and zeros of weights, then of inputs
    (``round_inputs``) and of outputs, float32, (n_tokens, n_rows), then to the numbers of rows,
    blocks, groups and tokens.
    """
    one, four, eight = (_dot(Kind(*kind), n) for n in (1, 4, 8))

    @numba.cfunc(numba.void(numba.types.voidptr))
    def rows_of_thread(data):
        given = numba.carray(data, 12, numba.int64)
        addresses, sizes = to_fixed_tuple(given[:8], 8), to_fixed_tuple(given[8:11], 3)
        n_tokens = given[11]
        for row in range(*part_of_thread(given[8])):
            for token in range(0, n_tokens // 8 * 8, 8):
                eight(addresses, sizes, row, token)
            for token in range(n_tokens // 8 * 8, n_tokens // 4 * 4, 4):
                four(addresses, sizes, row, token)
            for token in range(n_tokens // 4 * 4, n_tokens):
                one(addresses, sizes, row, token)

    return rows_of_thread


def _dot(kind: Kind, n_tokens: int):
    """Return a function that writes a row's product with some tokens, in the vectors of AVX2."""
    # Elements of a step: blocks, scales in these, and scales that lie there.
    lanes, halves = kind.lanes, 1 + kind.in_halves
    n_scales = lanes * halves if kind.in_halves else max(1, lanes >> kind.shift)
    repeats = lanes * halves // n_scales
    # Blocks in a vector: with VNNI's instructions 512 bits, else 256.
    n = 2 if HAS_VNNI and lanes % 2 == 0 else 1
    bytes_ = BLOCK // 2 if kind.is_int4 else BLOCK  # of a block
    has_offsets = kind.is_int4 or HAS_VNNI

    @intrinsic
    def dot(typing, addresses, sizes, row, token):
        return numba.void(addresses, sizes, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        addresses, sizes = (unpack_tuple(build, part) for part in args[:2])
        n_rows, n_blocks, n_groups = sizes
        vector = Vectors(build)

        def place(which, index, count, size):
            return build.add(addresses[which], build.mul(index, build.mul(count, I64(size))))

        def affine(address, step):
            first = build.lshr(build.mul(step, I64(lanes * halves)), I64(kind.shift))
            some = vector.bfloat16(build.add(address, build.mul(first, I64(2))), I64(0), n_scales)
            return vector.spread(some, [i // repeats for i in range(lanes * halves)])

        weight = place(0, args[2], n_blocks, bytes_)
        scale, zero = (place(which, args[2], n_groups, 2) for which in (1, 2))
        tokens = [build.add(args[3], I64(i)) for i in range(n_tokens)]
        totals = [vector.zeros(8 * n) for _ in tokens]
        others = [vector.zeros(lanes * halves) for _ in tokens]
        with for_range(build, build.sdiv(n_blocks, I64(lanes))) as loop:
            for ahead in range(AHEAD, AHEAD + lanes * bytes_, 64):
                vector.prefetch(weight, loop.index, lanes * bytes_, ahead)
            own = affine(scale, loop.index)
            scaled = []
            for token, other in zip(tokens, others, strict=True):
                x = vector.load(place(4, token, n_blocks, 4), loop.index, F32, lanes)
                x = vector.spread(x, [i // halves for i in range(lanes * halves)])
                scaled.append(build.fmul(own, x))
                count = build.mul(n_blocks, I64(halves))
                if has_offsets:
                    x = vector.load(place(5, token, count, 4), loop.index, F32, lanes * halves)
                    vector.add_product(other, own, x)
                if kind.has_zeros:
                    x = vector.load(place(6, token, count, 4), loop.index, F32, lanes * halves)
                    vector.add_product(other, affine(zero, loop.index), x)
            for i in range(0, lanes, n):
                index = build.add(build.mul(loop.index, I64(lanes // n)), I64(i // n))
                w = vector.load(weight, index, I8, n * bytes_)
                factor = vector.unsigned(w, kind.is_int4)
                order = [0, 0, 1, 1] * 2 if kind.is_int4 else [0] * 4 + [1] * 4
                order = [
                    halves * (i + j) + (half if kind.in_halves else 0)
                    for j in range(n)
                    for half in order
                ]
                for token, total, product in zip(tokens, totals, scaled, strict=True):
                    x = vector.load(place(3, token, n_blocks, BLOCK), index, I8, n * BLOCK)
                    fours = vector.fours(factor, x, None if kind.is_int4 else w)
                    vector.add_product(total, fours, vector.spread(product, order))
        for token, total, other in zip(tokens, totals, others, strict=True):
            result = build.fadd(vector.sum(total), vector.sum(other))
            out = build.add(place(7, token, n_rows, 4), build.mul(args[2], I64(4)))
            build.store(result, build.inttoptr(out, F32.as_pointer()))
        return context.get_dummy_value()

    return dot


class Vectors:
    """Makes instructions of vectors."""

    def __init__(self, build):
        self.build = build

    def constant(self, kind, values):
        values = [kind(value) for value in values]
        return ir.Constant(ir.VectorType(kind, len(values)), values)

    def zeros(self, n, kind=F32):
        return alloca_once_value(self.build, self.constant(kind, [0] * n))

    def load(self, address, index, kind, n):
        """Load the vector of ``n`` elements at an index."""
        size = 4 if kind is F32 else kind.width // 8
        place = self.build.add(address, self.build.mul(index, I64(n * size)))
        pointer = self.build.inttoptr(place, ir.VectorType(kind, n).as_pointer())
        return self.build.load(pointer, align=size)

    def bfloat16(self, address, index, n):
        """Load bfloat16 as float32, whose upper half it is."""
        wide = self.build.zext(self.load(address, index, I16, n), ir.VectorType(I32, n))
        return self.floats(self.build.shl(wide, self.constant(I32, [16] * n)))

    def floats(self, bits):
        """Return bits as float32."""
        return self.build.bitcast(bits, ir.VectorType(F32, bits.type.count))

    def prefetch(self, address, index, size, ahead):
        """Fetch the line some bytes behind an element to the second cache: more are under way."""
        place = self.build.add(address, self.build.mul(index, I64(size)))
        pointer = self.build.inttoptr(self.build.add(place, I64(ahead)), I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = get_or_insert_function(self.build.module, kind, "llvm.prefetch.p0")
        self.build.call(function, [pointer, I32(0), I32(2), I32(1)])

    def unsigned(self, w, is_int4):
        """Return the codes of some blocks without signs."""
        build, count = self.build, w.type.count
        if not is_int4:  # they are 128 above their values, or without VNNI have lost their signs
            if HAS_VNNI:
                return build.xor(w, self.constant(I8, [128] * count))
            return self.call("x86.avx2.psign.b", w.type, w, w)
        high = build.lshr(w, self.constant(I8, [4] * count))
        low = build.and_(w, self.constant(I8, [15] * count))
        halves = [half + block for block in range(0, count, 16) for half in (0, count)]
        lanes = [half + i for half in halves for i in range(16)]
        return build.shuffle_vector(low, high, self.constant(I32, lanes))

    def fours(self, factor, x, signs):
        """Return the products of unsigned codes and inputs, of which four are added, in float32.

        Without VNNI inputs get the codes' signs.
        """
        build, n_sums = self.build, x.type.count // 4
        kind = ir.VectorType(I32, n_sums)
        if HAS_VNNI:
            some = [build.bitcast(part, kind) for part in (factor, x)]
            zeros = self.constant(I32, [0] * n_sums)
            sums = self.call(f"x86.avx512.vpdpbusd.{32 * n_sums}", kind, zeros, *some)
        else:
            if signs is not None:
                x = self.call("x86.avx2.psign.b", x.type, x, signs)
            pairs = self.call("x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), factor, x)
            sums = self.call("x86.avx2.pmadd.wd", kind, pairs, self.constant(I16, [1] * 16))
        return build.sitofp(sums, ir.VectorType(F32, n_sums))

    def spread(self, some, lanes):
        """Return the elements of a vector at some places."""
        return self.build.shuffle_vector(some, some, self.constant(I32, lanes))

    def sum(self, total):
        lanes = self.build.load(total)
        elements = [self.build.extract_element(lanes, I32(i)) for i in range(lanes.type.count)]
        return functools.reduce(self.build.fadd, elements)

    def call(self, name, result, *args):
        kind = ir.FunctionType(result, [arg.type for arg in args])
        function = get_or_insert_function(self.build.module, kind, f"llvm.{name}")
        return self.build.call(function, args)

    def add_product(self, total, first, second):
        before, kind = self.build.load(total), first.type
        added = self.call(f"fma.v{kind.count}f32", kind, first, second, before)
        self.build.store(added, total)
