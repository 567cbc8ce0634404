"""Kernels for CPUs: weights in oneDNN's, FBGEMM's and PyTorch's own orders."""

import functools
import threading
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Grouped, StoredWeight, hadamard, rotate

# Before torch 2.11 there is no public way to ask.
_CAPABILITIES: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()

# FBGEMM's int8 kernels read a packed weight once for up to eight tokens, at most of the memory's
# speed, where oneDNN's and PyTorch's own reach 0.6 of it.
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

# Quantisation levels of an input on either side of zero. Before VNNI two products of eight bits
# are added in sixteen, which half as many levels can't overflow.
LEVELS = 127 if _CAPABILITIES.get("avx512_vnni") else 63

FEW_TOKENS = 64  # up to which the int4 operator is faster than widening the weight
_TILES = 8  # of the int4 operator, that are widened at a time, so that they stay in the cache


class OneDnn(Kernel):
    """An unquantised weight in oneDNN's order.

    With bfloat16 products in hardware it is the fastest for any number of tokens: prompts at
    1.5 times the speed of the plain weight with AMX, a single token at 0.93 of the memory's speed
    with AMX and, padded to four tokens, at 0.88 without.
    """

    opaque = True
    min_tokens = 1 if _CAPABILITIES.get("amx_bf16") else 4

    def __init__(self, stored: StoredWeight):
        super().__init__(stored)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(stored["weight"], None)

    @staticmethod
    def is_fastest_for(weight: torch.Tensor) -> bool:
        """Return whether a weight is multiplied fastest in oneDNN's order."""
        has_bf16 = bool(_CAPABILITIES.get("avx512_bf16")) and torch.backends.mkldnn.is_available()
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_bf16

    def product(self, x: torch.Tensor) -> torch.Tensor:
        n_tokens = x.shape[0]
        if n_tokens < self.min_tokens:
            x = F.pad(x, (0, 0, 0, self.min_tokens - n_tokens))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, None, "none", [], ""
        )
        return out[:n_tokens]

    def stored(self) -> StoredWeight:
        return {"weight": self._packed.to_dense()}

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self.stored()["weight"][rows].float()


_fbgemm_packing = threading.Lock()  # FBGEMM's order is chosen by a setting of the process


class Int8(Kernel):
    """Inputs of eight bits, each token with a scale of its own, times weights of eight bits.

    By FBGEMM. Sums are exact, so a token's product doesn't depend on the other tokens.
    """

    opaque = True

    def __init__(self, stored: StoredWeight, block_size: int):
        super().__init__(stored)
        self._matrix = hadamard(block_size, torch.device("cpu"), torch.float32)
        scale = stored["scale"][:, 0]
        zero = torch.zeros(self.out_features, dtype=torch.long)
        with _fbgemm_packing:
            engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = "fbgemm"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # such tensors are deprecated, kernels aren't
                    weight = torch._make_per_channel_quantized_tensor(
                        stored["weight"], scale, zero, 0
                    )
                self._packed = torch.ops.quantized.linear_prepack(weight, None)
            finally:
                torch.backends.quantized.engine = engine

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rotated = rotate(x.float(), self._matrix)
        largest = rotated.abs().amax(dim=1, keepdim=True)
        largest = largest.clamp_(min=torch.finfo(torch.float32).tiny)
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rotated / largest, 1 / LEVELS, LEVELS + 1, self._packed
        )
        return out.mul_(largest).to(x.dtype)

    def stored(self) -> StoredWeight:
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        scale = weight.q_per_channel_scales().float()
        return {"weight": weight.int_repr(), "scale": scale[:, None]}

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        stored = self.stored()
        return rotate(stored["weight"][rows].float() * stored["scale"][rows], self._matrix)


class Int4(Kernel):
    """PyTorch's operator for few tokens; for many, tiles of the weight are widened and multiplied.

    Its order is that of tiles of 64 outputs, or of 32 without AVX-512: a tile has a row of bytes
    for each input, of which one holds the codes of outputs that lie half a tile apart. It is fast
    in bfloat16 only, to which few tokens of other dtypes are rounded.
    """

    opaque = True

    def __init__(self, stored: StoredWeight, form: Grouped):
        super().__init__(stored)
        self._form = form
        weight, self._scales_and_zeros = form.padded(stored, 64)
        self._packed = _pack_tiles(form.unpack(weight), int4_tile())

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= FEW_TOKENS:
            out = torch._weight_int4pack_mm_for_cpu(
                x.bfloat16().contiguous(),
                self._packed,
                self._form.group_size,
                self._scales_and_zeros,
            )
        else:
            n_tiles = len(self._packed) // int4_tile()
            some = [range(n_tiles)[first : first + _TILES] for first in range(0, n_tiles, _TILES)]
            out = torch.cat([x @ self._widened(tiles, x.dtype) for tiles in some], dim=1)
        return out[:, : self.out_features].to(x.dtype).contiguous()

    def _widened(self, tiles: range, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of some tiles, shape (in_features, their outputs)."""
        rows = slice(tiles.start * int4_tile(), tiles.stop * int4_tile())
        codes = _unpack_tiles(self._packed[rows], int4_tile())  # (in_features, outputs)
        scales, zeros = self._scales_and_zeros[:, None, rows].to(dtype).movedim(3, 0).contiguous()
        groups = codes.to(dtype).sub_(8).unflatten(0, (-1, self._form.group_size))
        return torch.addcmul(zeros, groups, scales).flatten(0, 1)

    def stored(self) -> StoredWeight:
        codes = _unpack_tiles(self._packed, int4_tile()).T[: self.out_features]
        return self._form.joined(codes, self._scales_and_zeros[:, : self.out_features])

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        tile = int4_tile()
        bytes_ = self._packed.view(len(self._packed) // tile, -1, tile // 2)
        places = rows % tile
        picked = bytes_[rows // tile, :, places % (tile // 2)]  # (n, in_features)
        codes = (picked >> (places // (tile // 2) * 4)[:, None].to(torch.uint8)) & 15
        return self._form.dequantize(self._form.joined(codes, self._scales_and_zeros[:, rows]))


def _pack_tiles(codes: torch.Tensor, tile: int) -> torch.Tensor:
    """Bring codes, shape (out_features, in_features), into the int4 operator's order."""
    out_features, in_features = codes.shape
    first, second = codes.view(-1, 2, tile // 2, in_features).transpose(2, 3).unbind(1)
    return (first | (second << 4)).reshape(out_features, in_features // 2)


def _unpack_tiles(packed: torch.Tensor, tile: int) -> torch.Tensor:
    """Return the codes that ``_pack_tiles`` packed, shape (in_features, out_features)."""
    bytes_ = packed.view(len(packed) // tile, -1, tile // 2)  # (tiles, in_features, tile / 2)
    codes = torch.stack((bytes_ & 15, bytes_ >> 4), dim=2)
    return codes.transpose(0, 1).flatten(1)  # (in_features, out_features)


@functools.cache
def int4_tile() -> int:
    """Return how many outputs a tile of the int4 operator has; 0 where its order is another."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=generator)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    for tile in (64, 32):
        if torch.equal(packed, _pack_tiles(codes.to(torch.uint8), tile)):
            return tile
    return 0
