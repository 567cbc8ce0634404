"""Kernels for every device: weights as they are stored, widened where they are multiplied."""

import torch
import torch.nn.functional as F

from llama.layers.capability import Capability
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Grouped, StoredWeight, hadamard, rotate


class _Plain(Kernel):
    def __init__(self, stored: StoredWeight):
        super().__init__(stored)
        self._stored = stored

    def stored(self) -> StoredWeight:
        return self._stored


class Joined(_Plain):
    """Unquantised weights of layers that read the same input, in one product."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._stored["weight"])

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self._stored["weight"][rows].float()


class Int8(_Plain):
    """Widened before they are multiplied; with one token, while they are.

    The latter by PyTorch's operator, or by compiled code for a sum of products.
    """

    def __init__(
        self, stored: StoredWeight, block_size: int, dtype: torch.dtype, capability: Capability
    ):
        super().__init__(stored)
        self._matrix = hadamard(block_size, stored["weight"].device, dtype)
        self._has_operator = capability.kind in ("cpu", "mps")

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight, scale = self._stored["weight"], self._stored["scale"][:, 0]
        x = rotate(x, self._matrix)
        if len(x) == 1 and torch.compiler.is_compiling():
            return ((weight * x.float()).sum(dim=1) * scale)[None].to(x.dtype)
        if len(x) == 1 and self._has_operator:
            return torch._weight_int8pack_mm(x, weight, scale.to(x.dtype))
        if x.dtype == torch.float16:  # sums of integers would soon exceed its range
            return F.linear(x, (weight * scale[:, None]).to(x.dtype))
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        rotated = self._stored["weight"][rows].float() * self._stored["scale"][rows]
        return rotate(rotated, self._matrix.float())


class Widened(_Plain):
    """Widened whole for each product, in float32."""

    def __init__(self, stored: StoredWeight, form: Grouped):
        super().__init__(stored)
        self._form = form

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._form.dequantize(self._stored).to(x.dtype))

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        names = ("weight", *self._form.scale_names)
        return self._form.dequantize({name: self._stored[name][rows] for name in names})
