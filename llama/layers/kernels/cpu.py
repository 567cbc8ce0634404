"""Kernels for CPUs: weights in oneDNN's, FBGEMM's and PyTorch's own orders."""

import functools
import threading
import warnings

import torch
import torch.nn.functional as F

from llama.layers.capability import CPU, cpu_has_amx, fast_dtype
from llama.layers.kernels import digits
from llama.layers.kernels.base import Kernel
from llama.layers.kernels.compiled import FEW_TOKENS
from llama.layers.kernels.machine_code import has_numba
from llama.layers.kernels.tiles import Tiles
from llama.layers.quantization import Form, Grouped, StoredWeight, hadamard, rotate

# FBGEMM's int8 kernels read a packed weight once for up to eight tokens, at most of the memory's
# speed, where oneDNN's and PyTorch's own reach 0.6 of it.
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

# Quantisation levels of an input on either side of zero. Before VNNI two products of eight bits
# are added in sixteen, which half as many levels can't overflow.
LEVELS = 127 if CPU.get("avx512_vnni") else 63

_SMALLEST = 1e-30  # of a token's largest input, whose inverse is finite

_LARGE = 1 << 25  # elements of a weight, of which no copy is made on the way
_WIDENED = 1 << 20  # weights of the int4 operator's order that are widened at a time


class OneDnn(Kernel):
    """An unquantised weight in oneDNN's order.

    With bfloat16 products in hardware it is the fastest of PyTorch's for any number of tokens:
    prompts at 1.5 times the speed of the plain weight with AMX, a single token at 0.85 of the
    memory's speed with AMX and, padded to four tokens, at 0.88 without. Compiled code is faster.
    """

    opaque = True
    min_tokens = 1 if cpu_has_amx() else 4

    def __init__(self, stored: StoredWeight):
        super().__init__(stored)
        weight = stored["weight"]
        # Rows of 4 kB share places in the cache: a product of 512 tokens takes a quarter longer. An
        # output, which is larger than other weights, rarely has so many.
        has_places = len(weight) % 2048 == 0 and weight.shape[1] <= 2048 and weight.numel() < _LARGE
        self._is_padded = cpu_has_amx() and has_places
        padded = F.pad(weight, (0, 0, 0, 32)) if self._is_padded else weight
        self._packed = torch.ops.mkldnn._reorder_linear_weight(padded, None)
        self._tiles = Tiles.find(self._packed, weight)
        self.reads_rows = self._tiles is not None
        if self._tiles is not None:
            self.min_tokens = 1

    @staticmethod
    def is_fastest_for(weight: torch.Tensor) -> bool:
        """Return whether a weight is multiplied fastest in oneDNN's order."""
        has_bf16 = bool(CPU.get("avx512_bf16")) and torch.backends.mkldnn.is_available()
        return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_bf16

    def product(self, x: torch.Tensor) -> torch.Tensor:
        n_tokens = x.shape[0]
        is_few = n_tokens <= FEW_TOKENS and x.dtype == torch.bfloat16
        if is_few and self._tiles is not None:
            return self._tiles.product(x)
        if n_tokens < type(self).min_tokens:
            x = F.pad(x, (0, 0, 0, type(self).min_tokens - n_tokens))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, None, "none", [], ""
        )
        if self._is_padded:
            out = out[:, : self.out_features]
            if n_tokens <= FEW_TOKENS:  # as compiled code for the next operators wants them
                return out[:n_tokens].contiguous()
        return out[:n_tokens]

    def stored(self) -> StoredWeight:
        return {"weight": self._packed.to_dense()[: self.out_features]}

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        some = self.stored()["weight"][rows] if self._tiles is None else self._tiles.rows(rows)
        return some.float()


_fbgemm_packing = threading.Lock()  # FBGEMM's order is chosen by a setting of the process


class Int8(Kernel):
    """Inputs of eight bits, each token with a scale of its own, times whole rows of eight bits.

    By FBGEMM. Sums are exact, so a token's product doesn't depend on the other tokens. Inputs of a
    weight that isn't rotated may have outliers: they have two digits of eight bits, the second of
    what the first leaves, which takes as long for one token, and twice as long for many.
    """

    opaque = True
    reads_rows = False

    def __init__(self, stored: StoredWeight, form: Form, block_size: int, owned: bool = False):
        super().__init__(stored)
        self._owned = owned  # whether nobody else reads the tensors
        self._form, self._zero = form, stored.get("zero")
        self._matrix, self._block_size = None, 1
        if not isinstance(form, Grouped):
            self._block_size = block_size
            self._matrix = hadamard(block_size, torch.device("cpu"), torch.float32)
        self._pack(stored["weight"], stored["scale"][:, 0])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rotated = x.float() if self._matrix is None else rotate(x.float(), self._matrix)
        # The largest of absolute values, without a tensor of these.
        ends = rotated.amax(dim=1, keepdim=True), rotated.amin(dim=1, keepdim=True).neg_()
        largest = torch.maximum(*ends).clamp_(min=_SMALLEST)
        scale = LEVELS / largest
        if self._matrix is None:
            scaled = rotated * scale
            first = scaled.round()
            second = (scaled - first).mul_(2 * LEVELS)
            out, rest = self._multiply(torch.cat((first, second))).chunk(2)
            out = rest.div_(2 * LEVELS).add_(out)
        else:
            out = self._multiply(rotated.mul_(scale))
        out = out.mul_(largest / LEVELS)
        if self._zero is not None:
            out.addcmul_(rotated.sum(dim=1, keepdim=True), self._zero[:, 0].float())
        return out.to(x.dtype)

    def _pack(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        zero = torch.zeros(self.out_features, dtype=torch.long)
        with _fbgemm_packing:
            engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = "fbgemm"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # such tensors are deprecated, kernels aren't
                    weight = torch._make_per_channel_quantized_tensor(weight, scale, zero, 0)
                self._packed = torch.ops.quantized.linear_prepack(weight, None)
            finally:
                torch.backends.quantized.engine = engine

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of inputs, rounded to ``LEVELS`` on either side; they may change."""
        out: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, 1.0, LEVELS + 1, self._packed
        )
        return out

    def _unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        return weight.int_repr(), weight.q_per_channel_scales()

    def stored(self) -> StoredWeight:
        weight, scale = self._unpack()
        dtype = self._form.dtypes()["scale"]
        stored = {"weight": weight, "scale": scale[:, None].to(dtype)}
        return stored if self._zero is None else {**stored, "zero": self._zero}

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        stored = {name: part[rows] for name, part in self.stored().items()}
        return self._form.dequantize(stored, self._block_size)


class OneDnnInt8(Int8):
    """The same by oneDNN, which multiplies many tokens four times as fast with AMX.

    (512 tokens by 5632 x 2048 weights; compiled code multiplies few.)
    """

    @staticmethod
    @functools.cache
    def is_fastest() -> bool:
        """Return whether the processor has AMX, and oneDNN gives weights back as they were."""
        if not CPU.get("amx_int8") or not torch.backends.mkldnn.is_available():
            return False
        weight = torch.arange(-127, 128).view(15, 17).repeat(6, 7).to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        return torch.equal(packed.to_dense().T, weight)

    def _pack(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self._scale = scale.float().contiguous()
        self._zeros = torch.zeros(len(scale), dtype=torch.int32)
        self._tiles = Tiles.find(self._packed, weight) if self._zero is None else None
        if self._tiles is not None:
            self._of_outputs = self._tiles.padded(self._scale)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        n_rows = len(x) if self._matrix is not None else 2 * len(x)
        if self._tiles is None or n_rows > FEW_TOKENS:
            return super().product(x)
        return self._tiles.int8_product(x, self._block_size, self._of_outputs, x.dtype)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        # fmt: off
        # To even halfway, as compiled code rounds: the last bits are then the nearest whole number.
        codes = x.add_(1.5 * 2**23 + LEVELS + 1).view(torch.int32).to(torch.uint8)
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, LEVELS + 1, self._packed, self._scale, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )
        # fmt: on
        return out

    def _unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._packed.to_dense().T.contiguous(), self._scale


class TiledInt8(Int8):
    """The same by code that numba compiles, for processors without AMX (``llama[fast]``).

    Each ``SPAN`` of a token's inputs has a scale.
    """

    reads_rows = True

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Return whether it can be compiled here.

        Before torch 2.11, which doesn't tell what the processor can do, FBGEMM finds out.
        """
        return weight.shape[1] % 64 == 0 and bool(CPU) and has_numba()

    def _pack(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        is_half = self._matrix is not None  # else the products of two digits are added up
        self._tiles, self._scale = Tiles.order(weight, is_half, self._owned), scale.float()
        self._of_outputs = self._tiles.padded(self._scale)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if self._zero is None else torch.float32
        out = self._tiles.int8_product(x, self._block_size, self._of_outputs, dtype)
        if self._zero is not None:
            sums = x.sum(dim=1, keepdim=True, dtype=torch.float32)
            out.addcmul_(sums, self._zero[:, 0].float())
        return out.to(x.dtype)

    def _unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tiles.weight(), self._scale

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        dtype = self._form.dtypes()["scale"]
        stored = {"weight": self._tiles.rows(rows), "scale": self._scale[rows, None].to(dtype)}
        if self._zero is not None:
            stored["zero"] = self._zero[rows]
        return self._form.dequantize(stored, self._block_size)


def int8_kernel(weight: torch.Tensor) -> type[Int8] | None:
    """Return the fastest kernel for whole rows of eight bits; None where there is none."""
    if HAS_FBGEMM and OneDnnInt8.is_fastest():
        return OneDnnInt8
    if TiledInt8.supports(weight):
        return TiledInt8
    return Int8 if HAS_FBGEMM else None


class Int4(digits.Int4):
    """PyTorch's int4 operator, in its order; for many tokens, tiles are widened and multiplied.

    Its order is that of tiles of 64 outputs, or of 32 without AVX-512: a tile has a row of bytes
    for each input, of which one holds the codes of outputs that lie half a tile apart. It is fast
    in bfloat16 only, to which few tokens of other dtypes are rounded.
    """

    opaque = True
    multiple = 64

    def _pack(self, codes: torch.Tensor) -> None:
        self._packed = _pack_tiles(codes, int4_tile())

    def _multiply(self, x: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), self._packed, self._digits.group_size, both
        )

    def _widen(self, x: torch.Tensor) -> torch.Tensor:
        half = int4_tile() // 2
        tiles = self._packed.view(len(self._packed) // (2 * half), -1, half)
        n_tiles, in_features, _ = tiles.shape
        dtype = fast_dtype(x.dtype)
        out = x.new_empty(len(x), n_tiles, 2, half)  # each half's products side by side
        wide = x.to(dtype)
        some = max(1, _WIDENED // (in_features * half))
        for first in range(0, n_tiles, some):
            which = slice(first, first + some)
            # Rows of eight bytes and more, which a copy moves at once.
            bytes_ = tiles[which].view(torch.int64).transpose(0, 1).contiguous().view(torch.uint8)
            for i, codes in enumerate((bytes_ & 15, bytes_ >> 4)):
                both = self._both.unflatten(2, (-1, 2, half))[:, :, which, i]
                weight = self._widened(codes.flatten(1), both.flatten(2, 3))
                out[:, which, i] = (wide @ weight.to(dtype)).unflatten(1, (-1, half))
        return out.flatten(1)[:, : self.out_features].contiguous()

    def _widened(self, codes: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        """Return the weight of some outputs, float32, shape (in_features, outputs)."""
        scales, zeros = self._digits.scales(both)  # (groups, outputs)
        groups = self._digits.values(codes).float().unflatten(0, (-1, self._digits.width))
        groups.mul_(scales.float().unsqueeze(1))
        if zeros is not None:
            groups.add_(zeros.float().unsqueeze(1))
        return groups.flatten(0, 1)

    def _unpack(self, rows: torch.Tensor | None) -> torch.Tensor:
        tile = int4_tile()
        if rows is None:
            return _unpack_tiles(self._packed, tile)
        bytes_ = self._packed.view(len(self._packed) // tile, -1, tile // 2)
        place = rows % tile
        picked = bytes_[rows // tile, :, place % (tile // 2)]  # (n, in_features)
        return (picked >> (place // (tile // 2) * 4)[:, None].to(torch.uint8)) & 15


def _pack_tiles(codes: torch.Tensor, tile: int) -> torch.Tensor:
    """Bring codes, shape (out_features, in_features), into the int4 operator's order."""
    out_features, in_features = codes.shape
    first, second = codes.view(-1, 2, tile // 2, in_features).transpose(2, 3).unbind(1)
    return (first | (second << 4)).reshape(out_features, in_features // 2)


def _unpack_tiles(packed: torch.Tensor, tile: int) -> torch.Tensor:
    """Return the codes that ``_pack_tiles`` packed, shape (out_features, in_features)."""
    bytes_ = packed.view(len(packed) // tile, -1, tile // 2)  # (tiles, in_features, tile / 2)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=1).transpose(2, 3).flatten(0, 2)


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
