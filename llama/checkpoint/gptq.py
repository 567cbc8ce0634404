"""GPTQ's and AWQ's weights: codes of four or eight bits, packed in int32, in groups of inputs.

A weight is ``(code - zero_point) * scale``; both formats are those of the packages AutoGPTQ and
AutoAWQ, which GPTQModel and auto-round write as well. The stored form has the same codes, counted
from their middle, and exact float32 zeros; float16 scales alone if all zero points are the middle.
"""

from collections.abc import Mapping
from typing import Any

import torch

from llama.checkpoint.packed import Modules, Packed, Parts, part
from llama.errors import printable, short
from llama.layers.quantization import Grouped, StoredWeight

# Of the stored form. Larger groups, or whole rows, repeat their scales: ranks may divide them.
_GROUP_SIZES = (128, 64, 32, 16)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK = 1 << 20  # bytes of packed codes that are brought into another order at once
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where an int32 has its eight numbers
_ORIGINAL = "use the original weights, which quantize='int4' rounds while loading"


def read_gptq(settings: Mapping[str, Any], modules: Modules, source: str) -> dict[str, Packed]:
    """Return GPTQ's weights (``hf_quantized.Reader``).

    Raises:
        ValueError: the variant isn't read, or parts are missing or don't fit together.
    """
    stored = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        stored = "marlin"
    if stored not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{source} is of a model in GPTQ's format {short(stored)}, whose order only one GPU "
            f"kernel reads: get its gptq or gptq_v2 files, or {_ORIGINAL}"
        )
    packed = {}
    for module, parts in modules.items():
        if "qweight" in parts:
            packed[module] = _read_gptq_module(settings, parts, module, source, stored == "gptq")
    return packed


def _read_gptq_module(
    settings: Mapping[str, Any], parts: Parts, module: str, source: str, is_first: bool
) -> Packed:
    """Return a module's weight, of GPTQ's first format or its second."""
    scales = part(parts, "scales", module, source, _SCALES, (None, None))
    n_groups, n_outputs = scales.shape
    ints = (torch.int32,)
    qzeros = part(parts, "qzeros", module, source, ints, (n_groups, None))
    bits = qzeros.shape[1] * 32 / n_outputs
    if bits not in (4, 8):
        raise ValueError(
            f"{printable(module)} in {source} has {bits:g} bits by its {qzeros.shape[1]} qzeros of "
            f"{n_outputs} outputs: GPTQ's weights are read in 4 and 8 bits; {_ORIGINAL}"
        )
    bits = int(bits)
    qweight = part(parts, "qweight", module, source, ints, (None, n_outputs))
    n_inputs = qweight.shape[0] * 32 // bits
    groups = _stated_groups(settings, n_inputs, n_groups, module, source)
    names: tuple[str, ...] = ("qweight", "qzeros", "scales")
    if "g_idx" in parts:
        types = (torch.int32, torch.int64)
        groups = part(parts, "g_idx", module, source, types, (n_inputs,)).long()
        names = (*names, "g_idx")
        if groups.min() < 0 or groups.max() >= n_groups:
            raise ValueError(
                f"{printable(module)}.g_idx, which {source} describes, has groups from "
                f"{groups.min()} to {groups.max()}: expected 0 to {n_groups - 1}; download it again"
            )

    def points() -> torch.Tensor:
        # The first format stores a zero point minus one, of which 0 has become the largest code.
        return (_unpacked(qzeros, bits) + is_first) & (2**bits - 1)

    what = f"{printable(module)} in {source}"
    form, order, index = _layout(groups, bits, points(), scales, what)

    def read() -> StoredWeight:
        return _stored(form, _gptq_codes(qweight, bits, order), points(), scales, order, index)

    return Packed(f"GPTQ {bits} bits", form, (n_outputs, n_inputs), names, read)


def read_awq(settings: Mapping[str, Any], modules: Modules, source: str) -> dict[str, Packed]:
    """Return AWQ's weights (``hf_quantized.Reader``).

    Raises:
        ValueError: the variant isn't read, or parts are missing or don't fit together.
    """
    stored = settings.get("version") or settings.get("format") or "gemm"
    if not isinstance(stored, str) or stored.lower() != "gemm":
        raise ValueError(
            f"{source} is of a model in AWQ's format {short(stored)}: get its gemm files, or "
            f"{_ORIGINAL}"
        )
    return {
        module: _read_awq_module(settings, parts, module, source)
        for module, parts in modules.items()
        if "qweight" in parts
    }


def _read_awq_module(settings: Mapping[str, Any], parts: Parts, module: str, source: str) -> Packed:
    scales = part(parts, "scales", module, source, _SCALES, (None, None))
    n_groups, n_outputs = scales.shape
    ints, width = (torch.int32,), n_outputs // 8
    qweight = part(parts, "qweight", module, source, ints, (None, width))
    qzeros = part(parts, "qzeros", module, source, ints, (n_groups, width))
    n_inputs = len(qweight)
    if n_outputs % 8 or n_inputs % 2:
        raise ValueError(
            f"{printable(module)} in {source} has {n_outputs} outputs of {n_inputs} inputs: eight "
            "outputs share a number in AWQ's format; download it again"
        )
    groups = _stated_groups(settings, n_inputs, n_groups, module, source)
    what = f"{printable(module)} in {source}"
    form, _, index = _layout(groups, 4, _awq_order(qzeros), scales, what)

    def read() -> StoredWeight:
        return _stored(form, _awq_codes(qweight), _awq_order(qzeros), scales, None, index)

    return Packed("AWQ 4 bits", form, (n_outputs, n_inputs), ("qweight", "qzeros", "scales"), read)


def _stated_groups(
    settings: Mapping[str, Any], n_inputs: int, n_groups: int, module: str, source: str
) -> torch.Tensor:
    """Return the group of each input, where groups follow one another: int64, (n_inputs,)."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is not int or size < 1 or -(-n_inputs // size) != n_groups:
        # A module may have groups of its own, and -1 stands for all inputs.
        size, rest = divmod(n_inputs, n_groups)
        if rest:
            raise ValueError(
                f"{printable(module)} in {source} has {n_groups} groups, which don't divide its "
                f"{n_inputs} inputs, and group_size is {short(settings.get('group_size'))}: "
                "download it again"
            )
    return torch.arange(n_inputs).div_(min(size, n_inputs), rounding_mode="floor")


def _layout(
    groups: torch.Tensor, bits: int, points: torch.Tensor, scales: torch.Tensor, what: str
) -> tuple[Grouped, torch.Tensor | None, torch.Tensor]:
    """Return how a weight is stored.

    Args:
        groups: the group of each input, int64, (in_features,).
        bits: 4 or 8.
        points: zero points, uint8, (n_groups, out_features).
        scales: (n_groups, out_features).
        what: the module and its source, for errors.

    Returns:
        The form; the order in which inputs are stored, those of a group side by side, None for
        their own; and the format's group of each stored one, which may be a part of it.
    """
    order = None
    if bool((groups[1:] < groups[:-1]).any()):  # GPTQ's desc_act
        groups, order = groups.sort(stable=True)
    has_zeros = bool((points != 1 << (bits - 1)).any())
    # Kernels for eight bits take whole rows, too.
    whole = [] if bits == 4 else [len(groups)]
    for size in (*whole, *_GROUP_SIZES):
        blocks = groups.view(-1, size) if len(groups) % size == 0 else None
        if blocks is not None and torch.equal(blocks[:, 0], blocks[:, -1]):  # none decreases
            codes, stored_size = ("int4", size) if bits == 4 else ("int8", size % len(groups))
            dtype = torch.float32 if has_zeros else scales.dtype
            form = Grouped(codes, stored_size, has_zeros, dtype, order is not None)
            return form, order, blocks[:, 0]
    raise ValueError(
        f"{what} has groups of inputs that {_GROUP_SIZES[-1]} doesn't divide: groups of "
        f"{', '.join(map(str, reversed(_GROUP_SIZES)))} and multiples are read; {_ORIGINAL}"
    )


def _stored(
    form: Grouped,
    codes: torch.Tensor,
    points: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor | None,
    index: torch.Tensor,
) -> StoredWeight:
    """Return a stored weight of ``_layout``."""
    tensors = [codes, scales[index].t().to(form.scale_dtype).contiguous()]
    if form.has_zeros:
        middle = 8 if form.codes == "int4" else 128
        offsets = middle - points[index].t().to(form.scale_dtype)
        tensors.append((offsets * tensors[1]).contiguous())
    stored = dict(zip(("weight", *form.scale_names), tensors, strict=True))
    return stored if order is None else {**stored, "order": order.int()}


def _unpacked(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return GPTQ's stored zero points, uint8, (n_groups, out_features)."""
    packed = _bytes(qzeros)
    return Grouped.unpack(packed) if bits == 4 else packed


def _bytes(ints: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each row of a matrix; its columns may lie apart if it has one."""
    return ints.contiguous().view(-1).view(torch.uint8).view(len(ints), -1)


def _gptq_codes(qweight: torch.Tensor, bits: int, order: torch.Tensor | None) -> torch.Tensor:
    """Return the stored codes of int32 that hold inputs side by side.

    Args:
        qweight: (in_features * bits / 32, out_features), the first input in the lowest bits.
        bits: 4 or 8.
        order: the inputs in the order in which they are stored.
    """
    if order is None:
        return _centred(_bytes(qweight.t()), bits)
    n_inputs, n_outputs = len(order), qweight.shape[1]
    per_int, per_byte = 32 // bits, 8 // bits
    rows = (order // per_int).view(-1, per_byte).unbind(1)
    shifts = (order % per_int * bits).to(torch.int32).view(-1, per_byte, 1).unbind(1)
    codes = torch.empty(n_outputs, n_inputs // per_byte, dtype=torch.uint8)
    step = max(1, _CHUNK // (4 * n_inputs))
    for first in range(0, n_outputs, step):
        columns = qweight[:, first : first + step]
        parts = [
            columns.index_select(0, row).bitwise_right_shift_(shift).bitwise_and_(2**bits - 1)
            for row, shift in zip(rows, shifts, strict=True)
        ]
        joined = parts[0] if bits == 8 else parts[0].bitwise_or_(parts[1].bitwise_left_shift_(4))
        codes[first : first + step] = joined.t()
    return _centred(codes, bits)


def _centred(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes as they are stored: of eight bits the distances from their middle."""
    return codes if bits == 4 else codes.bitwise_xor_(128).view(torch.int8)


def _awq_codes(qweight: torch.Tensor) -> torch.Tensor:
    """Return the stored codes, (out_features, in_features / 2), of int32 that hold eight outputs.

    Args:
        qweight: (in_features, out_features / 8), the lowest four bits of which are the outputs 0,
            2, 4, 6, 1, 3, 5 and 7.
    """
    n_inputs, n_ints = qweight.shape
    # The four bytes have the outputs (0, 2), (4, 6), (1, 3) and (5, 7): half h of byte 2 a + b has
    # 4 b + 2 h + a.
    codes = torch.empty(n_ints, 2, 2, 2, n_inputs // 2, dtype=torch.uint8)
    step = max(1, _CHUNK // (4 * n_inputs))
    for first in range(0, n_ints, step):
        columns = _bytes(qweight[:, first : first + step])
        even, odd = columns.view(n_inputs // 2, 2, -1, 2, 2).unbind(1)
        codes[first : first + step, :, 0] = ((even & 15) | (odd << 4)).permute(1, 3, 2, 0)
        codes[first : first + step, :, 1] = ((even >> 4) | (odd & 240)).permute(1, 3, 2, 0)
    return codes.view(8 * n_ints, n_inputs // 2)


def _awq_order(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of four bits, eight in an int32, in their order: uint8, (rows, 8 n)."""
    eight = Grouped.unpack(_bytes(packed)).unflatten(1, (-1, 8))
    return eight[..., _AWQ_ORDER].flatten(1)
