"""Kernels for CUDA."""

import torch

from llama.layers import quantization
from llama.layers.capability import Capability
from llama.layers.kernels.base import Kernel
from llama.layers.quantization import StoredWeight


class Int4(Kernel):
    """PyTorch's "tinygemm" operator, for bfloat16 from compute capability 8.0 on."""

    _INNER_TILES = 8  # of 16 inputs, which its order keeps together

    def __init__(self, stored: StoredWeight, scheme: quantization.Int4):
        super().__init__(stored)
        self._scheme = scheme
        self._in_features = 2 * stored["weight"].shape[1]
        weight, self._scales_and_zeros = scheme.padded(stored, 8)
        # It takes the first of two codes from the upper bits.
        swapped = (weight << 4) | (weight >> 4)
        self._packed = torch._convert_weight_to_int4pack(swapped, self._INNER_TILES)

    @staticmethod
    def supports(weight: torch.Tensor, dtype: torch.dtype, capability: Capability) -> bool:
        """Return whether the operator takes a packed weight and inputs of a dtype."""
        return (
            capability.kind == "cuda"
            and capability.compute >= (8, 0)
            and dtype == torch.bfloat16
            and 2 * weight.shape[1] % (16 * Int4._INNER_TILES) == 0
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self._scales_and_zeros)

    def stored(self) -> StoredWeight:
        # With scale 1 and zero 8 a product with the identity is the codes themselves.
        identity = torch.eye(self._in_features, dtype=torch.bfloat16, device=self._packed.device)
        plain = self._scales_and_zeros.clone()
        plain[..., 0], plain[..., 1] = 1, 8
        codes = self._multiply(identity, plain).T.to(torch.uint8)
        scales, zeros = self._scales_and_zeros[:, : self.out_features].transpose(0, 1).unbind(2)
        return self._scheme.pack(codes, scales, zeros)

    def _multiply(self, x: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch._weight_int4pack_mm(
            x.contiguous(), self._packed, self._scheme.group_size, scales_and_zeros
        )
        return out[:, : self.out_features].contiguous()  # as NCCL wants it
