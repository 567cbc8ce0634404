"""How weights are rounded to int8 and int4, for ``quantize=`` and ``llama.convert``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama.args import ModelArgs
from llama.checkpoint.sharding import full_shapes
from llama.errors import short
from llama.layers.quantization import Form, Grouped, Rotated, StoredWeight, hadamard, rotate

GROUP_SIZES = (32, 64, 128, 256)
_CHUNK = 1 << 17  # weights that a CPU rounds at a time, so that they stay in its cache
# Fractions of a group's range that are cut at either end; values outside are clamped.
_CUTS = [(low, high) for low in (0.0, 0.05, 0.1) for high in (0.0, 0.05, 0.1)]


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a network: the form of its weights, "int8" or "int4"."""

    form: Form

    @property
    def name(self) -> str:
        return "int8" if isinstance(self.form, Rotated) else "int4"

    def applies_to(self, module: str) -> bool:
        """Return whether a module's weight is quantised: not norms, and in int8 only layers.

        A token reads one row of the embedding, which eight bits wouldn't make faster. An error in
        the output's weight is an error in the logits: greedy text would change at near ties.
        """
        in_layers = module.startswith("layers.")
        return (in_layers or self.name == "int4") and not module.endswith("norm")

    def forms(self, args: ModelArgs) -> dict[str, Form]:
        """Return the forms of a network's weights by module."""
        names = (n.removesuffix(".weight") for n in full_shapes(args) if n.endswith(".weight"))
        return {module: self.form for module in names if self.applies_to(module)}


def make_scheme(name: str, group_size: int | None = None) -> Scheme:
    """Return the scheme that a caller or a file names.

    Args:
        name: int8 or int4.
        group_size: of int4; 64 by default.

    Raises:
        ValueError: there is none of that name or group size.
    """
    if name == "int8":
        if group_size is not None:
            raise ValueError("group_size is for int4: int8 has one scale a row, leave it out")
        return Scheme(Rotated())
    if name != "int4":
        raise ValueError(f"quantize is {short(name)}: expected 'int8' or 'int4'")
    if group_size is None:
        group_size = Grouped().group_size
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group_size is {short(group_size)}: expected one of {sizes}")
    return Scheme(Grouped(group_size=group_size))


def is_made_here(form: Form) -> bool:
    """Return whether ``round_weight`` makes a form."""
    return isinstance(form, Rotated) or form == Grouped(group_size=form.group_size)


def round_weight(
    form: Form,
    weight: torch.Tensor,
    block: int | None = None,
    over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda largest: largest,
) -> StoredWeight:
    """Round a weight on its device.

    Args:
        form: one that is made here.
        weight: a whole weight or a rank's part, of any dtype, shape (out_features, in_features).
        block: the whole weight's ``block_size``, if this is a part of its inputs.
        over_ranks: returns the largest elements of the rows, of which ranks have parts.
    """
    dtypes = form.dtypes()
    stored = {
        name: torch.empty(shape, dtype=dtypes[name], device=weight.device)
        for name, shape in form.shapes(*weight.shape).items()
    }
    block = block or form.block_size(weight.shape[1])
    n_rows = max(1, (_CHUNK if weight.is_cpu else 64 * _CHUNK) // weight.shape[1])
    for first in range(0, len(weight), n_rows):
        rows = weight[first : first + n_rows]
        if isinstance(form, Rotated):
            rounded = _round_rows(rows, block, over_ranks)
        else:
            rounded = _round_groups(rows, form)
        for name, part in rounded.items():
            stored[name][first : first + n_rows] = part
    return stored


def _round_rows(
    weight: torch.Tensor, block: int, over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> StoredWeight:
    rotated = rotate(weight.float(), hadamard(block, weight.device, torch.float32))
    largest = over_ranks(rotated.abs().amax(dim=1, keepdim=True))
    scale = torch.where(largest > 0, largest / 127, 1)
    return {"weight": rotated.div_(scale).round_(), "scale": scale}


def _round_groups(weight: torch.Tensor, form: Grouped) -> StoredWeight:
    """Round groups with a small squared error.

    Try several ranges: round, then fit scale and offset to the codes by least squares.
    """
    n_rows = len(weight)
    weight = weight.reshape(-1, form.group_size).float()
    low = weight.amin(dim=1, keepdim=True)
    span = weight.amax(dim=1, keepdim=True) - low
    tiny = torch.finfo(torch.float32).tiny
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_offset = torch.ones_like(low), low
    for cut_low, cut_high in _CUTS:
        scale = (span * ((1 - cut_low - cut_high) / 15)).clamp_(min=tiny)
        scale, offset = _fit(weight, _codes(weight, scale, low + span * cut_low))
        rounded = _codes(weight, scale, offset)
        error = torch.addcmul(offset - weight, rounded, scale).square_().sum(dim=1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
    scale, offset = _fit(weight, _codes(weight, best_scale, best_offset))
    scales = scale.bfloat16()
    zeros = (offset + 8 * scales.float()).bfloat16()
    codes = _codes(weight, scales.float(), zeros.float() - 8 * scales.float())
    codes, scales, zeros = (part.view(n_rows, -1) for part in (codes, scales, zeros))
    return {"weight": form.pack(codes.to(torch.uint8)), "scales": scales, "zeros": zeros}


def _codes(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return torch.sub(weight, offset).div_(scale).round_().clamp_(0, 15)


def _fit(weight: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and offset with the least squared error of ``codes * scale + offset``."""
    mean, target = codes.mean(dim=1, keepdim=True), weight.mean(dim=1, keepdim=True)
    centred = codes - mean
    variance = centred.square().sum(dim=1, keepdim=True)
    scale = (centred * weight).sum(dim=1, keepdim=True) / variance.clamp(min=0.25)
    scale = scale.clamp_(min=1e-30)  # a group of equal weights is its offset
    return scale, target - scale * mean
