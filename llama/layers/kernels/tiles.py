"""Plain weights, and rows of eight bits, by code that numba compiles (``llama[fast]``).

Outputs lie side by side, with 32 bits of each one's inputs: with AMX in oneDNN's order, which few
tokens read, on other x86 processors in one that is made here.
"""

import ctypes

import torch
import torch.nn.functional as F

from llama.layers.capability import cpu_has_bf16
from llama.layers.kernels.base import Kernel
from llama.layers.kernels.compiled import (
    HAS_AMX,
    HAS_BF16,
    HAS_VNNI,
    ROWS,
    SPAN,
    TOKENS,
    amx_registers,
    compile_tokens_code,
    gather,
    in_tiles,
)
from llama.layers.kernels.machine_code import Code, code, has_numba
from llama.layers.kernels.openmp import by_rows, in_parallel, recording
from llama.layers.quantization import StoredWeight

TILED = 1 << 18  # elements of the smallest weight that is worth a second of compiling


class Tiles:
    """A weight whose outputs lie side by side.

    Compiled code reads it at the speed of memory, and multiplies many tokens at the processor's;
    oneDNN, which doesn't prefetch, reaches 0.85 of either.

    Args:
        words: shape (n_tiles, n_words, width), int32: of ``width`` outputs the inputs of 32 bits.
        weight: what they are of, shape (n_outputs, n_inputs), bfloat16 or int8.
        packed: in oneDNN's order, if that is where the words are, which AMX multiplies.
        mask: what each word was combined with.
    """

    def __init__(
        self,
        words: torch.Tensor,
        weight: torch.Tensor,
        packed: torch.Tensor | None,
        mask: int = 0,
    ):
        self._words, self._shape, self._owner = words, weight.shape, packed
        self._width, self._dtype = words.shape[2], weight.dtype
        self._has_amx, self._mask = packed is not None, mask - (1 << 32 if mask >> 31 else 0)
        self._added: torch.Tensor | None = None  # to AMX's sums of eight bits

    def compile(self, is_half: bool = True) -> "Tiles":
        """Compile what products of bfloat16 need, before the first prompt."""
        self._code(is_half)
        if self._dtype == torch.int8:
            code("numba_rounding", "round_tokens", True)
        compile_tokens_code()
        return self

    @staticmethod
    def are_worth(weight: torch.Tensor) -> bool:
        """Return whether compiled code reads a weight faster than oneDNN, in an order it knows."""
        fits = weight[0].nbytes % 64 == 0 and weight.numel() >= TILED
        return HAS_AMX and fits and hasattr(torch.ops.mkldnn, "data_ptr") and has_numba()

    @staticmethod
    def find(packed: torch.Tensor, weight: torch.Tensor) -> "Tiles | None":
        """Return the tiles of a packed weight; None if it is small, or its order unknown.

        The order isn't documented, but found in the packed weight: tiles of 32 or 64 outputs.
        """
        if not Tiles.are_worth(weight):
            return None
        (n_outputs, n_inputs), size = weight.shape, 4 // weight.itemsize
        some = torch.arange(0, n_outputs, 61)  # each place in a tile, if they are many
        address, n_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
        memory, fitting = (ctypes.c_char * n_bytes).from_address(address), []
        for width in (64, 32):
            n_tiles = -(-n_outputs // width)
            count = n_tiles * width * n_inputs // size
            if count * 4 <= n_bytes:
                words = torch.frombuffer(memory, dtype=torch.int32, count=count)
                tiles = Tiles(words.view(n_tiles, -1, width), weight, packed)
                if torch.equal(tiles.rows(some), weight[some]):
                    fitting.append(tiles)
        if len(fitting) != 1:  # a weight whose outputs are all alike doesn't tell
            return None
        if weight.dtype == torch.int8:  # inputs' codes are 128 above their values
            parts = [part.sum(dim=1, dtype=torch.int32) for part in weight.split(1024)]
            fitting[0]._added = fitting[0].padded(torch.cat(parts).mul_(-128))
        return fitting[0].compile()

    @staticmethod
    def order(weight: torch.Tensor, is_half: bool = True, owned: bool = False) -> "Tiles":
        """Return a weight in tiles of its own, which any number of tokens multiply.

        Args:
            weight: bfloat16 or int8.
            is_half: whether products are bfloat16, rather than float32.
            owned: whether nobody else reads the weight, which is then changed where it is.
        """
        # Codes are multiplied without signs.
        mask = 0x80808080 if weight.dtype == torch.int8 and HAS_VNNI else 0
        words = in_tiles(weight.contiguous().view(torch.int32), mask, owned)
        return Tiles(words, weight, None, mask).compile(is_half)

    def padded(self, of_outputs: torch.Tensor) -> torch.Tensor:
        """Return a number of each output for whole tiles, of which all is read."""
        n_outputs = len(self._words) * self._width
        return F.pad(of_outputs, (0, n_outputs - len(of_outputs))).contiguous()

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return some outputs' weights, shape (n,) to (n, n_inputs)."""
        are_recorded = recording.calls is not None and rows.dim() == 1 and not self._mask
        if are_recorded and rows.dtype == torch.int64:
            return gather(self._words, rows, self._shape[0]).view(self._dtype)
        words = self._words[rows // self._width, :, rows % self._width]
        return (words ^ self._mask).view(self._dtype)

    def weight(self) -> torch.Tensor:
        """Return the weight."""
        rows = self._words.transpose(1, 2).flatten(0, 1)[: self._shape[0]]
        return (rows.contiguous() ^ self._mask).view(self._dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of inputs with a weight in bfloat16, in the inputs' dtype."""
        is_half = self._has_amx or HAS_BF16
        wide = x.to(torch.bfloat16 if is_half else torch.float32).contiguous()
        return self._multiply(wide, len(x), torch.bfloat16).to(x.dtype)

    def int8_product(
        self, x: torch.Tensor, size: int, scale: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the product of inputs, rounded to eight bits, with a weight of eight bits.

        Args:
            x: shape (n_tokens, n_inputs).
            size: how many inputs are rotated together; if they aren't, they have two digits.
            scale: of each output, float32, ``padded``.
            dtype: of the product.
        """
        n_tokens, n_inputs = x.shape
        is_half = x.dtype == torch.bfloat16
        x = (x if is_half else x.float()).contiguous()
        n_digits, n_threads = 2 if size == 1 else 1, torch.get_num_threads()
        # AMX adds up all inputs, whose codes have no signs then.
        span, above = (n_inputs, 128) if self._has_amx else (SPAN, 0)
        rotated = x.new_empty(n_threads * n_inputs, dtype=torch.float32)
        codes = x.new_empty(n_digits * n_tokens, n_inputs, dtype=torch.uint8)
        scales = x.new_empty(n_digits * n_tokens, -(-n_inputs // span), dtype=torch.float32)
        offsets = torch.empty_like(scales, dtype=torch.int32)
        places = [part.data_ptr() for part in (x, rotated, codes, scales, offsets)]
        sizes = (n_tokens, n_inputs, n_digits, size, span, above)
        by_rows(code("numba_rounding", "round_tokens", is_half), n_tokens, *places, *sizes)
        added = offsets if self._added is None else self._added
        others = [part.data_ptr() for part in (scales, scale, added)]
        out = self._multiply(codes, len(codes), dtype if n_digits == 1 else torch.float32, *others)
        return out if n_digits == 1 else (out[:n_tokens] + out[n_tokens:]).to(dtype)

    def _code(self, is_half: bool) -> Code:
        is_int8 = self._dtype == torch.int8
        return code("numba_tiles", "product", self._width, is_int8, is_half, self._has_amx)

    def _multiply(
        self, x: torch.Tensor, n_tokens: int, dtype: torch.dtype, *others: int
    ) -> torch.Tensor:
        n_outputs, n_inputs = self._shape
        if not n_tokens:
            return x.new_empty(0, n_outputs, dtype=dtype)
        n_tiles = len(self._words)
        is_half = dtype == torch.bfloat16
        written = torch.bfloat16 if is_half else torch.float32
        out = x.new_empty(n_tokens, n_tiles * self._width, dtype=written)
        n_sums = min(n_tokens, TOKENS) * self._width * torch.get_num_threads()
        sums = x.new_empty(out.numel() if self._has_amx else n_sums, dtype=torch.float32)
        places = [part.data_ptr() for part in (self._words, x, sums, out)]
        registers = ctypes.addressof(amx_registers(min(n_tokens, ROWS)))
        sizes = (n_tiles, n_inputs, n_tokens, registers)
        in_parallel(self._code(is_half).address, *places, *sizes, *others)
        if out.shape[1] > n_outputs:
            out = out[:, :n_outputs].contiguous()
        return out if is_half else out.to(dtype)


class Bfloat16(Kernel):
    """A plain weight in bfloat16, for processors without AMX. Sums are in float32."""

    opaque = True

    def __init__(self, stored: StoredWeight):
        super().__init__(stored)
        self._tiles = Tiles.order(stored["weight"])

    @staticmethod
    def is_fastest_for(weight: torch.Tensor) -> bool:
        """Return whether a weight is multiplied fastest by compiled code.

        PyTorch's operators widen it first where there are no instructions for bfloat16. With them
        a small one isn't worth compiling.
        """
        fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        is_worth = weight.numel() >= TILED or not cpu_has_bf16()
        return fits and is_worth and weight.shape[1] % 4 == 0 and not HAS_AMX and has_numba()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self._tiles.product(x)

    def stored(self) -> StoredWeight:
        return {"weight": self._tiles.weight()}

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self._tiles.rows(rows).float()
