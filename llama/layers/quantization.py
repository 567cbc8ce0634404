"""Quantised weights: the forms in which a checkpoint, a layer and a kernel hold them.

Each tensor has its own form. Readers bring those of files, ``checkpoint.rounding`` makes others.

Rotated: a row (output) has one scale, and codes lie symmetrically around zero. Kernels may round
inputs to eight bits as well, so both are first multiplied, in blocks, by a Hadamard matrix: this
leaves their product unchanged and spreads outliers over their block (QuaRot,
https://arxiv.org/abs/2404.00456).

Grouped: a group of a row's weights has its own scale and, perhaps, its own zero.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch

StoredWeight = dict[str, torch.Tensor]
"""A weight as a checkpoint stores it: its tensors by the last part of their names."""

_BLOCK = 64  # of the Hadamard matrix, at most


@functools.cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the symmetric orthogonal Hadamard matrix of a size that is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < size:
        upper = torch.cat((matrix, matrix), dim=1)
        matrix = torch.cat((upper, torch.cat((matrix, -matrix), dim=1)))
    return (matrix / size**0.5).to(device, dtype)


def rotate(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply blocks of the last dimension by a Hadamard matrix, which is its own inverse."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


@dataclass(frozen=True)
class Rotated:
    """One scale a row of int8 codes; the rotated weight is ``weight * scale``.

    ``weight`` is int8, shape (out_features, in_features), ``scale`` float32, (out_features, 1).
    """

    name = "int8"

    def params(self) -> dict[str, Any]:
        return {"format": self.name}

    def in_dtype(self, dtype: torch.dtype) -> "Rotated":
        """Return the form in a network of a dtype: it is the same in all."""
        return self

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"weight": torch.int8, "scale": torch.float32}

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (out_features, in_features), "scale": (out_features, 1)}

    def block_size(self, in_features: int) -> int:
        """Return how many inputs are rotated together, which no two ranks can share.

        Two ranks can always divide an even width; four can divide the published ones.
        """
        return max(1, gcd(in_features, 2 * _BLOCK) // 2)

    def dequantize(self, stored: Mapping[str, torch.Tensor], block: int) -> torch.Tensor:
        """Return the float32 weight of whole tensors, or of some rows or blocks of them."""
        rotated = stored["weight"].float() * stored["scale"]
        return rotate(rotated, hadamard(block, rotated.device, rotated.dtype))


@dataclass(frozen=True)
class Grouped:
    """Codes, with a scale and a zero for each group of a row's inputs: ``value * scale + zero``.

    ``weight`` holds the codes of (out_features, in_features) weights: of int4 two in a byte, uint8,
    the first in the lower bits, of which ``code - 8`` is the value; int8 and float8_e4m3fn are
    values themselves. ``scales`` and ``zeros`` are (out_features, in_features / group_size); if all
    inputs are one group, ``scale`` and ``zero``, (out_features, 1). With an order, column i has the
    weights of the input ``order[i]``: int32, (in_features,).

    Args:
        codes: "int4", "int8" or "float8".
        group_size: inputs that share a scale; 0 for all.
        has_zeros: whether there are zeros; values lie around zero otherwise.
        scale_dtype: of scales and zeros.
        ordered: whether the columns have an order of their own (GPTQ's ``desc_act``).
    """

    codes: str = "int4"
    group_size: int = 64
    has_zeros: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    ordered: bool = False

    @property
    def name(self) -> str:
        return self.codes

    @property
    def scale_names(self) -> tuple[str, ...]:
        """The names of the scales' and, if there are any, the zeros' tensors."""
        names = ("scales", "zeros") if self.group_size else ("scale", "zero")
        return names if self.has_zeros else names[:1]

    def params(self) -> dict[str, Any]:
        if self.group_size >= 32 and self == Grouped(group_size=self.group_size):
            return {"format": "int4", "group_size": self.group_size}
        return {
            "format": "grouped",
            "codes": self.codes,
            "group_size": self.group_size,
            "zeros": self.has_zeros,
            "scales": str(self.scale_dtype).removeprefix("torch."),
            "order": self.ordered,
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        dtypes = {"weight": _CODES[self.codes]}
        dtypes |= dict.fromkeys(self.scale_names, self.scale_dtype)
        return dtypes | ({"order": torch.int32} if self.ordered else {})

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        width = in_features // 2 if self.codes == "int4" else in_features
        n_groups = in_features // self.group_size if self.group_size else 1
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, width)}
        shapes |= dict.fromkeys(self.scale_names, (out_features, n_groups))
        return shapes | ({"order": (in_features,)} if self.ordered else {})

    def block_size(self, in_features: int) -> int:
        """Return how many inputs no two ranks can share: those of a group; all, with an order."""
        return in_features if self.ordered else self.group_size or 1

    def in_dtype(self, dtype: torch.dtype) -> "Grouped":
        """Return the form in a network of a dtype: half-precision ones have bfloat16 scales.

        Compiled code on a CPU takes finer ones (``kernels.form_in``).
        """
        if dtype == torch.float32 or self.codes == "float8":
            return self
        return replace(self, scale_dtype=torch.bfloat16)

    def values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values of stored codes, (…, in_features)."""
        if self.codes == "int4":
            return self.unpack(codes).to(dtype).sub_(8)
        if self.codes == "float8" and codes.is_cpu:  # where PyTorch converts one after the other
            # The same bits mean 2 ** 8 times less in float16, whose exponents are a bit longer.
            bits = (codes.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4080)
            return bits.view(torch.float16).to(dtype).mul_(256)
        return codes.to(dtype)

    def dequantize(self, stored: Mapping[str, torch.Tensor], block: int = 1) -> torch.Tensor:
        """Return the float32 weight of whole tensors, or of some rows or groups of them."""
        values = self.values(stored["weight"])
        groups = values.unflatten(1, (-1, self.group_size or values.shape[1]))
        scale, *zero = (stored[name].float().unsqueeze(2) for name in self.scale_names)
        groups = groups.mul_(scale)  # one after the other, which is faster than ``addcmul``
        weight = (groups.add_(zero[0]) if zero else groups).flatten(1)
        if "order" not in stored:
            return weight
        restored = torch.empty_like(weight)
        restored[:, stored["order"].long()] = weight
        return restored

    @staticmethod
    def pack(codes: torch.Tensor) -> torch.Tensor:
        """Return codes from 0 to 15, uint8, two in a byte."""
        return codes[..., ::2] | (codes[..., 1::2] << 4)

    @staticmethod
    def unpack(packed: torch.Tensor) -> torch.Tensor:
        """Return the codes, from 0 to 15, of which each byte holds two."""
        pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
        return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)


_CODES = {"int4": torch.uint8, "int8": torch.int8, "float8": torch.float8_e4m3fn}

Form = Rotated | Grouped
