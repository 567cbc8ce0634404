"""GGUF's quantised types as affine groups: a block's bits become the codes of ``Grouped``.

All is done on 32-bit words of four weights, by few operators on many blocks. Codes lie around the
middle of their range, where a zero that is rounded costs the least.

Source: https://github.com/ggml-org/ggml (src/ggml-common.h, src/ggml-quants.c)
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch

from llama.checkpoint.threads import in_threads
from llama.layers.quantization import Grouped, StoredWeight

Parts = tuple[torch.Tensor, ...]  # of n blocks: codes, scales and, if there are any, zeros

# Weights that a thread decodes at once: so many that operators, between which it holds Python's
# lock, take longer than what is between them, yet so few that most results are no larger than a
# huge page, which the system would have to clear.
_CHUNK = 1 << 20
_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def form_of_kind(kind: str) -> Grouped | None:
    """Return the form that stores a type exactly; None of one that isn't made of affine groups."""
    return KINDS[kind][0] if kind in KINDS else None


def codes_of(
    kind: str,
    raw: torch.Tensor,
    shape: Sequence[int],
    places: Mapping[str, torch.Tensor] | None = None,
) -> StoredWeight:
    """Return a weight as its form stores it.

    Args:
        kind: the type's name, of which there is a form (``form_of_kind``).
        raw: the blocks' bytes, uint8, shape (n_bytes,).
        shape: (out_features, in_features).
        places: where to put some of its tensors.
    """
    form, block, decode = KINDS[kind]
    n_blocks = prod(shape) // block
    dtypes = form.dtypes()
    stored = {
        name: torch.empty(size, dtype=dtypes[name])
        for name, size in form.shapes(shape[0], shape[1]).items()
    } | dict(places or {})
    targets = [stored[name].view(n_blocks, -1) for name in ("weight", *form.scale_names)]
    step = _CHUNK // block
    blocks = raw.view(n_blocks, -1)

    def decode_some(first: int) -> None:
        some = slice(first, first + step)
        for target, part in zip(targets, decode(blocks[some]), strict=True):
            # Packed codes are the lower bytes of larger numbers, and converted here.
            target[some] = part.view(len(part), -1)

    in_threads(decode_some, range(0, n_blocks, step))
    return stored


def _words(blocks: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return some of the blocks' bytes as int32, shape (n, n_words)."""
    part = blocks.view(torch.int16)[:, first // 2 : last // 2]
    # Of one block ``contiguous`` would give what it has, at any place.
    return part.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _float16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the numbers at a place of the blocks, shape (n, 1)."""
    return blocks.view(torch.float16)[:, at // 2, None]


def _bits(words: torch.Tensor, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """Return fields of all bytes: (…, n_words) to (…, n_shifts, n_words)."""
    shifted = [words >> shift if shift else words for shift in shifts]
    return torch.stack(shifted, dim=-2).bitwise_and_(mask * 0x01010101)


def _packed(words: torch.Tensor) -> torch.Tensor:
    """Return the lower four bits of all bytes, two in the lower byte of an int16: (n, n_words)."""
    return (words >> 4).bitwise_or_(words).view(torch.int16).flatten(1)


def _values(words: torch.Tensor, middle: int) -> torch.Tensor:
    """Return codes, a byte each, as values around zero: int8, (n, n_bytes)."""
    return words.view(torch.int8).sub_(middle).flatten(1)


def _q4_0(blocks: torch.Tensor) -> Parts:
    return _packed(_bits(_words(blocks, 2, 18), (0, 4), 15)), _float16(blocks, 0)


def _q4_1(blocks: torch.Tensor) -> Parts:
    scale, low = _float16(blocks, 0).float(), _float16(blocks, 2).float()
    return _packed(_bits(_words(blocks, 4, 20), (0, 4), 15)), scale, low + 8 * scale


def _q5(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """Return the values of blocks of 32 whose fifth bits stand in one word, the first's lowest."""
    fifth = _bits(_words(blocks, first, first + 4), range(0, 32, 4), 15)[..., 0] & 15
    fifth = (fifth * 0x00204081) & 0x01010101  # four bits to the lowest ones of four bytes
    fourth = _bits(_words(blocks, first + 4, first + 20), (0, 4), 15)
    return _values(fourth.flatten(1).bitwise_or_(fifth << 4), 16)


def _q5_0(blocks: torch.Tensor) -> Parts:
    return _q5(blocks, 2), _float16(blocks, 0)


def _q5_1(blocks: torch.Tensor) -> Parts:
    scale, low = _float16(blocks, 0).float(), _float16(blocks, 2).float()
    return _q5(blocks, 4), scale, low + 16 * scale


def _q8_0(blocks: torch.Tensor) -> Parts:
    return blocks.view(torch.int8)[:, 2:], _float16(blocks, 0)


def _q2_k(blocks: torch.Tensor) -> Parts:
    codes = _bits(_words(blocks, 16, 80).view(-1, 2, 8), (0, 2, 4, 6), 3)
    four_bits = _bits(_words(blocks, 0, 16), (0, 4), 15).view(torch.uint8).float()
    scale, low = four_bits.mul_(blocks.view(torch.float16)[:, 40:, None].float()).unbind(1)
    return _packed(codes.add_(0x07070707)), scale, scale - low  # values from -1 to 2


def _q3_k(blocks: torch.Tensor) -> Parts:
    lower = _bits(_words(blocks, 32, 96).view(-1, 2, 8), (0, 2, 4, 6), 3)
    third = _bits(_words(blocks, 0, 32), range(8), 1) << 2
    codes = lower.flatten(1, 2).bitwise_or_(third).add_(0x04040404)  # values from -4 to 3
    words = _words(blocks, 96, 108)
    scales = _bits(words[:, :2], (0, 4), 15).flatten(1)
    scales |= _bits(words[:, 2:], (0, 2, 4, 6), 3).flatten(1) << 4
    return _packed(codes), _float16(blocks, 108).float() * _values(scales, 32)


def _k_scales(blocks: torch.Tensor, middle: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zeros of Q4_K and Q5_K, of six bits each."""
    words = _words(blocks, 4, 16)
    lower = words[:, :2] & 0x3F3F3F3F
    upper = _bits(words[:, 2:], (0, 4), 15)[..., 0] | ((words[:, :2] >> 2) & 0x30303030)
    six_bits = torch.stack((lower, upper), dim=2).view(torch.uint8).float()
    scale, low = six_bits.mul_(blocks.view(torch.float16)[:, :2, None].float()).unbind(1)
    return scale, middle * scale - low


def _q4_k(blocks: torch.Tensor) -> Parts:
    codes = _bits(_words(blocks, 16, 144).view(-1, 4, 8), (0, 4), 15)
    return _packed(codes), *_k_scales(blocks, 8)


def _q5_k(blocks: torch.Tensor) -> Parts:
    fourth = _bits(_words(blocks, 48, 176).view(-1, 4, 8), (0, 4), 15).flatten(1, 2)
    fifth = _bits(_words(blocks, 16, 48), range(8), 1)
    return _values(fourth.bitwise_or_(fifth << 4), 16), *_k_scales(blocks, 16)


def _q6_k(blocks: torch.Tensor) -> Parts:
    lower = _bits(_words(blocks, 0, 128).view(-1, 2, 16), (0, 4), 15).flatten(1)
    upper = _bits(_words(blocks, 128, 192).view(-1, 2, 8), (0, 2, 4, 6), 3).flatten(1)
    scales = blocks.view(torch.int8)[:, 192:208].float()
    return _values(lower.bitwise_or_(upper << 4), 32), _float16(blocks, 208).float() * scales


def _iq4(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of bytes that hold codes of a weight and of the one 16 places on."""
    values = torch.tensor(_NL_VALUES, dtype=torch.int8)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
    looked_up = pairs.view(torch.int16)[:, 0].index_select(0, codes.int().flatten())
    return looked_up.view(torch.int8).view(-1, 16, 2).transpose(1, 2).reshape(len(codes), -1)


def _iq4_nl(blocks: torch.Tensor) -> Parts:
    return _iq4(blocks[:, 2:]), _float16(blocks, 0)


def _iq4_xs(blocks: torch.Tensor) -> Parts:
    lower = _words(blocks, 4, 8).view(torch.uint8)  # the scales' lower four bits, two in a byte
    lower = torch.stack((lower & 15, lower >> 4), dim=2).flatten(1)
    upper = blocks.view(torch.int16)[:, 1, None].int() >> torch.arange(0, 16, 2, dtype=torch.int32)
    scales = (lower.int() | (upper & 3) << 4) - 32
    return _iq4(blocks[:, 8:]), _float16(blocks, 0).float() * scales


KINDS: dict[str, tuple[Grouped, int, Callable[[torch.Tensor], Parts]]] = {
    "Q4_0": (Grouped("int4", 32, False, torch.float16), 32, _q4_0),
    "Q4_1": (Grouped("int4", 32, True, torch.float32), 32, _q4_1),
    "Q5_0": (Grouped("int8", 32, False, torch.float16), 32, _q5_0),
    "Q5_1": (Grouped("int8", 32, True, torch.float32), 32, _q5_1),
    "Q8_0": (Grouped("int8", 32, False, torch.float16), 32, _q8_0),
    "Q2_K": (Grouped("int4", 16, True, torch.float32), 256, _q2_k),
    "Q3_K": (Grouped("int4", 16, False, torch.float32), 256, _q3_k),
    "Q4_K": (Grouped("int4", 32, True, torch.float32), 256, _q4_k),
    "Q5_K": (Grouped("int8", 32, True, torch.float32), 256, _q5_k),
    "Q6_K": (Grouped("int8", 16, False, torch.float32), 256, _q6_k),
    "IQ4_NL": (Grouped("int8", 32, False, torch.float16), 32, _iq4_nl),
    "IQ4_XS": (Grouped("int8", 32, False, torch.float32), 256, _iq4_xs),
}
"""By a type's name: its form, the weights of a block, and what decodes blocks."""
