"""How weights are rounded to int8 and int4, for ``quantize=`` and ``llama.convert``."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

from llama.args import ModelArgs
from llama.checkpoint.sharding import full_shapes
from llama.checkpoint.threads import in_threads
from llama.errors import short
from llama.layers.quantization import Form, Grouped, Rotated, StoredWeight, hadamard, rotate

GROUP_SIZES = (32, 64, 128, 256)
# Weights that a thread rounds at a time: few enough for its caches, and so many that operators,
# between which it holds Python's lock, take longer than what is between them.
_CHUNK = 1 << 18
# Fractions of a group's range that are cut at either end; values outside are clamped. Of all pairs
# up to 0.18 each of these lowers the error of normally distributed weights most, given those
# before it.
_CUTS = ((0.02, 0.02), (0.04, 0.0), (0.0, 0.04), (0.0, 0.02))
_MULTIPLE = 64  # of groups: four vectors of AVX-512
_SMALLEST = 1e-30  # scale: a group of equal weights is its offset


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a network, "int8" or "int4".

    Args:
        form: of the weights.
        mixed: give weights whose errors cost most more bits than the form has, as far as that
            makes a network no larger than llama.cpp's Q4_K_M.
    """

    form: Form
    mixed: bool = False

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
        forms = {module: self.form for module in names if self.applies_to(module)}
        return forms | (_larger_forms(args) if self.mixed else {})


def _larger_forms(args: ModelArgs) -> dict[str, Form]:
    """Return the forms of the weights that have more than int4's bits in groups of 64.

    They are in the order in which a bit more lowered the divergence from the probabilities of the
    unquantised network most, in networks that ``tools/train_tiny.py code`` trains.
    """
    shapes = full_shapes(args)
    kinds = ("attention.wv",), ("attention.wk",), ("attention.wo",), ("feed_forward.w2",)
    pairs = (*kinds, ("feed_forward.w1", "feed_forward.w3"))  # which share a kernel
    names = [f"layers.{i}.{kind}" for some in pairs for i in range(args.n_layers) for kind in some]
    modules = ["output", *names]
    if args.tie_word_embeddings:
        modules[0] = "tok_embeddings"
    elif not args.n_outputs:
        del modules[0]
    forms: dict[str, Form] = {}
    usual, left = Grouped(), 0.0
    for module in modules:
        if _has_six_bits(module, args.n_layers):
            left += prod(shapes[f"{module}.weight"]) * (210 - 144) / 256  # bytes of 256 weights
    for module in modules:
        shape = shapes[f"{module}.weight"]
        larger: list[Form] = [Grouped(group_size=32)]
        if not module.startswith("layers."):
            larger.insert(0, Rotated())
        for form in larger:
            more = _n_bytes(form, shape) - _n_bytes(usual, shape)
            if more <= left:
                forms[module] = form
                left -= more
                break
    return forms


def _has_six_bits(module: str, n_layers: int) -> bool:
    """Return whether Q4_K_M stores a weight in Q6_K, with 210 bytes for the 144 of Q4_K.

    Source: ``use_more_bits`` in https://github.com/ggml-org/llama.cpp (src/llama-quant.cpp)
    """
    if not module.startswith("layers."):
        return True
    layer, eighth = int(module.split(".")[1]), n_layers // 8
    some = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    return some and module.endswith(("wv", "w2"))


def _n_bytes(form: Form, shape: tuple[int, ...]) -> int:
    dtypes = form.dtypes()
    sizes = form.shapes(*shape).items()
    return sum(prod(size) * dtypes[name].itemsize for name, size in sizes)


def make_scheme(name: str, group_size: int | None = None) -> Scheme:
    """Return the scheme that a caller or a file names.

    Args:
        name: int8 or int4.
        group_size: of int4; by default 64, and fewer for some weights.

    Raises:
        ValueError: there is none of that name or group size.
    """
    if name == "int8":
        if group_size is not None:
            raise ValueError("group_size is for int4: int8 has one scale a row, leave it out")
        return Scheme(Rotated())
    if name != "int4":
        raise ValueError(f"quantize is {short(name)}: expected 'int8', 'int4' or 'none'")
    if group_size is None:
        return Scheme(Grouped(), mixed=True)
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group_size is {short(group_size)}: expected one of {sizes}")
    return Scheme(Grouped(group_size=group_size))


def is_made_here(form: Form) -> bool:
    """Return whether ``round_weight`` makes a form."""
    if isinstance(form, Rotated):
        return True
    return form.group_size in GROUP_SIZES and form == Grouped(group_size=form.group_size)


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
    chunk = _CHUNK if weight.is_cpu else 1 << 23
    n_rows = max(1, chunk // weight.shape[1])

    def round_rows(first: int) -> None:
        rows = weight[first : first + n_rows]
        if isinstance(form, Rotated):
            rounded = _round_rows(rows, block, over_ranks)
        else:
            rounded = _round_groups(rows, form)
        for name, part in rounded.items():
            stored[name][first : first + n_rows].view(-1, part.shape[1]).copy_(part)

    chunks = range(0, len(weight), n_rows)
    # Ranks exchange the largest elements of chunks in the same order.
    if weight.is_cpu and isinstance(form, Grouped):
        in_threads(round_rows, chunks)
    else:
        for first in chunks:
            round_rows(first)
    return stored


def _round_rows(
    weight: torch.Tensor, block: int, over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> StoredWeight:
    rotated = rotate(weight.float(), hadamard(block, weight.device, torch.float32))
    largest = over_ranks(rotated.abs().amax(dim=1, keepdim=True))
    scale = torch.where(largest > 0, largest / 127, 1)
    return {"weight": rotated.div_(scale).round_(), "scale": scale}


def _round_groups(weight: torch.Tensor, form: Grouped) -> StoredWeight:
    """Return codes, scales and zeros of groups, one a row."""
    groups = weight.reshape(-1, form.group_size).float().t()  # (group_size, n)
    n = groups.shape[1]
    # PyTorch adds what is left of a multiple in another order, and a rank has other groups there.
    groups = F.pad(groups, (0, -n % _MULTIPLE)) if n % _MULTIPLE else groups.contiguous()
    scales, zeros = fit_groups(groups)
    codes = round_groups(groups, scales, zeros)
    packed = torch.add(codes[::2], codes[1::2], alpha=16)
    parts = {"weight": packed.t(), "scales": scales[:, None], "zeros": zeros[:, None]}
    return {name: part[:n] for name, part in parts.items()}


def fit_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scales and zeros of int4 groups with a small squared error.

    Several ranges are tried: weights are rounded, then scale and offset fitted to the codes by
    least squares, whose error follows from three sums.

    Args:
        groups: float32, a group a column, (group_size, n_groups): sums over the first dimension
            are the fastest.

    Returns:
        Scales and zeros, bfloat16 numbers in float32, (n_groups,).
    """
    mean = groups.mean(dim=0)
    centred = groups - mean
    low, high = centred.amin(dim=0), centred.amax(dim=0)
    cuts = groups.new_tensor(_CUTS)[:, :, None]  # (n_ranges, 2, 1)
    span = high - low
    scales = span * ((1 - cuts.sum(dim=1)) / 15)  # (n_ranges, n_groups)
    scales, offsets, gains = _fit(centred, scales, low + span * cuts[:, 0])
    best = gains.max(dim=0, keepdim=True).indices
    scales, offsets, _ = _fit(centred, scales.gather(0, best), offsets.gather(0, best))
    scale = scales[0].bfloat16().float()
    return scale, (offsets[0] + mean).add_(scale, alpha=8).bfloat16().float()


def round_groups(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the int4 codes of ``fit_groups``'s groups, whole numbers in float32."""
    return torch.sub(groups, zeros).mul_(scales.reciprocal()).add_(8).round_().clamp_(0, 15)


def _fit(
    centred: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups, and fit scales and offsets to their codes by least squares.

    Args:
        centred: groups with a mean of 0, (group_size, n_groups).
        scales, offsets: what to round with, (n_trials, n_groups).

    Returns:
        The fitted scales and offsets, and by how much they make the error smaller than that of
        codes that are all alike: (n_trials, n_groups) each.
    """
    inverses = scales.clamp(min=_SMALLEST).reciprocal_()
    shifts = (offsets * inverses).neg_()
    sums = centred.new_empty(len(scales), 3, centred.shape[1])
    codes, products = torch.empty_like(centred), torch.empty_like(centred)
    for inverse, shift, out in zip(inverses, shifts, sums, strict=True):
        total, squares, covariance = out.unbind()
        torch.addcmul(shift, centred, inverse, out=codes).round_().clamp_(0, 15)
        torch.sum(codes, dim=0, out=total)
        torch.sum(torch.mul(codes, codes, out=products), dim=0, out=squares)
        torch.sum(torch.mul(codes, centred, out=products), dim=0, out=covariance)
    total, squares, covariance = sums.unbind(1)
    variance = torch.addcmul(squares, total, total, value=-1 / len(centred)).clamp_(min=0.25)
    scales = covariance.div(variance).clamp_(min=_SMALLEST)
    return scales, scales * total / -len(centred), covariance * scales
