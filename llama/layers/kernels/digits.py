"""Weights in groups as digits of four bits, which PyTorch's int4 operators multiply.

Their groups have 32, 64, 128 or 256 inputs, each with a bfloat16 scale and zero, and a digit d of
a group counts as ``(d - 8) * scale + zero``. Other forms are brought into this one exactly:

- larger groups, or whole rows, repeat their scale;
- of groups of 16 codes two lie side by side, and each has its own call, in which the inputs of its
  neighbour are zero;
- eight bits in groups of 32 or more are two planes beside each other, ``16 * high + low``, whose
  scales are ``16 * scale`` and ``scale``;
- eight bits in groups of 16, without zeros, are one group of 32: the high digits, whose inputs are
  16 times as large, then the low ones.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F

from llama.layers.kernels.base import Kernel
from llama.layers.quantization import Grouped, StoredWeight

GROUP_SIZES = (256, 128, 64, 32)  # of the operators


class Digits:
    """The digits of a form's codes: K inputs are ``n_digits * K`` of the operator's.

    Args:
        form: the form of a weight without an order.
        in_features: the weight's inputs, K.
    """

    def __init__(self, form: Grouped, in_features: int):
        self.form = form
        size = form.group_size or in_features
        self.in_halves = size == 16  # of the operator's groups
        fitting = [n for n in GROUP_SIZES if size % n == 0]
        self.group_size = 32 if self.in_halves else fitting[0]
        self.repeats = 1 if self.in_halves else size // self.group_size
        self.n_digits = 2 if form.codes == "int8" else 1
        self.n_calls = 2 if self.in_halves and self.n_digits == 1 else 1

    @staticmethod
    def supports(form: Grouped, weight: torch.Tensor) -> bool:
        """Return whether operators multiply by a weight that is stored in a form."""
        in_features = weight.shape[1] * (2 if form.codes == "int4" else 1)
        size = form.group_size or in_features
        if form.codes == "float8" or in_features % 32:
            return False
        if size == 16 and form.codes == "int8":
            # The digits lie between -8 and 7.
            return not form.has_zeros and (weight.device.type == "meta" or bool(weight.max() < 120))
        return size == 16 or size % 32 == 0

    def split(self, stored: StoredWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the digits of a weight of N outputs, and scales and zeros of each call.

        Returns:
            uint8, shape (N, n_digits * K), and bfloat16, (n_calls, n_groups, N, 2).
        """
        codes, form = stored["weight"], self.form
        scales, *rest = (stored[name].bfloat16() for name in form.scale_names)
        zeros = rest[0] if rest else torch.zeros_like(scales)
        if form.codes == "int4":
            digits = form.unpack(codes)
        elif self.in_halves:
            groups = codes.view(torch.uint8).unflatten(1, (-1, 16)) + 136
            digits = torch.stack((groups >> 4, groups & 15), dim=2).flatten(1)
        else:
            codes = codes.view(torch.uint8)
            digits = torch.cat(((codes >> 4) ^ 8, codes & 15), dim=1)
            scales, zeros = torch.cat((16 * scales, scales), 1), torch.cat((zeros, 8 * scales), 1)
        both = torch.stack((scales, zeros), dim=2).transpose(0, 1)  # (n_groups, N, 2)
        both = both.repeat_interleave(self.repeats, 0)
        return digits, both.unflatten(0, (-1, self.n_calls)).transpose(0, 1).contiguous()

    def inputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each call's inputs: (n_tokens, K) to (n_tokens, n_digits * K)."""
        if self.n_digits == 2 and self.in_halves:
            groups = x.unflatten(1, (-1, 16))
            return [torch.stack((16 * groups, groups), dim=2).flatten(1)]
        if self.n_digits == 2:
            return [torch.cat((x, x), dim=1)]
        if self.n_calls == 1:
            return [x]
        groups = x.unflatten(1, (-1, 2, 16))
        calls = [torch.zeros_like(groups), torch.zeros_like(groups)]
        for half, call in enumerate(calls):
            call[:, :, half] = groups[:, :, half]
        return [call.flatten(1) for call in calls]

    def values(self, digits: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the int8 values of digits, ``n_digits * K`` of which lie along a dimension."""
        if self.n_digits == 1:
            return (digits - 8).view(torch.int8)
        if self.in_halves:
            high, low = digits.unflatten(dim, (-1, 2, 16)).unbind(dim + 1)
            return ((high << 4) + low).sub_(136).view(torch.int8).flatten(dim, dim + 1)
        high, low = digits.unflatten(dim, (2, -1)).unbind(dim)
        return ((high ^ 8) << 4).bitwise_or_(low).view(torch.int8)

    def scales(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales and zeros of groups of ``width`` from those of the calls.

        Args:
            both: shape (n_calls, n_groups, n, 2).

        Returns:
            Shape (groups, n) each; None for zeros that the form doesn't have.
        """
        n_groups = both.shape[1]
        scales, zeros = both.transpose(0, 1).flatten(0, 1).unbind(2)
        if self.n_digits == 2 and not self.in_halves:
            scales, zeros = scales[n_groups // 2 :], zeros[: n_groups // 2]
        return scales, zeros if self.form.has_zeros else None

    @property
    def width(self) -> int:
        """How many inputs share a scale."""
        return 16 if self.in_halves else self.group_size

    def joined(self, digits: torch.Tensor, both: torch.Tensor) -> StoredWeight:
        """Return the stored tensors that ``split`` divided."""
        values = self.values(digits, 1)
        is_int4 = self.form.codes == "int4"
        weight = self.form.pack(values.view(torch.uint8) + 8) if is_int4 else values
        parts = [part for part in self.scales(both) if part is not None]
        parts = [part[:: self.repeats].T.to(self.form.scale_dtype) for part in parts]
        return {"weight": weight, **dict(zip(self.form.scale_names, parts, strict=True))}


class Int4(Kernel):
    """PyTorch's int4 operator for few tokens; for many, some of the weight is widened at a time."""

    few_tokens = 32  # of one digit, up to which the operator is faster than widening
    multiple = 8  # of outputs, that the operator takes

    def __init__(self, stored: StoredWeight, form: Grouped):
        super().__init__(stored)
        in_features = stored["weight"].shape[1] * (2 if form.codes == "int4" else 1)
        self._digits = Digits(form, in_features)
        digits, self._both = self._digits.split(stored)
        missing = -self.out_features % self.multiple
        if missing:
            digits = F.pad(digits, (0, 0, 0, missing))
            self._both = F.pad(self._both, (0, 0, 0, missing))
        self._pack(digits)
        self._few_tokens = self.few_tokens // (self._digits.n_digits * self._digits.n_calls)

    @abstractmethod
    def _pack(self, codes: torch.Tensor) -> None:
        """Keep digits, shape (outputs, operator's inputs), in the operator's order."""

    @abstractmethod
    def _unpack(self, rows: torch.Tensor | None) -> torch.Tensor:
        """Return the digits of some outputs or of all, as ``_pack`` took them."""

    @abstractmethod
    def _multiply(self, x: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        """Return the operator's product."""

    @abstractmethod
    def _widen(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of many tokens."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self._few_tokens:
            return self._widen(x)
        inputs = self._digits.inputs(x.bfloat16())  # 16 times float16 may exceed its range
        out = self._multiply(inputs[0], self._both[0])
        for more, both in zip(inputs[1:], self._both[1:], strict=True):
            out = out + self._multiply(more, both)
        return out[:, : self.out_features].to(x.dtype).contiguous()  # as a collective wants it

    def stored(self) -> StoredWeight:
        digits = self._unpack(None)[: self.out_features]
        return self._digits.joined(digits, self._both[:, :, : self.out_features])

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self._digits.form.dequantize(
            self._digits.joined(self._unpack(rows), self._both[:, :, rows])
        )


class Ordered(Kernel):
    """A kernel whose inputs have an order of their own (GPTQ's ``desc_act``)."""

    def __init__(self, kernel: Kernel, order: torch.Tensor):
        self.out_features, self.min_tokens = kernel.out_features, kernel.min_tokens
        self.reads_rows = kernel.reads_rows
        self.kernel, self._order = kernel, order

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x.index_select(1, self._order))

    def stored(self) -> StoredWeight:
        return {**self.kernel.stored(), "order": self._order}

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        weights = self.kernel.weights(rows)
        return torch.empty_like(weights).index_copy_(1, self._order.long(), weights)
