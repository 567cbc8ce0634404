"""Quantised weights: how a checkpoint stores them (``checkpoint.rounding`` makes them).

int8: a row (output) has one scale, and codes lie symmetrically around zero. Kernels may round
inputs to eight bits as well, so both are first multiplied, in blocks, by a Hadamard matrix: this
leaves their product unchanged and spreads outliers over their block (QuaRot,
https://arxiv.org/abs/2404.00456).

int4: a group of a row's weights has its own scale and zero, chosen for a small squared error.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F

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
class Int8:
    """One scale a row; the rotated weight is ``weight * scale``.

    ``weight`` is int8, shape (out_features, in_features), ``scale`` float32, (out_features, 1).
    """

    name = "int8"

    def applies_to(self, module: str) -> bool:
        """Return whether a module's weight is quantised: in the layers, all but norms.

        A token reads one row of the embedding, which eight bits wouldn't make faster. An error in
        the output's weight is an error in the logits: greedy text would change at near ties.
        """
        return module.startswith("layers.") and not module.endswith("norm")

    def params(self) -> dict[str, Any]:
        return {"format": self.name}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"weight": torch.int8, "scale": torch.float32}

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
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
class Int4:
    """A scale and a zero for each group; a weight is ``(code - 8) * scale + zero``.

    ``weight`` is uint8, shape (out_features, in_features / 2), the first of two codes in the
    lower bits; ``scales`` and ``zeros`` are bfloat16, (out_features, in_features / group_size).
    """

    group_size: int = 64
    name = "int4"

    def applies_to(self, module: str) -> bool:
        """Return whether a module's weight is quantised: all but norms."""
        return not module.endswith("norm")

    def params(self) -> dict[str, Any]:
        return {"format": self.name, "group_size": self.group_size}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"weight": torch.uint8, "scales": torch.bfloat16, "zeros": torch.bfloat16}

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        groups = (out_features, in_features // self.group_size)
        return {"weight": (out_features, in_features // 2), "scales": groups, "zeros": groups}

    def block_size(self, in_features: int) -> int:
        """Return how many inputs share a scale, which no two ranks can share."""
        return self.group_size

    def dequantize(self, stored: Mapping[str, torch.Tensor], block: int) -> torch.Tensor:
        """Return the float32 weight of whole tensors, or of some rows or groups of them."""
        codes = self.unpack(stored["weight"]).float() - 8
        groups = codes.unflatten(1, (-1, self.group_size))
        scales, zeros = (stored[name].float().unsqueeze(2) for name in ("scales", "zeros"))
        return torch.addcmul(zeros, groups, scales).flatten(1)

    @staticmethod
    def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> StoredWeight:
        """Store codes from 0 to 15, two in a byte."""
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        return {"weight": packed, "scales": scales, "zeros": zeros}

    @staticmethod
    def unpack(packed: torch.Tensor) -> torch.Tensor:
        """Return the codes, from 0 to 15, of which each byte holds two."""
        return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)

    @staticmethod
    def padded(
        stored: Mapping[str, torch.Tensor], multiple: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill ``out_features`` up to a multiple with zeros, as operators want it.

        Returns:
            The codes, and scales and zeros in one tensor, (n_groups, out_features, 2).
        """
        extra = (0, 0, 0, -len(stored["weight"]) % multiple)
        weight, scales, zeros = (F.pad(stored[n], extra) for n in ("weight", "scales", "zeros"))
        return weight, torch.stack((scales, zeros), dim=2).transpose(0, 1).contiguous()


Scheme = Int8 | Int4
