"""Kernels for CUDA."""

import functools

import torch
import torch.nn.functional as F

from llama.layers.capability import Capability
from llama.layers.kernels import digits, plain
from llama.layers.kernels.base import Kernel
from llama.layers.kernels.widening import (
    Widening,
    dequantizing,
    sums_of_words,
    widening_tiles,
)
from llama.layers.quantization import Grouped, StoredWeight, hadamard, rotate

INT8_TOKENS = 1024  # that are multiplied at a time: their sums have four bytes, then four more
# Tokens up to which an operator is faster than widening the weight, by compiled code or without
# (H200), and those up to which compiled sums are.
FEW_TOKENS, FEW_COMPILED, FEW_FLOAT8, FEW_SUMS = 192, 24, 64, 4
INT4_WEIGHTS = 1 << 25  # that are widened at a time, in about 150 MB


class Int8(Kernel):
    """Inputs of eight bits, each token with a scale of its own, times weights of eight bits.

    Sums are exact, so a token's product doesn't depend on the other tokens.
    """

    def __init__(self, stored: StoredWeight, block_size: int, dtype: torch.dtype):
        super().__init__(stored)
        self._stored = stored
        self._matrix = hadamard(block_size, stored["weight"].device, dtype)

    @staticmethod
    def supports(weight: torch.Tensor, capability: Capability) -> bool:
        """Return whether ``torch._int_mm`` takes a weight."""
        fits = all(size % 8 == 0 for size in weight.shape)
        return capability.kind == "cuda" and capability.compute >= (8, 0) and fits

    def product(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), self.out_features)
        for part, products in zip(x.split(INT8_TOKENS), out.split(INT8_TOKENS), strict=True):
            self._multiply(part, products)
        return out

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        n_tokens, in_features = x.shape
        rotated = rotate(x, self._matrix)
        largest = torch.linalg.vector_norm(
            rotated, torch.inf, dim=1, keepdim=True, dtype=torch.float32
        )
        step = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        # In float16, where bfloat16 has too few bits to round a second time.
        levels = torch.empty_like(rotated, dtype=torch.float16)
        torch.div(rotated, step, out=levels)
        # The operator takes at least 17 rows; it doesn't matter what is in those without a token.
        codes = x.new_empty(max(17, n_tokens), in_features, dtype=torch.int8)
        codes[:n_tokens] = levels.round_()
        sums = torch._int_mm(codes, self._stored["weight"].T)[:n_tokens]
        torch.mul(sums * self._stored["scale"][:, 0], step, out=out)

    def stored(self) -> StoredWeight:
        return self._stored

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        rotated = self._stored["weight"][rows].float() * self._stored["scale"][rows]
        return rotate(rotated, self._matrix.float())


class Float8(plain.Stored):
    """Inputs as sums of two float8 rows, times float8 weights, a row of which shares a scale.

    Two numbers of four bits hold the eight of bfloat16, so products are as exact as those of
    widened weights, by which many tokens are multiplied.
    """

    def __init__(self, stored: StoredWeight, many: Kernel):
        super().__init__(stored)
        self._many = many  # reads the same weight
        self._one = torch.ones((), device=stored["weight"].device)

    @staticmethod
    def supports(
        form: Grouped, weight: torch.Tensor, dtype: torch.dtype, capability: Capability
    ) -> bool:
        """Return whether ``torch._scaled_mm`` takes a weight and inputs of a dtype."""
        if capability.kind != "cuda" or capability.compute < (8, 9) or dtype != torch.bfloat16:
            return False
        fits = all(size % 16 == 0 for size in weight.shape)
        return fits and form == Grouped("float8", 0, False, form.scale_dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > FEW_FLOAT8:
            return self._many.product(x)
        both, step = _split(x)
        weight, scale = self._stored["weight"].T, self._stored["scale"][:, 0]
        sums = torch._scaled_mm(both, weight, self._one, self._one, out_dtype=torch.float32)
        high, low = sums.chunk(2)
        out = torch.empty_like(high, dtype=x.dtype)
        return torch.mul(high.add(low, alpha=1 / 16) * scale, step, out=out)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self._many.weights(rows)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float8 rows, (2 n, in_features), whose ``high + low / 16`` is ``x / step``."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    # A power of two, so that it is exact: of the largest, which it brings to 64 and more.
    powers = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = powers.div_(64).clamp_(min=1e-36)
    scaled = x / step
    high = scaled.to(torch.float8_e4m3fn)
    low = scaled.sub_(high.float()).mul_(16).to(torch.float8_e4m3fn)
    return torch.cat((high, low)), step


class Fused(plain.Widened):
    """Weights of eight bits that compiled code widens: of few tokens while it adds up products."""

    def __init__(
        self, stored: StoredWeight, form: Grouped, dtype: torch.dtype, capability: Capability
    ):
        super().__init__(stored, form, capability)
        weight, *scales = self._parts = [stored[name] for name in ("weight", *form.scale_names)]
        widen = dequantizing(form, dtype)
        self._widening = Widening(widen, self._rows, *weight.shape)
        fits = form.codes == "int8" and weight.shape[1] // scales[0].shape[1] % 4 == 0
        self._words = weight.view(torch.int32) if fits else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() or len(x) > FEW_SUMS:
            return self._widening.product(x)
        if self._words is not None:
            return sums_of_words(x, self._words, *self._parts[1:]).to(x.dtype)
        weight = self.weights(slice(None))
        return torch.stack([(weight * row).sum(1) for row in x.float()]).to(x.dtype)

    def _rows(self, rows: slice) -> list[torch.Tensor | None]:
        return [part[rows] for part in self._parts]


class Int4(digits.Int4):
    """PyTorch's "tinygemm" operator; for many tokens some of the weight is widened at a time.

    It keeps tiles of 8 outputs and 128 inputs together, or of 64 or 32 inputs where these divide
    the width; their order is found by ``nibble_order``. Compiled code leaves a tile's inputs in
    that order, and brings the tokens' into it.
    """

    def __init__(self, stored: StoredWeight, form: Grouped, capability: Capability):
        self._compiles = capability.compiles
        self.few_tokens = FEW_COMPILED if self._compiles else FEW_TOKENS
        super().__init__(stored, form)

    @staticmethod
    def supports(weight: torch.Tensor, dtype: torch.dtype, capability: Capability) -> bool:
        """Return whether the operator takes the digits of a weight and inputs of a dtype."""
        if capability.kind != "cuda" or capability.compute < (8, 0) or dtype != torch.bfloat16:
            return False
        return nibble_order(_inner_tiles(2 * weight.shape[1]), weight.device) is not None

    def _pack(self, codes: torch.Tensor) -> None:
        inner_tiles = _inner_tiles(codes.shape[1])
        self._packed = _pack(Grouped.pack(codes), inner_tiles)
        order = nibble_order(inner_tiles, codes.device)
        assert order is not None  # as ``supports`` says
        self._order = order
        self._inputs = tile_inputs(order) if self._compiles else None
        if self._inputs is not None:
            widen = widening_tiles(self._digits.width)
            self._widening = Widening(widen, self._tiles, self.out_features, codes.shape[1])

    def _multiply(self, x: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm(
            x.contiguous(), self._packed, self._digits.group_size, both
        )

    def _widen(self, x: torch.Tensor) -> torch.Tensor:
        if self._inputs is not None:
            x = x.unflatten(1, (-1, len(self._inputs)))[:, :, self._inputs].flatten(1)
            return self._widening.product(x)
        out = x.new_empty(len(x), self.out_features)
        n_rows = max(8, INT4_WEIGHTS // x.shape[1] // 8 * 8)
        for first in range(0, self.out_features, n_rows):
            rows = slice(first, min(first + n_rows, self.out_features))
            out[:, rows] = F.linear(x, self._widened(rows, x.dtype))
        return out

    def _tiles(self, rows: slice) -> list[torch.Tensor | None]:
        """Return what ``widening_tiles`` takes for some outputs."""
        tiles = slice(rows.start // 8, -(-rows.stop // 8))
        both = self._both[:, :, 8 * tiles.start : 8 * tiles.stop]
        scales, zeros = self._digits.scales(both)
        return [self._packed[tiles], self._inputs, scales.T, None if zeros is None else zeros.T]

    def _widened(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of some outputs, shape (their number, in_features)."""
        tiles = self._packed[rows.start // 8 : -(-rows.stop // 8)]
        values = self._digits.values(_unpack(tiles, self._order)[: rows.stop - rows.start], 1)
        groups = values.unflatten(1, (-1, self._digits.width))
        scales, zeros = self._digits.scales(self._both[:, :, rows])
        scales = scales.T.float().unsqueeze(2)  # (n_outputs, n_groups, 1)
        # In float32, rounded where it is written: one kernel from values to weights.
        out = torch.empty(groups.shape, dtype=dtype, device=values.device)
        if zeros is None:
            return torch.mul(groups, scales, out=out).flatten(1)
        return torch.addcmul(zeros.T.float().unsqueeze(2), groups, scales, out=out).flatten(1)

    def _unpack(self, rows: torch.Tensor | None) -> torch.Tensor:
        if rows is None:
            return _unpack(self._packed, self._order)
        tiles = _unpack(self._packed[rows // 8], self._order).unflatten(0, (-1, 8))
        return tiles[torch.arange(len(rows), device=rows.device), rows % 8]


def tile_inputs(order: torch.Tensor) -> torch.Tensor | None:
    """Return the input of each place in a tile whose outputs lie one after the other, all alike.

    Args:
        order: ``nibble_order``'s.

    Returns:
        None if tiles aren't like that.
    """
    first = order.view(8, -1)[0]
    rows = torch.arange(8, device=order.device)[:, None] * len(first)
    return first.argsort() if torch.equal(order, (rows + first).flatten()) else None


def _inner_tiles(in_features: int) -> int:
    """Return how many times 16 inputs a tile has; groups, and so widths, are multiples of 32."""
    return next(n for n in (8, 4, 2) if in_features % (16 * n) == 0)


def _pack(weight: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """Bring packed codes into the order of the operator, which expects the first one above."""
    return torch._convert_weight_to_int4pack((weight << 4) | (weight >> 4), inner_tiles)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes of tiles as they lie: shape (n_outputs / 8, n_inputs / (16 n), 128 n)."""
    bytes_ = packed.flatten(2).view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=3).flatten(2)


def _unpack(packed: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the codes that ``_pack`` packed, shape (out_features, in_features)."""
    tiles = _nibbles(packed).index_select(2, order).unflatten(2, (8, -1))
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)


@functools.cache
def nibble_order(inner_tiles: int, device: torch.device) -> torch.Tensor | None:
    """Return where the operator puts each code of a tile; None if tiles aren't as expected.

    The order is no part of PyTorch's interface. It is found by packing codes that spell their own
    index, four bits at a time.
    """

    def pack(codes: torch.Tensor) -> torch.Tensor:
        return _pack(codes[:, ::2] | (codes[:, 1::2] << 4), inner_tiles)

    n_inputs = 16 * inner_tiles
    index = torch.arange(8 * n_inputs, device=device).view(8, n_inputs)
    digits = [((index >> shift) & 15).to(torch.uint8) for shift in (0, 4, 8)]
    low, middle, high = (_nibbles(pack(digit)).flatten().long() for digit in digits)
    order = (low | (middle << 4) | (high << 8)).argsort()
    if device.type == "meta":
        return order
    generator = torch.Generator().manual_seed(0)  # no other order gives these codes back
    codes = torch.randint(16, (16, 2 * n_inputs), dtype=torch.uint8, generator=generator)
    codes = codes.to(device)
    return order if torch.equal(_unpack(pack(codes), order), codes) else None
