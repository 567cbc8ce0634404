"""The code that ``compiled.attend`` has numba compile: attention of few tokens.

Bfloat16's elements are read in pairs, as words of 32 bits: the even ones and the odd ones are
float32 once the others' bits are gone, and stay in vectors of their own.
"""

# mypy: ignore-errors

import math

import numba
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from llama.layers.kernels.compiled import LANES
from llama.layers.kernels.numba_code import (
    F32,
    FLOAT,
    I32,
    I64,
    INTEGER,
    ZERO,
    Vectors,
    part_of_thread,
    pointer,
    thread_number,
)
from llama.layers.kernels.numba_tokens import exp


def attend(head_dim):
    """Return a function that attends from a thread's part of the query heads.

    Its argument points to the addresses of what is read, then of what is written:

    - queries, bfloat16, (n_tokens, n_heads, head_dim).
    - slots and positions, int64, (n_tokens,); a token reads positions up to its own.
    - cached keys and values, bfloat16, (n_slots, n_kv_heads, max_seq_len, head_dim).
    - scores, float32, (n_threads, the most positions that are read).
    - outputs, bfloat16, the shape of the queries.

    then to the numbers of tokens, heads, key/value heads, positions and scores of a thread.
    """
    write_scores, write_sum = _scores(head_dim), _weighted_sum(head_dim)
    scale, size = FLOAT(1 / math.sqrt(head_dim)), 2 * head_dim

    @numba.cfunc(numba.void(numba.types.voidptr), error_model="numpy")
    def heads_of_thread(data):
        given = numba.carray(data, 12, numba.int64)
        n_tokens, n_heads, n_kv_heads, max_seq_len = given[7], given[8], given[9], given[10]
        slots = numba.carray(pointer(given[1]), (n_tokens,), numba.int64)
        positions = numba.carray(pointer(given[2]), (n_tokens,), numba.int64)
        own = given[5] + thread_number() * given[11] * 4
        scores = numba.carray(pointer(own), (given[11],), FLOAT)
        for head in range(*part_of_thread(n_tokens * n_heads)):
            token, n_rep = head // n_heads, n_heads // n_kv_heads
            length, kv_head = positions[token] + 1, head % n_heads // n_rep
            place = (slots[token] * n_kv_heads + kv_head) * max_seq_len * size
            for some in range(0, length, LANES):
                first = min(some, max_seq_len - LANES)  # scores beyond the length aren't read
                keys = given[3] + place + first * size
                write_scores(given[0] + head * size, keys, own + 4 * first)
            inverse = _softmax(scores[:length], scale)
            write_sum(own, given[4] + place, length, inverse, given[6] + head * size)

    return heads_of_thread


@numba.njit(fastmath={"nnan", "nsz", "reassoc"})  # a NaN is added again below
def _largest(some):
    largest = some[0]
    for i in range(len(some)):
        largest = max(largest, some[i])
    return largest


@numba.njit(fastmath={"nsz", "reassoc", "contract"}, error_model="numpy")
def _softmax(some, scale):
    """Make scores weights that add up to a number, and return its inverse."""
    largest, total = _largest(some), ZERO
    for i in range(len(some)):
        some[i] = exp((some[i] - largest) * scale) + some[i] * ZERO
        total += some[i]
    return FLOAT(1) / total


class _Rows(Vectors):
    """Makes instructions for rows of bfloat16, read in ``LANES`` lanes."""

    def __init__(self, build, head_dim):
        super().__init__(build)
        self.size, self.n_words = I64(2 * head_dim), head_dim // 2 // LANES

    def every(self, number):
        return self.constant(I32, [number] * LANES)

    def row(self, address, index):
        """Return the vectors of a row: even elements, odd ones, again even ones and so on."""
        place, parts = self.build.add(address, self.build.mul(index, self.size)), []
        for i in range(self.n_words):
            words = self.load(place, I64(i), I32, LANES)
            parts.append(self.floats(self.build.shl(words, self.every(16))))
            parts.append(self.floats(self.build.and_(words, self.every(-1 << 16))))
        return parts

    def dot(self, first, second):
        total = self.build.fmul(first[0], second[0])
        for one, other in zip(first[1:], second[1:], strict=True):
            total = self.call(f"fma.v{LANES}f32", total.type, one, other, total)
        return total

    def rounded(self, even, odd):
        """Return words of even and odd elements, rounded to bfloat16."""
        build, (first, second) = self.build, (self.rounded_up(x, LANES) for x in (even, odd))
        upper = build.and_(second, self.every(-1 << 16))
        return build.or_(build.lshr(first, self.every(16)), upper)


def _scores(head_dim):
    """Return a function that writes the products of a query with ``LANES`` keys."""

    @intrinsic
    def write(typing, query, keys, out):
        return numba.void(INTEGER, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        vector = _Rows(build, head_dim)
        query = vector.row(args[0], I64(0))
        sums = [vector.dot(vector.row(args[1], I64(i)), query) for i in range(LANES)]
        pairs = [vector.constant(I32, range(odd, 2 * LANES, 2)) for odd in (0, 1)]
        while len(sums) > 1:  # the lanes of neighbours are added, until each lane is a sum
            both = zip(sums[::2], sums[1::2], strict=True)
            sums = [build.fadd(*(build.shuffle_vector(*b, lanes) for lanes in pairs)) for b in both]
        build.store(sums[0], build.inttoptr(args[2], sums[0].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return write


def _weighted_sum(head_dim):
    """Return a function that writes a factor times the sum of some values, by weights."""

    @intrinsic
    def write(typing, weights, values, length, factor, out):
        return numba.void(INTEGER, INTEGER, INTEGER, FLOAT, INTEGER), generate

    def generate(context, build, signature, args):
        weights, values, length, factor, out = args
        vector, every = _Rows(build, head_dim), [0] * LANES
        sums = [vector.zeros(LANES) for _ in range(head_dim // LANES)]
        with for_range(build, length) as loop:
            weight = vector.spread(vector.load(weights, loop.index, F32, 1), every)
            for total, value in zip(sums, vector.row(values, loop.index), strict=True):
                vector.add_product(total, value, weight)
        factor = build.insert_element(vector.constant(F32, every), factor, I32(0))
        rows = [build.fmul(build.load(total), vector.spread(factor, every)) for total in sums]
        for i in range(0, len(rows), 2):
            words = vector.rounded(*rows[i : i + 2])
            place = build.add(out, I64(2 * i * LANES))
            build.store(words, build.inttoptr(place, words.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return write
