"""The code that ``compiled.Compiled`` has numba compile."""

# mypy: ignore-errors

import ctypes
import functools

import numba
from llvmlite import ir
from numba.core.cgutils import alloca_once_value, for_range, get_or_insert_function, unpack_tuple
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from llama.layers.kernels.compiled import BLOCK, openmp

I8, I16, I32, I64, F32 = *(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType()
INTEGER, FLOAT, ZERO = numba.types.int64, numba.float32, numba.float32(0)


ROUND_INPUTS = "void(f4[:, ::1], i1[:, ::1], f4[:, ::1], i4[:, ::1], f4[:, ::1], b1)"


@numba.njit(ROUND_INPUTS)  # compiled while a model is loaded, not by its first token
def round_inputs(x, codes, scales, offsets, sums, is_int4):
    """Round inputs to eight bits.

    Args:
        x: float32, (n_tokens, n_inputs).
        codes: int8, the shape of ``x``. For int4 a block's even inputs lie before its odd ones, as
            the lower bits of its bytes and the upper ones.
        scales: float32, (n_tokens, n_blocks).
        offsets: int32, (n_tokens, 8 * n_blocks): of int4's codes, which are 8 above their values,
            what each of a block's eight sums has too much.
        sums: float32, (n_tokens, n_groups): of inputs, which zeros are multiplied by.
        is_int4: whether the weight has codes of four bits.
    """
    size = x.shape[1] // sums.shape[1]
    sums[:] = offsets[:] = 0
    for token in range(x.shape[0]):
        for first in range(0, x.shape[1], BLOCK):
            largest, total = ZERO, ZERO
            for i in range(first, first + BLOCK):
                largest = max(largest, abs(x[token, i]))
                total += x[token, i] * ZERO  # not a number, if one of them isn't
                sums[token, i // size] += x[token, i]
            inverse = FLOAT(127) / largest if largest > 0 else ZERO
            scales[token, first // BLOCK] = largest / FLOAT(127) + total
            for i in range(BLOCK):
                place = first + ((i >> 1) + ((i & 1) << 4) if is_int4 else i)
                codes[token, place] = round(x[token, first + i] * inverse)
                offsets[token, place // 4] -= 8 * codes[token, place] if is_int4 else 0


@functools.cache
def compiled(is_int4: bool, in_halves: bool, zero_lanes: int) -> int:
    """Return the address of a function that computes one thread's outputs.

    Its argument points to the addresses and sizes that ``Compiled.product`` lists.

    Args:
        is_int4: whether a byte holds two codes of four bits.
        in_halves: whether groups are of 16 inputs, two in a block.
        zero_lanes: how many zeros are multiplied at once, which divides the groups; 0 without.
    """
    one, four = (_dot(is_int4, in_halves, zero_lanes, n) for n in (1, 4))
    thread_number, thread_count = openmp().omp_get_thread_num, openmp().omp_get_num_threads
    for function in (thread_number, thread_count):
        function.argtypes, function.restype = [], ctypes.c_int

    @numba.cfunc(numba.void(numba.types.voidptr))
    def rows_of_thread(data):
        given = numba.carray(data, 13, numba.int64)
        addresses, sizes = to_fixed_tuple(given[:8], 8), to_fixed_tuple(given[8:12], 4)
        n_rows, n_tokens, thread, count = given[8], given[12], thread_number(), thread_count()
        for row in range(n_rows * thread // count, n_rows * (thread + 1) // count):
            for token in range(0, n_tokens // 4 * 4, 4):
                four(addresses, sizes, row, token)
            for token in range(n_tokens // 4 * 4, n_tokens):
                one(addresses, sizes, row, token)

    return rows_of_thread.address


def _dot(is_int4: bool, in_halves: bool, zero_lanes: int, n_tokens: int):
    """Return a function that writes a row's product with some tokens, in the vectors of AVX2."""

    @intrinsic
    def dot(typing, addresses, sizes, row, token):
        return numba.void(addresses, sizes, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        addresses, sizes = (unpack_tuple(build, part) for part in args[:2])
        n_rows, n_blocks, shift, n_groups = sizes
        vector = _Vectors(build)

        def place(which, index, count, size):
            return build.add(addresses[which], build.mul(index, build.mul(count, I64(size))))

        weight = place(0, args[2], n_blocks, BLOCK // 2 if is_int4 else BLOCK)
        scale, zero = (place(which, args[2], n_groups, 2) for which in (1, 2))
        tokens = [build.add(args[3], I64(i)) for i in range(n_tokens)]
        totals = [alloca_once_value(build, vector.constant(F32, [0.0] * 8)) for _ in tokens]
        with for_range(build, n_blocks) as loop:
            block = loop.index
            w = vector.load(weight, block, I8, 16 if is_int4 else 32)
            if is_int4:
                high = build.lshr(w, vector.constant(I8, [4] * 16))
                low = build.and_(w, vector.constant(I8, [15] * 16))
                factor = build.shuffle_vector(low, high, vector.constant(I32, range(32)))
            else:  # without its sign, which the inputs are given
                factor = vector.call("x86.avx2.psign.b", w.type, w, w)
            lanes = ([0, 0, 1, 1] * 2 if is_int4 else [0] * 4 + [1] * 4) if in_halves else [0] * 8
            group = block if in_halves else build.lshr(block, shift)
            own = vector.spread(vector.bfloat16(scale, group, 1 + in_halves), lanes)
            for token, total in zip(tokens, totals, strict=True):
                x = vector.load(place(3, token, n_blocks, 32), block, I8, 32)
                if not is_int4:
                    x = vector.call("x86.avx2.psign.b", x.type, x, w)
                pairs = vector.call("x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), factor, x)
                ones, eight = vector.constant(I16, [1] * 16), ir.VectorType(I32, 8)
                fours = vector.call("x86.avx2.pmadd.wd", eight, pairs, ones)
                offsets = vector.load(place(5, token, n_blocks, 32), block, I32, 8)
                fours = build.sitofp(build.add(fours, offsets) if is_int4 else fours, own.type)
                scales = vector.load(place(4, token, n_blocks, 4), block, F32, 1)
                vector.add_product(total, fours, build.fmul(own, vector.spread(scales, [0] * 8)))
        for token, total in zip(tokens, totals, strict=True):
            result = vector.sum(total)
            if zero_lanes:
                total = alloca_once_value(build, vector.constant(F32, [0.0] * zero_lanes))
                with for_range(build, build.sdiv(n_groups, I64(zero_lanes))) as loop:
                    sums = vector.load(place(6, token, n_groups, 4), loop.index, F32, zero_lanes)
                    zeros = vector.bfloat16(zero, loop.index, zero_lanes)
                    vector.add_product(total, zeros, sums)
                result = build.fadd(result, vector.sum(total))
            out = build.add(place(7, token, n_rows, 4), build.mul(args[2], I64(4)))
            build.store(result, build.inttoptr(out, F32.as_pointer()))
        return context.get_dummy_value()

    return dot


class _Vectors:
    """Makes instructions of vectors."""

    def __init__(self, build):
        self.build = build

    def constant(self, kind, values):
        values = [kind(value) for value in values]
        return ir.Constant(ir.VectorType(kind, len(values)), values)

    def load(self, address, index, kind, n):
        """Load the vector of ``n`` elements at an index."""
        size = 4 if kind is F32 else kind.width // 8
        place = self.build.add(address, self.build.mul(index, I64(n * size)))
        pointer = self.build.inttoptr(place, ir.VectorType(kind, n).as_pointer())
        return self.build.load(pointer, align=size)

    def bfloat16(self, address, index, n):
        """Load bfloat16 as float32, whose upper half it is."""
        wide = self.build.zext(self.load(address, index, I16, n), ir.VectorType(I32, n))
        wide = self.build.shl(wide, self.constant(I32, [16] * n))
        return self.build.bitcast(wide, ir.VectorType(F32, n))

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
