"""bitsandbytes' weights: NF4 and FP4, whose values lie on no even grid, and LLM.int8.

Four bits stand for the 16 numbers of a codebook, times the largest size in a block of the weights
that follow one another; with nested (double) quantisation these sizes are codes themselves. No
affine group holds them, so they are widened.

Source: ``QuantState`` and ``dequantize_4bit`` in https://github.com/bitsandbytes-foundation/bitsandbytes
(bitsandbytes/functional.py)
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from llama.checkpoint.packed import Modules, Packed, Parts, part
from llama.errors import LARGEST, printable, short
from llama.layers.quantization import Grouped, StoredWeight

logger = logging.getLogger(__name__)

_CODEBOOKS = ("nf4", "fp4")
_STATE = "weight.quant_state.bitsandbytes__"
_FLOATS = (torch.float32,)
_BYTES = (torch.uint8,)
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MAX_STATE = 10_000  # bytes of a state's JSON, which has about 150
_CHUNK = 1 << 18  # bytes of codes that are widened at once: they fit a processor's cache
# Codes of a row go up to 127; this is the float32 constant of bitsandbytes' kernels.
_PER_CODE = 7.874015718698502e-3


def read_bitsandbytes(
    settings: Mapping[str, Any], modules: Modules, source: str
) -> dict[str, Packed]:
    """Return bitsandbytes' weights (``hf_quantized.Reader``).

    A warning tells the memory that widened weights need.

    Raises:
        ValueError: the variant isn't read, or parts are missing or don't fit together.
    """
    packed = {}
    for module, parts in modules.items():
        weight = parts.get("weight")
        if "SCB" in parts or (weight is not None and weight.dtype == torch.int8):
            packed[module] = _read_eight_bits(parts, module, source)
        elif any(name.startswith("weight.") for name in parts):
            packed[module] = _read_four_bits(parts, module, source)
    widened = [each for each in packed.values() if each.form is None]
    if widened:
        size = sum(prod(each.shape) for each in widened)
        logger.warning(
            "%s is of weights in %s, which have no even steps: they are widened, to %.1f GB in "
            "half precision; quantize='int4' rounds them again and needs a quarter",
            *(source, widened[0].kind, 2 * size / 1e9),
        )
    return packed


def _read_eight_bits(parts: Parts, module: str, source: str) -> Packed:
    """Return a module's weight of LLM.int8: codes, and the largest size in each row."""
    codes = part(parts, "weight", module, source, (torch.int8,), (None, None))
    largest = part(parts, "SCB", module, source, _FLOATS, (len(codes),))
    names = ["weight", "SCB"]
    if "weight_format" in parts:
        layout = part(parts, "weight_format", module, source, _BYTES, ()).item()
        if layout != 0:
            raise ValueError(
                f"{printable(module)} in {source} has the weight_format {layout}, an order of one "
                "GPU's: load and save it with a newer bitsandbytes, or use the original weights"
            )
        names.append("weight_format")
    form = Grouped("int8", 0, False, torch.float32)

    def read() -> StoredWeight:
        return {"weight": codes, "scale": largest.unsqueeze(1) * _PER_CODE}

    shape = (codes.shape[0], codes.shape[1])
    return Packed("LLM.int8", form, shape, tuple(names), read)


@dataclass(frozen=True)
class _State:
    """How a weight of four bits is stored; ``nested`` describes the sizes' own blocks."""

    kind: str
    shape: tuple[int, int]
    block_size: int
    nested_block_size: int = 0
    nested_offset: float = 0.0


def _read_four_bits(parts: Parts, module: str, source: str) -> Packed:
    """Return a module's weight of NF4 or FP4."""

    def get(
        name: str, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...]
    ) -> torch.Tensor:
        return part(parts, name, module, source, dtypes, shape)

    name = next((name for name in parts if name.startswith(_STATE)), f"{_STATE}nf4")
    state = _read_state(get(name, _BYTES, (None,)), name, module, source)
    size = prod(state.shape)
    packed = get("weight", _STORAGE, tuple(parts.get("weight", torch.empty(0)).shape))
    if packed.nbytes * 2 != size:
        raise ValueError(
            f"{printable(module)}.weight, which {source} describes, has {packed.nbytes} bytes for "
            f"a weight of {state.shape[0]} by {state.shape[1]}, which needs {size / 2:g}: download "
            "it again"
        )
    codebook = get("weight.quant_map", _FLOATS, (16,))
    n_blocks = -(-size // state.block_size)
    sizes = [get("weight.absmax", _BYTES if state.nested_block_size else _FLOATS, (n_blocks,))]
    names = ["weight", "weight.absmax", "weight.quant_map", name]
    if state.nested_block_size:
        n_nested = -(-n_blocks // state.nested_block_size)
        for nested, length in (("nested_absmax", n_nested), ("nested_quant_map", 256)):
            sizes.append(get(f"weight.{nested}", _FLOATS, (length,)))
            names.append(f"weight.{nested}")

    def read() -> StoredWeight:
        raw = packed.flatten().view(torch.uint8)
        return {"weight": _widened(raw, codebook, _block_sizes(sizes, state), state)}

    return Packed(f"bitsandbytes {state.kind}", None, state.shape, tuple(names), read)


def _read_state(tensor: torch.Tensor, name: str, module: str, source: str) -> _State:
    """Return what a state's JSON says.

    Raises:
        ValueError: it is no JSON, or says something that can't be.
    """
    kind = name.removeprefix(_STATE)
    full_name = f"{printable(f'{module}.{name}')}, which {source} describes,"
    try:
        text = bytes(tensor[:_MAX_STATE].tolist()).decode()
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{full_name} is no JSON: download it again") from error
    state = state if isinstance(state, dict) else {}
    shape = state.get("shape")
    sizes = [state.get("blocksize"), state.get("nested_blocksize", 2)]
    sizes += shape if isinstance(shape, list) else []
    offset = state.get("nested_offset", 0.0)
    is_right = kind in _CODEBOOKS and len(sizes) == 4 and type(offset) in (int, float)
    if is_right:
        is_right = all(type(n) is int and 0 < n <= LARGEST for n in sizes)
        is_right = is_right and abs(offset) <= LARGEST  # which NaN isn't
    if not is_right or sizes[0] % 2:
        raise ValueError(
            f"{full_name} says {short(text.strip(), 200)}: expected quant_type nf4 or fp4, a shape "
            "of two sizes, an even blocksize and a finite nested_offset; download it again"
        )
    block_size, nested, n_outputs, n_inputs = sizes
    nested = nested if "nested_blocksize" in state else 0
    return _State(kind, (n_outputs, n_inputs), block_size, nested, offset)


def _block_sizes(parts: list[torch.Tensor], state: _State) -> torch.Tensor:
    """Return the largest size in each block, which nested quantisation gives a code: float32."""
    if not state.nested_block_size:
        return parts[0]
    codes, largest, codebook = parts
    repeats = min(state.nested_block_size, len(codes))
    blocks = largest.repeat_interleave(repeats)[: len(codes)]
    return codebook[codes.int()].mul_(blocks).add_(state.nested_offset)


def _widened(
    packed: torch.Tensor, codebook: torch.Tensor, sizes: torch.Tensor, state: _State
) -> torch.Tensor:
    """Return a weight in float32, (out_features, in_features).

    Args:
        packed: uint8, two codes in a byte, the first in the upper bits.
        codebook: float32, (16,).
        sizes: those of ``_block_sizes``.
        state: how the weight is stored.
    """
    # Each byte stands for two numbers, which are copied as one of 64 bits.
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)
    pairs = pairs.contiguous().view(torch.float64).flatten()
    weight = torch.empty(2 * len(packed), dtype=torch.float32)
    half = state.block_size // 2
    step = max(_CHUNK // half, 1) * half
    for first in range(0, len(packed), step):
        codes = packed[first : first + step].int()
        numbers = weight[2 * first : 2 * (first + len(codes))]
        torch.index_select(pairs, 0, codes, out=numbers.view(torch.float64))
        blocks = sizes[first // half : -(-(first + len(codes)) // half)]
        whole = len(codes) // half * half * 2
        numbers[:whole].view(-1, 2 * half).mul_(blocks[: whole // (2 * half), None])
        if whole < len(numbers):  # the last block may be smaller
            numbers[whole:].mul_(blocks[-1])
    return weight.view(state.shape)
