"""Modules of quantised Hugging Face directories: the tensors of each, and the weight they make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llama.errors import listed, printable
from llama.layers.quantization import Grouped, StoredWeight

Parts = Mapping[str, torch.Tensor]
"""A module's tensors by the rest of their names, such as ``qweight`` or ``weight.absmax``."""


@dataclass(frozen=True)
class Packed:
    """A module's quantised weight, which is decoded when it's read.

    Attributes:
        kind: the format's own name, for descriptions.
        form: what ``read`` returns; None for a plain ``weight`` in float32.
        shape: (out_features, in_features).
        names: the parts that the weight is made from.
        read: returns the stored weight, with queries' and keys' rows in Hugging Face's order.
    """

    kind: str
    form: Grouped | None
    shape: tuple[int, int]
    names: tuple[str, ...]
    read: Callable[[], StoredWeight]


Modules = Mapping[str, Parts]
"""Parts by their module's name in Hugging Face's network, such as
``model.layers.0.self_attn.q_proj``."""


def part(
    parts: Parts,
    name: str,
    module: str,
    source: str,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int | None, ...],
) -> torch.Tensor:
    """Return a module's part after a check.

    Args:
        parts: the module's.
        name: the part's.
        module: the module's name, for errors.
        source: the file that describes the module, for errors.
        dtypes: those that the part may have.
        shape: that of the part; None stands for any size above 0.

    Raises:
        ValueError: the part is missing or of another dtype or shape.
    """
    full_name = f"{printable(module)}.{name}"
    if name not in parts:
        raise ValueError(
            f"{source} has quantised weights, but {full_name} is missing beside "
            f"{listed([printable(each) for each in sorted(parts)])}: download its files again"
        )
    tensor = parts[name]
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{full_name}, which {source} describes, is {tensor.dtype}: need {known}")
    fits = tensor.dim() == len(shape) and all(
        size > 0 and size == (size if wanted is None else wanted)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{full_name}, which {source} describes, has the shape {tuple(tensor.shape)}: "
            f"expected ({wanted})"
        )
    return tensor
