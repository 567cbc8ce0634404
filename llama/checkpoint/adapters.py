"""Adapters in PEFT's format, read for use beside the base's weights."""

from pathlib import Path

import torch

from llama import parallel
from llama.adapters import Adapter, Change, LowRank
from llama.checkpoint.hf import is_rotary, to_interleaved
from llama.checkpoint.lora import _changes, _check_change, _open_weights
from llama.checkpoint.lora_config import read_config
from llama.checkpoint.sharding import full_shapes, rank_part, split_dim
from llama.errors import printable
from llama.model import Transformer

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


def read_adapter(directory: Path, name: str, model: Transformer, scale: float = 1.0) -> Adapter:
    """Read an adapter for a model, this rank's part of it, in the model's dtype.

    Args:
        directory: has ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.
        name: which callers choose it by.
        model: the base that it was trained on; its weights may be quantised.
        scale: of its changes, besides its own.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package ``safetensors`` is missing.
        ValueError: the adapter is damaged, belongs to another model, or isn't plain LoRA.
    """
    args, weight = model.params, model.norm.weight
    config = read_config(directory / "adapter_config.json")
    path, tensors = _open_weights(directory)
    shapes = full_shapes(args)
    shapes.setdefault(_OUTPUT, shapes[_EMBEDDING])
    changes: dict[str, Change] = {}
    for parameter, change in _changes(tensors, config, args, path).items():
        _check_change(parameter, change, shapes[parameter], path)
        module = parameter.removesuffix(".weight")
        if change.factors is None or change.replacement is not None or change.rows is not None:
            raise ValueError(
                f"{path} changes {printable(module)} by more than low-rank factors: merge it "
                "(Llama.build(adapter=...))"
            )
        b, a, own = change.factors  # (n, r), (r, m)
        if is_rotary(parameter):
            b = to_interleaved(b, args.head_dim)
        a, b = _rank_parts(parameter, a, b, model)
        if parameter == _EMBEDDING:
            a, b = b.T, a.T  # of the transposed weight: (r, vocab_size), (dim, r)
        a, b = (factor.to(weight).contiguous() for factor in (a, b))
        changes[module] = LowRank(a, b, own * scale)
    return Adapter(name, changes)


def _rank_parts(
    parameter: str, a: torch.Tensor, b: torch.Tensor, model: Transformer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of this rank's part of a weight, which is divided as their product."""
    numbers = model.params, parallel.rank(), parallel.world_size()
    if split_dim(parameter) == 0:
        return a, rank_part(parameter, [b], *numbers)
    return rank_part(parameter, [a], *numbers), b
