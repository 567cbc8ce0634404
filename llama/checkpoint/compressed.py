"""compressed-tensors' weights, of llm-compressor: integers, packed or not, and float8.

A weight is ``(value - zero_point) * scale``; the stored form has the same values and, if zero
points aren't 0, exact float32 zeros. Inputs are not rounded here, whatever the settings say.

Source: ``compressors`` in https://github.com/vllm-project/compressed-tensors
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from llama.checkpoint.float8 import float8_weight, stated_block
from llama.checkpoint.packed import Modules, Packed, Parts, part
from llama.checkpoint.patterns import compiled
from llama.checkpoint.scales import SCALE_DTYPES, Block, block_of, spread, stored_group_size
from llama.errors import printable, short
from llama.layers.quantization import Grouped, StoredWeight

logger = logging.getLogger(__name__)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ORIGINAL = "use the original weights, which quantize='int4' rounds while loading"
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "weight_shape")
_CHUNK = 1 << 20  # weights that are unpacked at once: they fit a processor's cache

Weighting = Mapping[str, Any]
"""How some modules' weights are stored: ``weights`` of one of the settings' ``config_groups``."""


def read_compressed(
    settings: Mapping[str, Any], modules: Modules, source: str
) -> dict[str, Packed]:
    """Return compressed-tensors' weights (``hf_quantized.Reader``).

    Raises:
        ValueError: the format isn't read, or parts are missing or don't fit together.
    """
    groups = _config_groups(settings, source)
    _check_formats(settings, source)
    if settings.get("kv_cache_scheme"):
        logger.warning(
            "%s says how to round keys and values in the cache (kv_cache_scheme): ignored",
            source,
        )
    return {
        module: _read_module(_weighting(groups, module, source), parts, module, source)
        for module, parts in modules.items()
        if "weight_packed" in parts or "weight_scale" in parts
    }


def _check_formats(settings: Mapping[str, Any], source: str) -> None:
    """Raise ``ValueError`` for what changes weights in a way that isn't read."""
    formats = [
        settings.get("format"),
        *(g.get("format") for g in settings["config_groups"].values()),
    ]
    known = (None, "mixed-precision", *_FORMATS)
    unknown = [each for each in formats if each not in known]
    sparse = settings.get("sparsity_config") or {}
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        unknown.append(sparse["format"])
    if unknown:
        raise ValueError(
            f"{source} is of a model in compressed-tensors' format {short(unknown[0])}: "
            f"{', '.join(_FORMATS)} are read; {_ORIGINAL}"
        )
    if settings.get("transform_config"):
        raise ValueError(
            f"{source} has a transform_config, of which inputs are rotated while the network runs: "
            f"this isn't done here; {_ORIGINAL}"
        )


def _config_groups(settings: Mapping[str, Any], source: str) -> list[tuple[list[str], Weighting]]:
    """Return the targets and the weights' settings of the groups that quantise weights."""
    stated = settings.get("config_groups")
    if not isinstance(stated, dict) or not all(isinstance(g, dict) for g in stated.values()):
        raise ValueError(
            f"{source} has config_groups {short(stated)}: expected an object of objects, each with "
            "targets and weights"
        )
    groups: list[tuple[list[str], Weighting]] = []
    for name, group in stated.items():
        targets, weights = group.get("targets"), group.get("weights")
        if weights is None:
            continue
        is_list = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
        if not is_list or not isinstance(weights, dict):
            raise ValueError(
                f"{printable(name)} of config_groups in {source} has the targets {short(targets)} "
                f"and weights {short(weights)}: expected a list of names and an object"
            )
        groups.append((targets, weights))
    return groups


def _weighting(groups: list[tuple[list[str], Weighting]], module: str, source: str) -> Weighting:
    """Return the settings of a module's weight: of the group that names it most exactly.

    Source: ``match_targets`` in compressed-tensors' ``utils/match.py``.
    """
    by_target = {target: weights for targets, weights in groups for target in targets}
    if len(groups) == 1:  # which modules are quantised is known by their parts
        return groups[0][1]
    if module in by_target:
        return by_target[module]
    for target in sorted(by_target):
        pattern = target.removeprefix("re:")
        if pattern != target and compiled(pattern, "targets", source).match(module):
            return by_target[target]
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    if kind in by_target:
        return by_target[kind]
    raise ValueError(
        f"{printable(module)} is quantised, but is no target of config_groups in {source}: "
        "download its files again"
    )


def _read_module(weighting: Weighting, parts: Parts, module: str, source: str) -> Packed:
    """Return a module's weight, of any of the formats, which its parts tell."""
    bits, kind = weighting.get("num_bits"), weighting.get("type", "int")
    is_float = isinstance(kind, str) and kind.lower() == "float"
    if type(bits) is not int or not (bits == 8 if is_float else kind == "int" and 1 <= bits <= 8):
        raise ValueError(
            f"{printable(module)} in {source} has {short(bits)} bits of type {short(kind)}: "
            f"integers of up to 8 bits and floats of 8 are read; {_ORIGINAL}"
        )
    size = weighting.get("group_size")
    if type(size) is int and size > 0:
        block = stated_block([1, size], "group_size", source)
    else:
        block = stated_block(_block_structure(weighting), "block_structure", source)
    if is_float:
        packed = float8_weight(parts, module, source, "weight_scale", block)
        ignored = tuple(name for name in (*_UNUSED, "weight_zero_point") if name in parts)
        return Packed("float8", packed.form, packed.shape, (*packed.names, *ignored), packed.read)
    return _read_integers(bits, block, parts, module, source)


def _block_structure(weighting: Weighting) -> object:
    """Return the outputs and inputs of a block, which older settings join by an x."""
    stated = weighting.get("block_structure")
    if isinstance(stated, str) and stated.replace("x", "").isdecimal() and len(stated) < 20:
        return [int(number) for number in stated.split("x") if number]
    return stated


def _read_integers(
    bits: int, block: Block | None, parts: Parts, module: str, source: str
) -> Packed:
    """Return a module's weight of integers, in int8 or packed."""
    what = f"{printable(module)}.weight_scale, which {source} describes,"
    is_packed = "weight_packed" in parts
    if is_packed:
        weight = part(parts, "weight_packed", module, source, (torch.int32,), (None, None))
        n_inputs = _n_inputs(weight, bits, parts, module, source)
    else:
        weight = part(parts, "weight", module, source, (torch.int8,), (None, None))
        n_inputs = weight.shape[1]
    shape = (weight.shape[0], n_inputs)
    scales = parts.get("weight_scale", torch.empty(0))
    scales = part(parts, "weight_scale", module, source, SCALE_DTYPES, tuple(scales.shape))
    block = block_of(scales, shape, block, what)
    dense = is_packed and weight.shape[1] == _widths(n_inputs, bits)[0]
    points = _zero_points(bits, dense, parts, scales, len(weight), module, source)
    order = _order(block[1], parts, n_inputs, module, source)
    in_four = is_packed and bits <= 4
    group_size = stored_group_size(block, n_inputs, not in_four, what)
    dtype = scales.dtype if points is None else torch.float32
    codes = "int4" if in_four else "int8"
    form = Grouped(codes, group_size, points is not None, dtype, order is not None)

    def read() -> StoredWeight:
        stored = {}
        if is_packed:
            stored["weight"] = _codes(weight, bits, dense, n_inputs, order)
        else:
            stored["weight"] = weight if order is None else weight[:, order]
        numbers = [scales.to(dtype)]
        if points is not None:
            numbers.append(points.float().neg_().mul_(numbers[0]))
        for name, tensor in zip(form.scale_names, numbers, strict=True):
            stored[name] = spread(tensor, shape, block, group_size)
        return stored if order is None else {**stored, "order": order.int()}

    used = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    names = tuple(name for name in (*used, *_UNUSED) if name in parts)
    return Packed(f"compressed-tensors {bits} bits", form, shape, names, read)


def _n_inputs(packed: torch.Tensor, bits: int, parts: Parts, module: str, source: str) -> int:
    """Return the number of inputs of a packed weight, which its ``weight_shape`` tells."""
    dtypes = (torch.int64, torch.int32)
    n_outputs, n_inputs = part(parts, "weight_shape", module, source, dtypes, (2,)).tolist()
    rows, width = packed.shape
    if n_outputs != rows or width not in _widths(n_inputs, bits) or n_inputs < 2 or n_inputs % 2:
        raise ValueError(
            f"{printable(module)}.weight_packed, which {source} describes, has the shape "
            f"{(rows, width)} of {bits} bits, and weight_shape is {short([n_outputs, n_inputs])}: "
            "they don't fit together; download them again"
        )
    return n_inputs


def _widths(n: int, bits: int) -> tuple[int, int]:
    """Return the numbers of int32 for n numbers: one after another, and none in two int32."""
    return -(-n * bits // 32), -(-n // (32 // bits))


def _zero_points(
    bits: int,
    dense: bool,
    parts: Parts,
    scales: torch.Tensor,
    n_outputs: int,
    module: str,
    source: str,
) -> torch.Tensor | None:
    """Return zero points in the shape of the scales; None if all are 0."""
    points = parts.get("weight_zero_point")
    if points is None:
        return None
    if points.dtype == torch.int32 and scales.dim() == 2:
        points = part(parts, "weight_zero_point", module, source, (torch.int32,), (None, None))
        if (
            points.shape[0] != _widths(n_outputs, bits)[not dense]
            or points.shape[1] != scales.shape[1]
        ):
            raise ValueError(
                f"{printable(module)}.weight_zero_point, which {source} describes, has the shape "
                f"{tuple(points.shape)}, and its scales {tuple(scales.shape)}: they don't fit "
                "together; download them again"
            )
        points = _unpacked(points.t(), bits, dense, n_outputs).t().to(torch.int16) - (
            1 << (bits - 1)
        )
    else:
        points = part(
            parts, "weight_zero_point", module, source, (torch.int8,), tuple(scales.shape)
        )
    return points if bool(points.any()) else None


def _order(
    group_size: int, parts: Parts, n_inputs: int, module: str, source: str
) -> torch.Tensor | None:
    """Return the order of inputs by groups, int64, (n_inputs,); None if it is their own."""
    if "weight_g_idx" not in parts:
        return None
    dtypes = (torch.int32, torch.int64)
    groups = part(parts, "weight_g_idx", module, source, dtypes, (n_inputs,)).long()
    if bool((groups == -1).any()):  # unset
        return None
    groups, order = groups.sort(stable=True)
    if not torch.equal(groups, torch.arange(n_inputs) // group_size):
        raise ValueError(
            f"{printable(module)}.weight_g_idx, which {source} describes, doesn't give each group "
            f"{group_size} of {n_inputs} inputs: download it again"
        )
    return None if torch.equal(order, torch.arange(n_inputs)) else order


def _codes(
    packed: torch.Tensor, bits: int, dense: bool, n_inputs: int, order: torch.Tensor | None
) -> torch.Tensor:
    """Return the stored codes of packed ones: of up to four bits in four, else in eight.

    Args:
        packed: int32, (out_features, _).
        bits: of a code; its value is the code less half of the codes' number.
        dense: see ``_unpacked``.
        n_inputs: the number of inputs.
        order: the inputs in the order in which they are stored.
    """
    if bits in (4, 8) and order is None:  # two in a byte as the stored form has them, or one
        raw = packed.contiguous().view(torch.uint8)[:, : n_inputs * bits // 8].contiguous()
        return raw if bits == 4 else (raw ^ 128).view(torch.int8)
    width, dtype = (n_inputs // 2, torch.uint8) if bits <= 4 else (n_inputs, torch.int8)
    codes, half = torch.empty(len(packed), width, dtype=dtype), 1 << (bits - 1)
    step = max(1, _CHUNK // n_inputs)
    for first in range(0, len(packed), step):
        numbers = _unpacked(packed[first : first + step], bits, dense, n_inputs)
        if order is not None:  # of floats this takes a fraction of the time
            numbers = numbers.float().index_select(1, order).to(torch.uint8)
        numbers = Grouped.pack(numbers + (8 - half)) if bits <= 4 else (numbers - half).view(dtype)
        codes[first : first + step] = numbers
    return codes


def _unpacked(packed: torch.Tensor, bits: int, dense: bool, n: int) -> torch.Tensor:
    """Return the n numbers of each row, uint8, of which int32 hold the first in the lowest bits.

    In dense rows they follow one another; older files have none in two int32.
    """
    if bits in (4, 8):
        raw = packed.contiguous().view(torch.uint8)
        return (Grouped.unpack(raw) if bits == 4 else raw)[:, :n]
    count, period = (32, bits) if dense else (32 // bits, 1)
    words = F.pad(packed, (0, -packed.shape[1] % period)).unflatten(1, (-1, period))
    numbers = torch.empty(*words.shape[:2], count, dtype=torch.uint8)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        number = words[:, :, word] >> shift
        if shift + bits > 32:  # the rest lies in the next one
            number &= (1 << (32 - shift)) - 1
            number |= words[:, :, word + 1] << (32 - shift)
        numbers[:, :, i] = number & ((1 << bits) - 1)
    return numbers.flatten(1)[:, :n]
