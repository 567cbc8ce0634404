"""The code that ``compiled.Compiled`` has numba compile."""

# mypy: ignore-errors

import ctypes
import functools

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from llama.layers.kernels.compiled import BLOCK, openmp

I8, I16, I32, I64, F32 = *(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType()


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
    for token in range(x.shape[0]):
        for first in range(0, x.shape[1], BLOCK):
            largest, total = numba.float32(0), numba.float32(0)
            for i in range(first, first + BLOCK):
                largest = max(largest, abs(x[token, i]))
                total += x[token, i] * numba.float32(0)  # not a number, if one of them isn't
            inverse = numba.float32(127) / largest if largest > 0 else numba.float32(0)
            scales[token, first // BLOCK] = largest / numba.float32(127) + total
            for i in range(BLOCK):
                place = (i >> 1) + ((i & 1) << 4) if is_int4 else i
                codes[token, first + place] = round(x[token, first + i] * inverse)
            for lane in range(first // 4, first // 4 + 8):
                four = numba.int32(0)
                for i in range(4 * lane, 4 * lane + 4):
                    four += codes[token, i]
                offsets[token, lane] = -8 * four if is_int4 else 0
        for group in range(sums.shape[1]):
            total = numba.float32(0)
            for i in range(group * size, (group + 1) * size):
                total += x[token, i]
            sums[token, group] = total


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
    block_bytes = BLOCK // 2 if is_int4 else BLOCK
    # The system may give fewer threads than were asked for.
    thread_number, team_size = openmp().omp_get_thread_num, openmp().omp_get_num_threads
    for function in (thread_number, team_size):
        function.argtypes, function.restype = [], ctypes.c_int

    @numba.cfunc(numba.void(numba.types.voidptr))
    def rows_of_thread(data):
        given = numba.carray(data, 13, numba.int64)
        weight, scale, zero, codes, scales, offsets, sums, out = given[:8]
        n_rows, n_tokens, n_blocks, shift, n_groups = given[8:]
        thread, n_threads = thread_number(), team_size()
        for row in range(n_rows * thread // n_threads, n_rows * (thread + 1) // n_threads):
            group = 2 * row * n_groups
            of_row = weight + row * n_blocks * block_bytes, scale + group, zero + group
            sizes = n_blocks, n_groups, shift, n_rows
            for i in range(0, n_tokens - n_tokens % 4, 4):
                of_tokens = (
                    codes + i * n_blocks * BLOCK,
                    scales + i * n_blocks * 4,
                    offsets + i * n_blocks * BLOCK,
                    sums + i * n_groups * 4,
                    out + 4 * (i * n_rows + row),
                )
                four(of_row, of_tokens, sizes)
            for i in range(n_tokens - n_tokens % 4, n_tokens):
                of_tokens = (
                    codes + i * n_blocks * BLOCK,
                    scales + i * n_blocks * 4,
                    offsets + i * n_blocks * BLOCK,
                    sums + i * n_groups * 4,
                    out + 4 * (i * n_rows + row),
                )
                one(of_row, of_tokens, sizes)

    return rows_of_thread.address


def _dot(is_int4: bool, in_halves: bool, zero_lanes: int, n_tokens: int):
    """Return a function that writes one output of some tokens, in the vectors of AVX2."""

    @intrinsic
    def dot(typing, of_row, of_tokens, sizes):
        tuples = (numba.types.UniTuple(numba.types.int64, n) for n in (3, 5, 4))
        return numba.void(*tuples), generate

    def generate(context, build, signature, args):
        of_row, of_tokens, sizes = (cgutils.unpack_tuple(build, part) for part in args)
        weight, scale, zero = of_row
        n_blocks, n_groups, shift, n_rows = sizes
        # For each token its codes, scales, offsets, sums and output.
        steps = [build.mul(n_blocks, I64(BLOCK)), build.mul(n_blocks, I64(4))]
        steps += [steps[0], build.mul(n_groups, I64(4)), build.mul(n_rows, I64(4))]
        tokens = [of_tokens]
        for _ in range(n_tokens - 1):
            places = zip(tokens[-1], steps, strict=True)
            tokens.append([build.add(place, step) for place, step in places])
        vector = _Vectors(build)
        totals = [cgutils.alloca_once_value(build, vector.zeros(8)) for _ in tokens]
        with cgutils.for_range(build, n_blocks) as loop:
            block = loop.index
            w, signed = _codes(vector, weight, block, is_int4)
            if in_halves:
                lanes = [0, 0, 1, 1] * 2 if is_int4 else [0] * 4 + [1] * 4
                own = vector.bfloat16(scale, block, 2)
            else:
                lanes = [0] * 8
                own = vector.bfloat16(scale, build.lshr(block, shift), 1)
            own = vector.spread(own, lanes)
            for (codes, scales, offsets, _, _), total in zip(tokens, totals, strict=True):
                x = vector.load(codes, block, I8, 32)
                if not is_int4:
                    x = vector.call("x86.avx2.psign.b", x.type, x, signed)
                pairs = vector.call("x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), w, x)
                ones, eight = vector.full(I16, 1, 16), ir.VectorType(I32, 8)
                fours = vector.call("x86.avx2.pmadd.wd", eight, pairs, ones)
                if is_int4:
                    fours = build.add(fours, vector.load(offsets, block, I32, 8))
                both = build.fmul(own, vector.spread(vector.load(scales, block, F32, 1), [0] * 8))
                vector.add_product(total, build.sitofp(fours, own.type), both)
        results = [vector.sum(total) for total in totals]
        if zero_lanes:
            totals = [cgutils.alloca_once_value(build, vector.zeros(zero_lanes)) for _ in tokens]
            with cgutils.for_range(build, build.sdiv(n_groups, I64(zero_lanes))) as loop:
                some = vector.bfloat16(zero, loop.index, zero_lanes)
                for (_, _, _, sums, _), total in zip(tokens, totals, strict=True):
                    of_groups = vector.load(sums, loop.index, F32, zero_lanes)
                    vector.add_product(total, some, of_groups)
            more = [vector.sum(total) for total in totals]
            results = [build.fadd(*both) for both in zip(results, more, strict=True)]
        for token, result in zip(tokens, results, strict=True):
            build.store(result, build.inttoptr(token[4], F32.as_pointer()))
        return context.get_dummy_value()

    return dot


def _codes(vector, weight, block, is_int4):
    """Return a block's codes without a sign, and with it if they have one."""
    build = vector.build
    if is_int4:
        packed = vector.load(weight, block, I8, 16)
        low = build.and_(packed, vector.full(I8, 15, 16))
        high = build.lshr(packed, vector.full(I8, 4, 16))
        return build.shuffle_vector(low, high, vector.constant(I32, range(32))), None
    signed = vector.load(weight, block, I8, 32)
    is_negative = build.icmp_signed("<", signed, vector.full(I8, 0, 32))
    return build.select(is_negative, build.neg(signed), signed), signed


class _Vectors:
    """Makes instructions of vectors."""

    def __init__(self, build):
        self.build = build

    def constant(self, kind, values):
        values = [kind(value) for value in values]
        return ir.Constant(ir.VectorType(kind, len(values)), values)

    def full(self, kind, value, n):
        return self.constant(kind, [value] * n)

    def zeros(self, n):
        return self.full(F32, 0.0, n)

    def load(self, address, index, kind, n):
        """Load the vector of ``n`` elements at an index."""
        size = 4 if kind is F32 else kind.width // 8
        place = self.build.add(address, self.build.mul(index, I64(n * size)))
        pointer = self.build.inttoptr(place, ir.VectorType(kind, n).as_pointer())
        return self.build.load(pointer, align=size)

    def bfloat16(self, address, index, n):
        """Load bfloat16 as float32, whose upper half it is."""
        wide = self.build.zext(self.load(address, index, I16, n), ir.VectorType(I32, n))
        wide = self.build.shl(wide, self.full(I32, 16, n))
        return self.build.bitcast(wide, ir.VectorType(F32, n))

    def spread(self, some, lanes):
        """Return the elements of a vector at some places."""
        return self.build.shuffle_vector(some, some, self.constant(I32, lanes))

    def sum(self, total):
        lanes = self.build.load(total)
        result = F32(0.0)
        for i in range(lanes.type.count):
            result = self.build.fadd(result, self.build.extract_element(lanes, I32(i)))
        return result

    def call(self, name, result, *args):
        kind = ir.FunctionType(result, [arg.type for arg in args])
        module = self.build.module
        function = cgutils.get_or_insert_function(module, kind, f"llvm.{name}")
        return self.build.call(function, args)

    def add_product(self, total, first, second):
        name = f"fma.v{first.type.count}f32"
        added = self.call(name, first.type, first, second, self.build.load(total))
        self.build.store(added, total)
