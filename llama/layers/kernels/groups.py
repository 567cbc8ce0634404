"""Weights in groups on x86 processors, by code that numba compiles (``llama[fast]``).

Inputs are rounded to eight bits in blocks of 32, each with a scale of its own, as llama.cpp does,
and multiplied in integers. Groups of 16 take hardly longer than groups of 32.
"""

import itertools
from dataclasses import replace

import torch

from llama.layers.capability import cpu_has_amx
from llama.layers.kernels.base import Kernel
from llama.layers.kernels.compiled import BLOCK, HAS_VNNI, TILE, compile_tokens_code, in_tiles
from llama.layers.kernels.machine_code import code, has_numba
from llama.layers.kernels.openmp import by_rows, in_parallel
from llama.layers.quantization import Form, Grouped, StoredWeight

FEW_IN_GROUPS = 96  # tokens up to which integers are faster than widening, with AMX
WIDENED, WIDENED_ROWS = 1 << 22, 1024  # weights, or outputs, that are widened at a time


class Groups(Kernel):
    """Weights in groups, in the order of tiles, multiplied by compiled code in integers.

    With AMX many tokens are multiplied by some outputs' weights at a time, widened to bfloat16.

    Args:
        stored: the weight's tensors.
        form: in groups, with scales in bfloat16 or float16.
        owned: whether nobody else reads the tensors, which are then changed where they are.
    """

    opaque = True

    def __init__(self, stored: StoredWeight, form: Grouped, owned: bool = False):
        super().__init__(stored)
        self._form, self._is_int4 = form, form.codes == "int4"
        self._n_inputs = stored["weight"].shape[1] * (2 if self._is_int4 else 1)
        self._n_groups = stored[form.scale_names[0]].shape[1]
        n_blocks, group_size = self._n_inputs // BLOCK, self._n_inputs // self._n_groups
        in_halves = group_size < BLOCK
        # Blocks of a group are a power of two, or all.
        shift = 0 if in_halves else (group_size // BLOCK - 1).bit_length()
        self._n_sums = n_blocks * (2 if in_halves else 1)
        has_float16 = form.scale_dtype == torch.float16
        self._kind = (self._is_int4, in_halves, shift, form.has_zeros, has_float16)
        self._widened_kind = (self._is_int4, has_float16)
        # Compiled before the weight is changed, and before the first prompt.
        code("numba_groups", "product", *self._kind, True)
        code("numba_rounding", "round_inputs", True)
        self._is_widened = cpu_has_amx()
        if self._is_widened:
            code("numba_groups", "widen", *self._widened_kind)
        compile_tokens_code()
        # Codes are multiplied without signs.
        self._mask = 0x80808080 if HAS_VNNI and not self._is_int4 else 0
        self._stored = {
            name: in_tiles(part, self._mask if name == "weight" else 0, owned)
            for name, part in stored.items()
        }

    @staticmethod
    def with_float16(form: Form) -> Grouped | None:
        """Return a file's form with scales in float16, which has eight times bfloat16's steps.

        None of one that compiled code doesn't multiply, or whose scales aren't finer. Below 1e-5
        float16's steps are the larger ones: in groups whose largest weight is a ten-thousandth, or
        a thousandth in eight bits.
        """
        if not isinstance(form, Grouped) or form.codes == "float8" or not has_numba():
            return None
        is_fine = form.group_size > 0 and form.scale_dtype != torch.bfloat16
        return replace(form, scale_dtype=torch.float16) if is_fine else None

    @staticmethod
    def supports(form: Grouped, weight: torch.Tensor) -> bool:
        """Return whether code for weights of a form can be compiled here."""
        if form.codes == "float8" or form.scale_dtype == torch.float32:
            return False
        n_inputs = weight.shape[1] * (2 if form.codes == "int4" else 1)
        size = form.group_size
        fits = size == 0 or (size >= 16 and size & (size - 1) == 0)
        return fits and n_inputs % BLOCK == 0 and has_numba()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        n_tokens, n_blocks = len(x), self._n_inputs // BLOCK
        dtype, is_half = x.dtype, x.dtype == torch.bfloat16
        if self._is_widened and n_tokens > FEW_IN_GROUPS and is_half:
            return self._widened_product(x)
        x = (x if is_half else x.float()).contiguous()
        sizes = [self._n_inputs, 4 * n_blocks, 4 * self._n_sums, 4 * self._n_sums]
        ends = [n_tokens * end for end in (0, *itertools.accumulate(sizes))]
        rounded = x.new_empty(ends.pop(), dtype=torch.uint8)
        places = [rounded.data_ptr() + end for end in ends]
        kind = (n_tokens, n_blocks, self._n_sums // n_blocks, self._is_int4)
        rounding = code("numba_rounding", "round_inputs", is_half)
        by_rows(rounding, n_tokens, x.data_ptr(), *places, *kind)
        n_rows = len(self._stored["weight"]) * TILE
        out = x.new_empty(n_tokens, n_rows)
        address = code("numba_groups", "product", *self._kind, is_half).address
        sizes = [n_rows, n_blocks, self._n_groups, n_tokens]
        in_parallel(address, *self._places(), *places, out.data_ptr(), *sizes)
        if n_rows > self.out_features:
            out = out[:, : self.out_features].contiguous()
        return out.to(dtype)

    def _widened_product(self, x: torch.Tensor) -> torch.Tensor:
        out, n_tiles = x.new_empty(len(x), self.out_features), len(self._stored["weight"])
        step = max(WIDENED_ROWS, WIDENED // self._n_inputs) // TILE
        address = code("numba_groups", "widen", *self._widened_kind).address
        for tile in range(0, n_tiles, step):
            some = min(step, n_tiles - tile)
            weight = x.new_empty(self._n_inputs, some * TILE)
            sizes = [some, self._n_groups, self._n_inputs // self._n_groups]
            places = [*self._places(tile), weight.data_ptr()]
            in_parallel(address, *places, *sizes, self._form.has_zeros)
            first, last = tile * TILE, min((tile + some) * TILE, self.out_features)
            out[:, first:last] = (x @ weight)[:, : last - first]
        return out

    def _places(self, tile: int = 0) -> list[int]:
        """Return the addresses of a tile's codes, scales and zeros."""
        names = self._form.scale_names
        parts = [self._stored[name] for name in ("weight", names[0], names[-1])]
        return [part.data_ptr() + tile * part.stride(0) * part.itemsize for part in parts]

    def stored(self) -> StoredWeight:
        parts = {
            name: part.transpose(1, 2).flatten(0, 1)[: self.out_features]
            for name, part in self._stored.items()
        }
        return self._restored(parts)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        tiles, places = rows // TILE, rows % TILE
        parts = {name: part[tiles, :, places] for name, part in self._stored.items()}
        return self._form.dequantize(self._restored(parts))

    def _restored(self, parts: StoredWeight) -> StoredWeight:
        """Return rows of the tiles' words and scales as a checkpoint stores them."""
        mask = self._mask - (1 << 32 if self._mask >> 31 else 0)
        codes = (parts["weight"] ^ mask).view(self._form.dtypes()["weight"])
        return {**parts, "weight": codes}
