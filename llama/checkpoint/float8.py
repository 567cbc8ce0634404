"""Weights in eight-bit floating point, float8_e4m3fn: transformers' FP8, AutoFP8's and FBGEMM's.

They stay as they are stored, with scales of single numbers, of rows or of blocks spread to rows.
Inputs are not rounded, so that their scales have no use here.
"""

from collections.abc import Mapping
from typing import Any

import torch

from llama.checkpoint.packed import Modules, Packed, Parts, part
from llama.checkpoint.scales import SCALE_DTYPES, Block, block_of, spread, stored_group_size
from llama.errors import LARGEST, printable, short
from llama.layers.quantization import Grouped, StoredWeight

_EIGHT_BITS = (torch.float8_e8m0fnu, torch.uint8)  # the exponents of powers of two
_SCALES = ("weight_scale_inv", "weight_scale")  # a weight is multiplied by either
_UNUSED = ("activation_scale", "input_scale", "input_scale_ub", "output_scale")


def read_fp8(settings: Mapping[str, Any], modules: Modules, source: str) -> dict[str, Packed]:
    """Return the weights of transformers' FP8, of AutoFP8 and of FBGEMM (``hf_quantized.Reader``).

    Source: ``integrations/finegrained_fp8.py`` and ``integrations/fbgemm_fp8.py`` in
    https://github.com/huggingface/transformers

    Raises:
        ValueError: the variant isn't read, or parts are missing or don't fit together.
    """
    block = stated_block(settings.get("weight_block_size"), "weight_block_size", source)
    packed = {}
    for module, parts in modules.items():
        scale = next((name for name in _SCALES if name in parts), None)
        weight = parts.get("weight")
        if scale is not None or (weight is not None and weight.dtype.itemsize == 1):
            packed[module] = float8_weight(parts, module, source, scale or _SCALES[0], block)
    return packed


def stated_block(value: object, key: str, source: str) -> Block | None:
    """Return the outputs and inputs that share a scale by a setting, if it is set.

    Raises:
        ValueError: it is none of two whole numbers above 0.
    """
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2:
        rows, columns = value
        if type(rows) is type(columns) is int and 0 < rows <= LARGEST and 0 < columns <= LARGEST:
            return (rows, columns)
    raise ValueError(f"{key} is {short(value)} in {source}: expected two whole numbers above 0")


def float8_weight(
    parts: Parts, module: str, source: str, scale_name: str, block: Block | None
) -> Packed:
    """Return a module's float8_e4m3fn ``weight`` with its scales.

    Args:
        parts: the module's.
        module: the module's name, for errors.
        source: the file that describes it, for errors.
        scale_name: the part that has its scales.
        block: the outputs and inputs that share one, if the settings say.

    Raises:
        ValueError: a part is missing, or they don't fit together.
    """
    codes = part(parts, "weight", module, source, (torch.float8_e4m3fn,), (None, None))
    shape = (codes.shape[0], codes.shape[1])
    dtypes = (*SCALE_DTYPES, *_EIGHT_BITS)
    size = parts[scale_name].shape if scale_name in parts else (None,)
    scales = part(parts, scale_name, module, source, dtypes, tuple(size))
    what = f"{printable(module)}.{scale_name}, which {source} describes,"
    block = block_of(scales, shape, block, what)
    group_size = stored_group_size(block, shape[1], whole=True, what=what)
    form = Grouped("float8", group_size, False, torch.float32)

    def read() -> StoredWeight:
        # Some store the byte that e8m0 is as a whole number.
        numbers = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
        return {"weight": codes, form.scale_names[0]: spread(numbers, shape, block, group_size)}

    names = ("weight", scale_name, *(name for name in _UNUSED if name in parts))
    return Packed("FP8", form, shape, names, read)
