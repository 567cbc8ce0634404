"""The code that numba compiles to bring weights into order, and what all code needs."""

# mypy: ignore-errors

import functools

import numba
from llvmlite import ir
from numba.core.cgutils import alloca_once_value, get_or_insert_function
from numba.extending import intrinsic

from llama.layers.kernels.compiled import HAS_VNNI, LANES, TILE
from llama.layers.kernels.machine_code import add_symbols

# Bytes of a weight that are fetched before they are read: by few tokens, which are done as soon as
# these are there, and by those whose products take longer.
AHEAD, FAR = 2048, 16384
I8, I16, I32, I64, F32 = *(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType()
INTEGER, FLOAT, ZERO = numba.types.int64, numba.float32, numba.float32(0)

add_symbols()
thread_number, thread_count = (
    numba.types.ExternalFunction(f"llama_thread_{name}", numba.int32())
    for name in ("number", "count")
)


def compiled(*fastmath):
    """Return a decorator that compiles a function of a pointer."""
    kind = numba.void(numba.types.voidptr)
    return numba.cfunc(kind, fastmath=set(fastmath), error_model="numpy")


def compiled_once(*fastmath):
    """Return a decorator of a function of a pointer, which makes a call return it compiled."""
    return lambda function: functools.cache(lambda: compiled(*fastmath)(function))


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
    thread, count = thread_number(), thread_count()
    return n_rows * thread // count, n_rows * (thread + 1) // count


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


def order(n_bytes):
    """Return a function that brings a thread's part of the rows into the order of tiles, in place.

    Its argument points to the address of rows, of words or of scales with ``n_bytes``, to the
    numbers of tiles and of a row's elements, to what words are combined with, and to the address of
    a tile's memory for each thread.
    """
    kind = {2: numba.uint16, 4: numba.uint32}[n_bytes]

    @numba.cfunc(numba.void(numba.types.voidptr))
    def tiles_of_thread(data):
        given = numba.carray(data, 5, numba.int64)
        n_tiles, width, mask = given[1], given[2], kind(given[3])
        rows = numba.carray(pointer(given[0]), (n_tiles, TILE * width), kind)
        own = given[4] + thread_number() * TILE * width * n_bytes
        copy = numba.carray(pointer(own), (TILE, width), kind)
        for tile in range(*part_of_thread(n_tiles)):
            some = rows[tile]
            for row in range(TILE):
                for i in range(width):
                    copy[row, i] = some[row * width + i] ^ mask
            for i in range(width):
                for row in range(TILE):
                    some[i * TILE + row] = copy[row, i]

    return tiles_of_thread


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

    def store(self, some, address, index):
        """Store a vector at an index."""
        element = some.type.element
        n_bytes = 4 if element == F32 else element.width // 8
        place = self.build.add(address, self.build.mul(index, I64(some.type.count * n_bytes)))
        self.build.store(some, self.build.inttoptr(place, some.type.as_pointer()), align=n_bytes)

    def bfloat16(self, address, index, n):
        """Load bfloat16 as float32, whose upper half it is."""
        wide = self.build.zext(self.load(address, index, I16, n), ir.VectorType(I32, n))
        return self.floats(self.build.shl(wide, self.constant(I32, [16] * n)))

    def float16(self, address, index, n):
        """Load float16 as float32."""
        half = self.build.bitcast(
            self.load(address, index, I16, n), ir.VectorType(ir.HalfType(), n)
        )
        return self.build.fpext(half, ir.VectorType(F32, n))

    def floats(self, bits):
        """Return bits as float32."""
        return self.build.bitcast(bits, ir.VectorType(F32, bits.type.count))

    def prefetch(self, place, is_written=False):
        """Fetch the line of an address to the second cache: more are under way than to the first.

        One that is written is fetched to the first.
        """
        pointer = self.build.inttoptr(place, I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = get_or_insert_function(self.build.module, kind, "llvm.prefetch.p0")
        where = (I32(1), I32(3)) if is_written else (I32(0), I32(2))
        self.build.call(function, [pointer, *where, I32(1)])

    def rounded_up(self, some, n):
        """Return float32's bits, of which the upper half is rounded as ``rounded`` does."""
        bits = self.build.bitcast(some, ir.VectorType(I32, n))
        upper, one, below = (self.constant(I32, [number] * n) for number in (16, 1, 0x7FFF))
        odd = self.build.and_(self.build.lshr(bits, upper), one)
        return self.build.add(bits, self.build.add(odd, below))

    def rounded(self, some, n):
        """Return bfloat16's bits, to which float32 is rounded; any NaN stays one."""
        bits = self.build.lshr(self.rounded_up(some, n), self.constant(I32, [16] * n))
        is_nan = self.build.fcmp_unordered("uno", some, some)
        bits = self.build.select(is_nan, self.constant(I32, [0x7FC0] * n), bits)
        return self.build.trunc(bits, ir.VectorType(I16, n))

    def spread(self, some, lanes):
        """Return the elements of a vector at some places."""
        return self.build.shuffle_vector(some, some, self.constant(I32, lanes))

    def call(self, name, result, *args):
        kind = ir.FunctionType(result, [arg.type for arg in args])
        function = get_or_insert_function(self.build.module, kind, f"llvm.{name}")
        return self.build.call(function, args)

    def add_product(self, total, first, second):
        before, kind = self.build.load(total), first.type
        added = self.call(f"fma.v{kind.count}f32", kind, first, second, before)
        self.build.store(added, total)

    def add_fours(self, sums, first, second):
        """Add products of bytes to sums, four neighbours' to that of a lane, with 32 bits.

        With VNNI the first have no signs; otherwise none of the second is -128.
        """
        if HAS_VNNI:
            return self.call("x86.avx512.vpdpbusd.512", sums.type, sums, first, second)
        bytes_ = ir.VectorType(I8, 4 * LANES)
        first, second = (self.build.bitcast(some, bytes_) for some in (first, second))
        second = self.call("x86.avx2.psign.b", bytes_, second, first)  # gets the first's signs
        first = self.call("x86.avx2.psign.b", bytes_, first, first)
        return self.build.add(sums, self.fours(self.pairs(first, second)))

    def pairs(self, first, second):
        """Return sums of two products of bytes, with 16 bits; the first have no signs."""
        kind = ir.VectorType(I16, 2 * LANES)
        return self.call("x86.avx2.pmadd.ub.sw", kind, first, second)

    def fours(self, pairs):
        """Return sums of pairs, with 32 bits."""
        ones, kind = self.constant(I16, [1] * 2 * LANES), ir.VectorType(I32, LANES)
        return self.call("x86.avx2.pmadd.wd", kind, pairs, ones)
