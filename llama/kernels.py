"""Products with quantised weights: the quickest kernel that PyTorch has for a device.

A kernel holds the weights of one or more layers that multiply the same input, one below the other.
"""

import functools
import itertools
import threading
import warnings
import weakref
from collections.abc import Mapping, MutableMapping

import torch
import torch.nn.functional as F

from llama.layers.quantization import Int4, Int8, Scheme, StoredWeight, hadamard, rotate

# FBGEMM's int8 kernels read a packed weight once for up to eight rows, at most of the memory's
# speed, where oneDNN's and PyTorch's own reach 0.6 of it.
_HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
_FEW_ROWS = 64  # up to which the int4 kernel is quicker than to widen the weight
_TILES = 8  # of the int4 kernel, that are widened at a time, so that they stay in the cache


def _activation_levels() -> int:
    """How many steps an input has on either side of zero.

    Before VNNI two products of eight bits are added in sixteen, which half as many steps can't
    overflow.
    """
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return 127 if capabilities.get("avx512_vnni") else 63


_LEVELS = _activation_levels()


class Kernel:
    """Quantised weights of one or more layers, one below the other, in the order of a kernel."""

    width: int  # the rows of all

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n_tokens, in_features) to (n_tokens, width), in the dtype of ``x``."""
        raise NotImplementedError

    def parts(self) -> StoredWeight:
        """The weights as a checkpoint stores them."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


class _CpuKernel(Kernel):
    """One that compiled code knows by its number: it can't hold what is packed."""

    def __init__(self, width: int):
        self.width = width
        number = next(_numbers)
        _kernels[number] = self
        self._number = torch.tensor(number, device="cpu")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return self.product(x)
        out: torch.Tensor = torch.ops.llama.quantized_product(x, self._number, self.width)
        return out


_packing = threading.Lock()  # FBGEMM's order is chosen by a setting of the process
_kernels: MutableMapping[int, _CpuKernel] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("llama", "FRAGMENT")
_library.define("quantized_product(Tensor x, Tensor number, int width) -> Tensor")


def _quantized_product(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    return _kernels[int(number)].product(x)


def _quantized_product_shape(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], width)


_library.impl("quantized_product", _quantized_product, "CPU")
torch.library.register_fake("llama::quantized_product", _quantized_product_shape, lib=_library)


class _Int8Cpu(_CpuKernel):
    """Rows of eight bits, each by its own range, times weights of eight bits, by FBGEMM.

    Sums are exact, so a row's product doesn't depend on what other rows there are.
    """

    def __init__(self, parts: StoredWeight, block: int):
        super().__init__(len(parts["weight"]))
        self._matrix = hadamard(block, torch.device("cpu"), torch.float32)
        scale = parts["scale"][:, 0]
        zero = torch.zeros(self.width, dtype=torch.long)
        with _packing:
            engine = torch.backends.quantized.engine
            torch.backends.quantized.engine = "fbgemm"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # such tensors are to go, their kernels aren't
                    weight = torch._make_per_channel_quantized_tensor(
                        parts["weight"], scale, zero, 0
                    )
                self._packed = torch.ops.quantized.linear_prepack(weight, None)
            finally:
                torch.backends.quantized.engine = engine

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = rotate(x.float(), self._matrix)
        largest = rows.abs().amax(dim=1, keepdim=True)
        largest = largest.clamp_(min=torch.finfo(torch.float32).tiny)
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / largest, 1 / _LEVELS, _LEVELS + 1, self._packed
        )
        return out.mul_(largest).to(x.dtype)

    def parts(self) -> StoredWeight:
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        scale = weight.q_per_channel_scales().float()
        return {"weight": weight.int_repr(), "scale": scale[:, None]}


class _Int8Plain(Kernel):
    """Weights that are widened before they are multiplied; one row, as they are multiplied.

    The latter by PyTorch's kernel, or by what the compiler makes of a sum of products.
    """

    def __init__(self, parts: StoredWeight, block: int, dtype: torch.dtype):
        self._parts = parts
        self._matrix = hadamard(block, parts["weight"].device, dtype)
        self.width = len(parts["weight"])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight, scale = self._parts["weight"], self._parts["scale"][:, 0]
        x = rotate(x, self._matrix)
        if len(x) == 1 and torch.compiler.is_compiling():
            return ((weight * x.float()).sum(dim=1) * scale)[None].to(x.dtype)
        if len(x) == 1 and x.device.type in ("cpu", "mps"):
            return torch._weight_int8pack_mm(x, weight, scale.to(x.dtype))
        if x.dtype == torch.float16:  # whose range whole numbers would soon leave
            return F.linear(x, (weight * scale[:, None]).to(x.dtype))
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    def parts(self) -> StoredWeight:
        return self._parts


class _Int4Cpu(_CpuKernel):
    """PyTorch's kernel for few rows; for many, tiles of the weight are widened and multiplied.

    Its order is that of tiles of 64 outputs, or of 32 without AVX-512: a tile has a row of bytes
    for each input, of which one holds the numbers of outputs that lie half a tile apart. It is
    quick in bfloat16 only, which few rows of other dtypes are rounded to.
    """

    def __init__(self, parts: StoredWeight, scheme: Int4):
        super().__init__(len(parts["weight"]))
        self._scheme = scheme
        weight, self._scales_and_zeros = _padded(parts, 64)
        self._packed = _pack_tiles(scheme.unpack(weight), _int4_tile())

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= _FEW_ROWS:
            out = torch._weight_int4pack_mm_for_cpu(
                x.bfloat16().contiguous(),
                self._packed,
                self._scheme.group_size,
                self._scales_and_zeros,
            )
        else:
            n_tiles = len(self._packed) // _int4_tile()
            some = [range(n_tiles)[first : first + _TILES] for first in range(0, n_tiles, _TILES)]
            out = torch.cat([x @ self._widened(tiles, x.dtype) for tiles in some], dim=1)
        return out[:, : self.width].to(x.dtype).contiguous()

    def _widened(self, tiles: range, dtype: torch.dtype) -> torch.Tensor:
        """The weight's part of some tiles, shape (in_features, their outputs)."""
        rows = slice(tiles.start * _int4_tile(), tiles.stop * _int4_tile())
        numbers = _unpack_tiles(self._packed[rows], _int4_tile())  # (in_features, outputs)
        scales, zeros = self._scales_and_zeros[:, None, rows].to(dtype).movedim(3, 0).contiguous()
        groups = numbers.to(dtype).sub_(8).unflatten(0, (-1, self._scheme.group_size))
        return torch.addcmul(zeros, groups, scales).flatten(0, 1)

    def parts(self) -> StoredWeight:
        numbers = _unpack_tiles(self._packed, _int4_tile()).T[: self.width]
        scales, zeros = self._scales_and_zeros[:, : self.width].transpose(0, 1).unbind(2)
        return self._scheme.pack(numbers, scales, zeros)


def _padded(parts: StoredWeight, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Int4's numbers, and scales and zeros of shape (n_groups, out_features, 2), as kernels want.

    Zeros fill ``out_features`` up to a multiple.
    """
    extra = (0, 0, 0, -len(parts["weight"]) % multiple)
    weight, scales, zeros = (F.pad(parts[name], extra) for name in ("weight", "scales", "zeros"))
    return weight, torch.stack((scales, zeros), dim=2).transpose(0, 1).contiguous()


def _pack_tiles(numbers: torch.Tensor, tile: int) -> torch.Tensor:
    """Numbers, shape (out_features, in_features), in the order of the int4 kernel for CPUs."""
    out_features, in_features = numbers.shape
    first, second = numbers.view(-1, 2, tile // 2, in_features).transpose(2, 3).unbind(1)
    return (first | (second << 4)).reshape(out_features, in_features // 2)


def _unpack_tiles(packed: torch.Tensor, tile: int) -> torch.Tensor:
    """The numbers that ``_pack_tiles`` packed, shape (in_features, out_features)."""
    bytes_ = packed.view(len(packed) // tile, -1, tile // 2)  # (tiles, in_features, tile / 2)
    numbers = torch.stack((bytes_ & 15, bytes_ >> 4), dim=2)
    return numbers.transpose(0, 1).flatten(1)  # (in_features, out_features)


@functools.cache
def _int4_tile() -> int:
    """How many outputs a tile of the int4 kernel has; 0 where its order is another."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=generator)
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
    for tile in (64, 32):
        if torch.equal(packed, _pack_tiles(numbers.to(torch.uint8), tile)):
            return tile
    return 0


class _Int4Plain(Kernel):
    """Weights that are widened where they are multiplied."""

    def __init__(self, parts: StoredWeight, scheme: Int4):
        self._parts = parts
        self._scheme = scheme
        self.width = len(parts["weight"])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._scheme.dequantize(self._parts, 1).to(x.dtype))

    def parts(self) -> StoredWeight:
        return self._parts


class _Int4Cuda(Kernel):
    """PyTorch's "tinygemm" kernel, for bfloat16 on CUDA from compute capability 8.0."""

    _INNER_TILES = 8  # of 16 inputs, which its order keeps together

    def __init__(self, parts: StoredWeight, scheme: Int4):
        self.width = len(parts["weight"])
        self._scheme = scheme
        self._in_features = 2 * parts["weight"].shape[1]
        weight, self._scales_and_zeros = _padded(parts, 8)
        # It takes the first of two numbers from the upper bits.
        swapped = (weight << 4) | (weight >> 4)
        self._packed = torch._convert_weight_to_int4pack(swapped, self._INNER_TILES)

    @staticmethod
    def takes(parts: StoredWeight, dtype: torch.dtype) -> bool:
        weight = parts["weight"]
        return (
            weight.device.type == "cuda"
            and torch.version.hip is None
            and dtype == torch.bfloat16
            and torch.cuda.get_device_capability(weight.device) >= (8, 0)
            and 2 * weight.shape[1] % (16 * _Int4Cuda._INNER_TILES) == 0
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch._weight_int4pack_mm(
            x.contiguous(), self._packed, self._scheme.group_size, self._scales_and_zeros
        )
        return out[:, : self.width]

    def parts(self) -> StoredWeight:
        # With scale 1 and zero 8 a product with the identity is the numbers themselves.
        identity = torch.eye(self._in_features, dtype=torch.bfloat16, device=self._packed.device)
        plain = self._scales_and_zeros.clone()
        plain[..., 0], plain[..., 1] = 1, 8
        numbers = torch._weight_int4pack_mm(
            identity, self._packed, self._scheme.group_size, plain
        ).T[: self.width]
        scales, zeros = self._scales_and_zeros[:, : self.width].transpose(0, 1).unbind(2)
        return self._scheme.pack(numbers.to(torch.uint8), scales, zeros)


def make_kernel(parts: StoredWeight, scheme: Scheme, block: int, dtype: torch.dtype) -> Kernel:
    """The quickest kernel for parts on their device.

    Args:
        block: how many inputs the parts were rotated by (int8).
        dtype: the inputs'.
    """
    on_cpu = parts["weight"].device.type == "cpu"
    if isinstance(scheme, Int8):
        if on_cpu and _HAS_FBGEMM:
            return _Int8Cpu(parts, block)
        return _Int8Plain(parts, block, dtype)
    if on_cpu and _int4_tile():
        return _Int4Cpu(parts, scheme)
    if _Int4Cuda.takes(parts, dtype):
        return _Int4Cuda(parts, scheme)
    return _Int4Plain(parts, scheme)
