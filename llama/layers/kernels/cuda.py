"""Kernels for CUDA."""

import functools

import torch
import torch.nn.functional as F

from llama.layers.capability import Capability
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Grouped, StoredWeight, hadamard, rotate

INT8_TOKENS = 1024  # that are multiplied at a time: their sums have four bytes, then four more
FEW_TOKENS = 64  # up to which the int4 operator is faster than widening the weight
INT4_OUTPUTS = 1024  # whose weights are widened at a time


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


class Int4(Kernel):
    """PyTorch's "tinygemm" operator; for many tokens some of the weight is widened at a time.

    It keeps tiles of 8 outputs and 128 inputs together, or of 64 or 32 inputs where these divide
    the width; their order is found by ``nibble_order``.
    """

    def __init__(self, stored: StoredWeight, form: Grouped):
        super().__init__(stored)
        self._form = form
        inner_tiles = _inner_tiles(2 * stored["weight"].shape[1])
        weight, self._scales_and_zeros = form.padded(stored, 8)
        self._packed = _pack(weight, inner_tiles)
        order = nibble_order(inner_tiles, weight.device)
        assert order is not None  # as ``supports`` says
        self._order = order

    @staticmethod
    def supports(weight: torch.Tensor, dtype: torch.dtype, capability: Capability) -> bool:
        """Return whether the operator takes a packed weight and inputs of a dtype."""
        if capability.kind != "cuda" or capability.compute < (8, 0) or dtype != torch.bfloat16:
            return False
        return nibble_order(_inner_tiles(2 * weight.shape[1]), weight.device) is not None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= FEW_TOKENS:
            out = torch._weight_int4pack_mm(
                x.contiguous(), self._packed, self._form.group_size, self._scales_and_zeros
            )
            return out[:, : self.out_features].contiguous()  # as a collective wants it
        out = x.new_empty(len(x), self.out_features)
        for first in range(0, self.out_features, INT4_OUTPUTS):
            rows = slice(first, min(first + INT4_OUTPUTS, self.out_features))
            out[:, rows] = F.linear(x, self._widened(rows, x.dtype))
        return out

    def _widened(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of some outputs, shape (their number, in_features)."""
        tiles = self._packed[rows.start // 8 : -(-rows.stop // 8)]
        codes = _unpack(tiles, self._order)[: rows.stop - rows.start]
        scales, zeros = self._scales_and_zeros[:, rows].transpose(0, 1).unsqueeze(2).unbind(3)
        groups = codes.to(dtype).sub_(8).unflatten(1, (-1, self._form.group_size))
        return torch.addcmul(zeros.to(dtype), groups, scales.to(dtype)).flatten(1)

    def stored(self) -> StoredWeight:
        codes = _unpack(self._packed, self._order)[: self.out_features]
        return self._form.joined(codes, self._scales_and_zeros[:, : self.out_features])

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        codes = _unpack(self._packed[rows // 8], self._order).unflatten(0, (-1, 8))
        codes = codes[torch.arange(len(rows), device=rows.device), rows % 8]
        return self._form.dequantize(self._form.joined(codes, self._scales_and_zeros[:, rows]))


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
    tiles = _nibbles(packed)[:, :, order].unflatten(2, (8, -1))
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
