"""The code that ``compiled.attend_prompt`` has numba compile: attention of many tokens, by AMX.

Scores of 16 tokens with some keys are products of matrices, as are sums of values. Between them the
exponentials are of vectors. Of keys that no token of the 16 may see nothing is computed.
"""

# mypy: ignore-errors

import math

import numba
from llvmlite import ir
from numba.extending import intrinsic

from llama.layers.kernels.compiled import KEYS, LANES, ROWS, TOKENS
from llama.layers.kernels.numba_code import (
    F32,
    FLOAT,
    I16,
    I32,
    I64,
    INTEGER,
    ZERO,
    Vectors,
    pointer,
    rounded,
    thread_count,
    thread_number,
)
from llama.layers.kernels.numba_tiles import Matrices, configure, keep, space

LOWEST, SHIFT = -1e30, 1.5 * 2**23
SERIES = [math.log(2) ** k / math.factorial(k) for k in range(7)]  # of 2 ** x


def attend(head_dim):
    """Return a function that attends from a thread's part of the tokens' heads.

    Scores with ``KEYS`` keys are computed at a time, which are brought into order once for
    ``TOKENS`` tokens.

    Its argument points to the addresses of what is read, then of what is written:

    - queries, bfloat16, (n_tokens, n_heads, head_dim), of the last ``n_tokens`` positions.
    - cached keys and values, bfloat16, (n_kv_heads, max_seq_len, head_dim).
    - outputs, bfloat16, the shape of the queries.
    - memory for each thread, (n_threads, n_bytes).

    then to AMX's configuration, and to the numbers of tokens, heads, key/value heads, positions of
    the cache, those that are read, and ``n_bytes``.
    """
    scores_of, softmax, add_values = _scores(head_dim), _softmax(head_dim), _values(head_dim)
    half = head_dim // 2

    @numba.cfunc(numba.void(numba.types.voidptr), error_model="numpy")
    def heads_of_thread(data):
        given = numba.carray(data, 12, numba.int64)
        n_tokens, n_heads, n_kv_heads, max_seq_len = given[6], given[7], given[8], given[9]
        kv_len, n_rep = given[10], given[7] // given[8]
        before, n_blocks = kv_len - n_tokens, (n_tokens + TOKENS - 1) // TOKENS
        own = (given[4] + thread_number() * given[11] + 63) // 64 * 64
        keys_at, values_at = own, own + 4 * KEYS * half
        scores_at = values_at + 4 * KEYS * half
        weights_at = scores_at + 4 * ROWS * KEYS
        sums_at = weights_at + 2 * ROWS * KEYS
        n_rows = TOKENS * n_rep
        keys = numba.carray(pointer(keys_at), (half, KEYS), numba.uint32)
        values = numba.carray(pointer(values_at), (KEYS // 2, head_dim), numba.uint32)
        sums = numba.carray(pointer(sums_at), (n_rows, head_dim), FLOAT)
        states_at = sums_at + 4 * n_rows * head_dim
        states = numba.carray(pointer(states_at), (n_rows, 2), FLOAT)
        out = numba.carray(pointer(given[3]), (n_tokens, n_heads, head_dim), numba.uint16)
        earlier = space()
        keep(earlier)
        configure(given[5])
        for task in range(thread_number(), n_blocks * n_kv_heads, thread_count()):
            kv_head, block = task % n_kv_heads, task // n_kv_heads
            first, last = block * TOKENS, min((block + 1) * TOKENS, n_tokens)
            n_tiles = (last - first + ROWS - 1) // ROWS
            place = kv_head * max_seq_len * 2 * head_dim
            sums[:] = ZERO
            states[:, 0] = FLOAT(LOWEST)
            states[:, 1] = ZERO
            for begin in range(0, before + last, KEYS):
                n_keys = min(KEYS, before + last - begin)
                _order_keys(given[1] + place + begin * 2 * head_dim, n_keys, keys)
                _order_values(given[2] + place + begin * 2 * head_dim, n_keys, values)
                for tile in range(n_tiles):
                    # Of the last tile's tokens some may be the one's before.
                    token = max(min(first + tile * ROWS, n_tokens - ROWS), 0)
                    if begin > before + token + ROWS - 1:
                        continue
                    for rep in range(n_rep):
                        row = (tile * n_rep + rep) * ROWS
                        query = given[0] + (token * n_heads + kv_head * n_rep + rep) * 2 * head_dim
                        scores_of(query, n_heads * 2 * head_dim, keys_at, scores_at)
                        for i in range(ROWS):
                            softmax(
                                scores_at + 4 * KEYS * i,
                                before + token + i + 1 - begin,
                                weights_at + 2 * KEYS * i,
                                states_at + 8 * (row + i),
                                sums_at + 4 * head_dim * (row + i),
                            )
                        add_values(weights_at, values_at, sums_at + row * 4 * head_dim)
            for tile in range(n_tiles):
                token = max(min(first + tile * ROWS, n_tokens - ROWS), 0)
                for rep in range(n_rep):
                    for i in range(ROWS):
                        row = (tile * n_rep + rep) * ROWS + i
                        inverse = FLOAT(1) / states[row, 1]
                        result = out[token + i, kv_head * n_rep + rep]
                        for j in range(head_dim):
                            result[j] = rounded(sums[row, j] * inverse)
        configure(earlier)

    return heads_of_thread


@numba.njit
def _order_keys(place, n_keys, out):
    """Write the same pair of elements of all keys side by side."""
    half = out.shape[0]
    some = numba.carray(pointer(place), (n_keys, half), numba.uint32)
    for i in range(half):
        for key in range(n_keys):
            out[i, key] = some[key, i]
    if n_keys < KEYS:
        out[:, n_keys:] = 0


@numba.njit
def _order_values(place, n_keys, out):
    """Write the same element of two neighbours side by side; of positions without one, zeros."""
    head_dim = out.shape[1]
    some = numba.carray(pointer(place), (n_keys, head_dim), numba.uint16)
    for pair in range(n_keys // 2):
        first, second, own = some[2 * pair], some[2 * pair + 1], out[pair]
        for i in range(head_dim):
            own[i] = numba.uint32(first[i]) | numba.uint32(second[i]) << numba.uint32(16)
    if n_keys < KEYS:
        out[n_keys // 2 :] = 0
        if n_keys % 2:
            for i in range(head_dim):
                out[n_keys // 2, i] = some[n_keys - 1, i]


class _Exponentials(Vectors):
    """Makes instructions for powers of two."""

    def every(self, number):
        return self.constant(F32, [number] * LANES)

    def larger(self, first, second):
        """Return the larger numbers, or the second where one isn't a number."""
        return self.build.select(self.build.fcmp_ordered(">", first, second), first, second)

    def fold(self, some, combine):
        """Combine all lanes; each then has the result."""
        lanes = LANES // 2
        while lanes:
            other = self.spread(some, [(i + lanes) % LANES for i in range(LANES)])
            some, lanes = combine(some, other), lanes // 2
        return some

    def power(self, x):
        """Return 2 ** x, to float32's precision, for x of at most 0; below -125, 2 ** -125."""
        build, words = self.build, ir.VectorType(I32, LANES)
        x = self.larger(self.every(-125), x)
        shifted = build.fadd(x, self.every(SHIFT))  # whose last bits are the nearest whole number
        f = build.fsub(x, build.fsub(shifted, self.every(SHIFT)))
        series = self.every(SERIES[-1])
        for term in reversed(SERIES[:-1]):
            series = self.call(f"fma.v{LANES}f32", series.type, series, f, self.every(term))
        exponent = build.shl(build.bitcast(shifted, words), self.constant(I32, [23] * LANES))
        return self.floats(build.add(build.bitcast(series, words), exponent))


def _softmax(head_dim):
    """Return a function that writes a token's weights of some keys, and scales its sums.

    It takes the address of scores, how many of these count, and the addresses of weights, bfloat16,
    of the largest score and the sum of weights so far, and of sums of values.
    """
    parts, scale = range(KEYS // LANES), math.log2(math.e) / math.sqrt(head_dim)

    @intrinsic
    def write(typing, scores, n_seen, weights, state, sums):
        return numba.void(*[INTEGER] * 5), generate

    def generate(context, build, signature, args):
        scores, n_seen, weights, state, sums = args
        vector, every = _Exponentials(build), [0] * LANES
        fma, scale_of_all = f"fma.v{LANES}f32", vector.every(scale)

        def spread(index):
            return vector.spread(vector.load(state, I64(index), F32, 1), every)

        def store(value, place, offset=0):
            place = build.add(place, I64(offset))
            build.store(value, build.inttoptr(place, value.type.as_pointer()), align=2)

        ends = build.insert_element(vector.constant(I32, every), build.trunc(n_seen, I32), I32(0))
        ends, lowest, nothing = vector.spread(ends, every), vector.every(LOWEST), vector.every(0)
        are_seen, seen = [], []
        for part in parts:
            lanes = vector.constant(I32, range(part * LANES, (part + 1) * LANES))
            are_seen.append(build.icmp_signed("<", lanes, ends))
            some = vector.load(scores, I64(part), F32, LANES)
            seen.append(build.select(are_seen[-1], some, lowest))
        before = largest = spread(0)
        for some in seen:
            largest = vector.larger(some, largest)
        largest = vector.fold(largest, vector.larger)
        below = build.fmul(largest, vector.every(-scale))

        def weight(score):
            return vector.power(vector.call(fma, score.type, score, scale_of_all, below))

        factor, total = weight(before), nothing
        for part, is_seen, score in zip(parts, are_seen, seen, strict=True):
            some = build.select(is_seen, weight(score), nothing)
            total = build.fadd(total, some)
            bits = build.lshr(vector.rounded_up(some, LANES), vector.constant(I32, [16] * LANES))
            store(build.trunc(bits, ir.VectorType(I16, LANES)), weights, 2 * LANES * part)
        total = vector.fold(total, build.fadd)
        total = vector.call(fma, total.type, spread(1), factor, total)
        store(build.shuffle_vector(largest, total, vector.constant(I32, [0, LANES])), state)
        for part in range(head_dim // LANES):
            store(
                build.fmul(vector.load(sums, I64(part), F32, LANES), factor), sums, 4 * LANES * part
            )
        return context.get_dummy_value()

    return write


def _scores(head_dim):
    """Return a function that writes the products of 16 queries with ``KEYS`` keys."""

    @intrinsic
    def write(typing, queries, pitch, keys, out):
        return numba.void(INTEGER, INTEGER, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        queries, pitch, keys, out = args
        amx = Matrices(build)
        for first in range(0, KEYS // 16, 4):
            for part in range(4):
                amx.clear(part)
            for step in range(head_dim // 32):
                amx.load(4, build.add(queries, I64(64 * step)), pitch)
                for part in range(4):
                    offset = 16 * step * 4 * KEYS + 64 * (first + part)
                    amx.load(5 + part % 3, build.add(keys, I64(offset)), I64(4 * KEYS))
                    amx.add_product(part, 4, 5 + part % 3)
            for part in range(4):
                amx.store(part, build.add(out, I64(64 * (first + part))), I64(4 * KEYS))
        return context.get_dummy_value()

    return write


def _values(head_dim):
    """Return a function that adds values, by weights, to sums of 16 tokens."""

    @intrinsic
    def add(typing, weights, values, sums):
        return numba.void(INTEGER, INTEGER, INTEGER), generate

    def generate(context, build, signature, args):
        weights, values, sums = args
        amx, pitch = Matrices(build), I64(4 * head_dim)
        for first in range(0, head_dim // 16, 4):
            parts = range(min(4, head_dim // 16 - first))
            places = [build.add(sums, I64(64 * (first + part))) for part in parts]
            for part, place in zip(parts, places, strict=True):
                amx.load(part, place, pitch)
            for step in range(KEYS // 32):
                amx.load(4, build.add(weights, I64(64 * step)), I64(2 * KEYS))
                for part in parts:
                    offset = 16 * step * 4 * head_dim + 64 * (first + part)
                    amx.load(5 + part % 3, build.add(values, I64(offset)), pitch)
                    amx.add_product(part, 4, 5 + part % 3)
            for part, place in zip(parts, places, strict=True):
                amx.store(part, place, pitch)
        return context.get_dummy_value()

    return add
