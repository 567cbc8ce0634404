"""Kernels for every device: weights as they are stored, widened where they are multiplied."""

import torch
import torch.nn.functional as F

from llama.layers.capability import Capability, cpu_has_amx, fast_dtype
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Grouped, StoredWeight, hadamard, rotate

_WIDENED = 1 << 20  # weights that a CPU widens at a time
_AMX_ROWS = 1024  # outputs that it widens with AMX: with 512 their products take twice as long


class Stored(Kernel):
    """Keeps a weight's tensors as they are."""

    def __init__(self, stored: StoredWeight):
        super().__init__(stored)
        self._stored = stored

    def stored(self) -> StoredWeight:
        return self._stored


class Joined(Stored):
    """Unquantised weights of layers that read the same input, in one product."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._stored["weight"])

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self._stored["weight"][rows].float()


class Int8(Stored):
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


class Widened(Stored):
    """Widened some rows at a time, which stay in a CPU's cache, in float32.

    Products are in the dtype of the inputs where a CPU is fast at it, else in float32 too. A GPU
    widens to the dtype of the inputs.
    """

    def __init__(self, stored: StoredWeight, form: Grouped, capability: Capability):
        super().__init__(stored)
        self._form = form
        self._on_cpu = capability.kind == "cpu"

    def product(self, x: torch.Tensor) -> torch.Tensor:
        dtype = fast_dtype(x.dtype) if self._on_cpu else x.dtype
        wide, out = x.to(dtype), x.new_empty(len(x), self.out_features)
        some = max(1, (_WIDENED if self._on_cpu else 32 * _WIDENED) // x.shape[1])
        if self._on_cpu and dtype == torch.bfloat16 and cpu_has_amx():
            some = _AMX_ROWS
        for first in range(0, self.out_features, some):
            rows = slice(first, first + some)
            out[:, rows] = self._products(wide, rows)
        return out

    def _products(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        if self._on_cpu or x.dtype != torch.bfloat16 or self._form.has_zeros:
            return F.linear(x, self.weights(rows).to(x.dtype))
        stored = {name: part[rows] for name, part in self._stored.items()}
        [name] = self._form.scale_names
        values = self._form.values(stored["weight"], x.dtype)  # exact: they have eight bits at most
        if not self._form.group_size:
            return F.linear(x, values) * stored[name].T
        values.unflatten(1, (-1, self._form.group_size)).mul_(stored[name].unsqueeze(2))
        return F.linear(x, values)

    def weights(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self._form.dequantize({name: part[rows] for name, part in self._stored.items()})


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``F.rms_norm``'s rows, by operators that take half as long on a CPU."""
    if not x.is_cpu or len(x) == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    h = x.float()
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    scale = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (h * scale).mul_(weight).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``F.linear``'s product, by parts in float32 where a CPU is slow at the dtype."""
    dtype = fast_dtype(x.dtype) if x.is_cpu and len(x) > 1 else x.dtype
    if dtype == x.dtype:
        is_one = len(x) == 1 and x.is_cpu and dtype == torch.bfloat16 and cpu_has_amx()
        if is_one and not torch.compiler.is_compiling():
            return torch.mv(weight, x[0])[None]  # 1.25 times as fast
        return F.linear(x, weight)
    wide, some = x.to(dtype), max(1, _WIDENED // weight.shape[1])
    parts = [F.linear(wide, rows.to(dtype)).to(x.dtype) for rows in weight.split(some)]
    return torch.cat(parts, dim=1)
