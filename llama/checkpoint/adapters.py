"""Adapters in PEFT's format, read for use beside the base's weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from llama import adapters, parallel
from llama.adapters import Adapter, Dora, LowRank, Replaced
from llama.adapters.changes import Chain, Rows, Shifted, VirtualTokens
from llama.checkpoint.adapter_files import AdapterFiles, open_adapter
from llama.checkpoint.lora_changes import (
    EMBEDDING,
    OUTPUT,
    Change,
    check_change,
    read_changes,
    stays_tied,
)
from llama.checkpoint.rounding import is_made_here, round_weight
from llama.checkpoint.sharding import full_shapes, rank_part, split_dim
from llama.checkpoint.virtual_tokens import read_prefix, read_prompt
from llama.layers.linear import ColumnParallelLinear, ParallelEmbedding, ParallelLinear
from llama.model import Transformer


def read_adapter(name: str, directory: Path, model: Transformer, scale: float = 1.0) -> Adapter:
    """Read an adapter for a model, this rank's part of it, in the model's dtype. On all ranks.

    Args:
        name: which callers choose it by.
        directory: has ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.
        model: the base that it was trained on; its weights may be quantised.
        scale: of its low-rank changes, besides their own; weights that it has in whole and virtual
            tokens have none, as in PEFT.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package ``safetensors`` is missing.
        ValueError: the adapter is damaged, belongs to another model, or must be merged.
    """
    files, args = open_adapter(directory), model.params
    tensors = {key: t for key, t in files.tensors.items() if key != "prompt_embeddings"}
    changes = read_changes(tensors, files.config, args, files.path)
    head = _take_head(changes, files, args.dim) if files.classifies else None
    if args.tie_word_embeddings and stays_tied(changes, files.config, files.path):
        changes[OUTPUT] = replace(changes[EMBEDDING], out_dim=0)
    if head is not None:
        changes.pop(OUTPUT, None)
    _check(changes, files, model)
    part = _RankPart(model, scale)
    made: dict[str, list[adapters.Change]] = {}
    # DoRA scales products, to which a bias is added.
    for parameter, change in sorted(changes.items(), key=lambda pair: pair[0].endswith(".bias")):
        module, _, kind = parameter.rpartition(".")
        make = part.of_weight if kind == "weight" else part.of_bias
        made.setdefault(module, []).extend(make(parameter, change))
    prefix, n_virtual = None, 0
    if files.config["peft_type"] == "PREFIX_TUNING":
        keys, values = (part.own(each) for each in read_prefix(files, args))
        prefix, n_virtual = (keys, values), keys.shape[1]
    elif files.has_prompt:
        rows = part.own(part.of(EMBEDDING, read_prompt(files, args)))
        # PEFT embeds the prompt by the base's own table, also if the adapter has saved one.
        made["tok_embeddings"] = [VirtualTokens(rows, args.vocab_size)]
        n_virtual = len(rows)
    labels = None
    if head is not None:
        same = args.labels is not None and len(args.labels) == len(head)
        labels = args.labels if same else [f"LABEL_{i}" for i in range(len(head))]
        head = part.own(head)
    part.check(files.path)
    by_module = {m: some[0] if len(some) == 1 else Chain(some) for m, some in made.items() if some}
    virtual = range(args.vocab_size, args.vocab_size + n_virtual)
    return Adapter(name, by_module, virtual, prefix, head, labels)


def _take_head(changes: dict[str, Change], files: AdapterFiles, dim: int) -> torch.Tensor:
    """Take a classifier's weight, (n_labels, dim), out of an adapter's changes."""
    change = changes.pop(OUTPUT, Change())
    weight = change.replacement
    if weight is None or weight.dim() != 2 or weight.shape[1] != dim or not len(weight):
        found = "none" if weight is None else f"one of the shape {tuple(weight.shape)}"
        raise ValueError(
            f"{files.path} lacks the classifier's weight (score) of the shape (labels, {dim}), and "
            f"has {found}: save it again"
        )
    check_change(OUTPUT, change, tuple(weight.shape), files.path)
    return change.apply(lambda: weight)


def _check(changes: Mapping[str, Change], files: AdapterFiles, model: Transformer) -> None:
    """Raise ``ValueError`` if changes don't fit a model, or can't be made beside its weights."""
    args, path = model.params, files.path
    shapes = full_shapes(replace(args, attention_bias=True, mlp_bias=True))
    shapes.setdefault(OUTPUT, shapes[EMBEDDING])
    table = changes.get(EMBEDDING, Change()).replacement
    if table is not None and table.dim() == 2 and len(table) != args.vocab_size:
        raise ValueError(
            f"{path} has an embedding of {len(table)} rows, and the model's has {args.vocab_size}: "
            "another vocabulary needs a model of its own, which Llama.build(adapter=...) makes"
        )
    for parameter, change in changes.items():
        check_change(parameter, change, shapes.get(parameter), path)
        if change.rows is not None and change.magnitude is not None:
            raise ValueError(
                f"{path} changes some rows of {parameter} besides its magnitudes (DoRA): merge it "
                "(Llama.build(adapter=...))"
            )


@dataclass(frozen=True)
class _RankPart:
    """Makes changes of this rank's part of a model's modules."""

    model: Transformer
    scale: float
    overflowed: list[torch.Size] = field(default_factory=list)  # shapes of those in its dtype

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a tensor that is divided as a parameter."""
        return rank_part(name, [tensor], self.model.params, parallel.rank(), parallel.world_size())

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the model's device, in its dtype, which isn't mapped."""
        own = tensor.to(self.model.norm.weight, copy=True).contiguous()
        if not own.isfinite().all():
            self.overflowed.append(own.shape)
        return own

    def check(self, path: Path) -> None:
        """Raise ``ValueError``, on all ranks, if a number is beyond the range of the dtype."""
        weight = self.model.norm.weight
        flag = torch.tensor([float(len(self.overflowed))], device=weight.device)
        if parallel.max_over_ranks(flag):  # others in a batch would end with it
            raise ValueError(
                f"a tensor in {path} holds an infinity or a NaN as {weight.dtype}, the model's: "
                "build the model with dtype=torch.float32"
            )

    def of_weight(self, name: str, change: Change) -> list[adapters.Change]:
        """Return the changes of a module that a change of its weight makes."""
        module = self.model.get_submodule(name.removesuffix(".weight"))
        if change.factors is not None:
            left, right, scale = change.factors
            change = replace(change, factors=(left, right, scale * self.scale))
        new = change.replacement
        if new is not None and self._differs(name, change.ordered(new)):
            whole = change.apply(lambda: new)
            return [Replaced(self.own(self.of(name, whole)), getattr(module, "eps", None))]
        made: list[adapters.Change] = []
        if change.rows is not None:
            made.append(self._rows(name, *change.rows))
        if change.factors is not None:
            made.append(self._low_rank(name, change, *change.factors))
        return made

    def _differs(self, name: str, weight: torch.Tensor) -> bool:
        """Return whether a weight isn't the model's own: PEFT also saves what it didn't train."""
        current, new = self._weight(name), self.of(name, weight)
        form = getattr(self.model.get_submodule(name.removesuffix(".weight")), "form", None)
        is_whole = parallel.world_size() == 1 or split_dim(name) == 0
        if form is not None and is_made_here(form) and is_whole:
            codes = round_weight(form, new.float())  # as they were quantised
            new = form.dequantize(codes, form.block_size(new.shape[1]))
        differs = not torch.equal(new.to(current), current)
        # Ranks that decide differently would wait for each other's sums for ever.
        return bool(parallel.max_over_ranks(torch.tensor([float(differs)], device=current.device)))

    def _weight(self, name: str) -> torch.Tensor:
        """Return a module's weight, float32 if it is quantised."""
        module = self.model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, ParallelLinear | ParallelEmbedding):
            return module.plain_weight()
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def _rows(self, name: str, indices: list[int], rows: torch.Tensor) -> Rows:
        places = torch.tensor(indices)
        if name == EMBEDDING:
            rows = self.of(name, rows)
        else:  # those of this rank's
            length = _n_rows(self.model.get_submodule(name.removesuffix(".weight")))
            places = places - parallel.rank() * length
            is_own = (places >= 0) & (places < length)
            places, rows = places[is_own], rows[is_own]
        return Rows(places.to(self.model.norm.weight.device), self.own(rows))

    def _low_rank(
        self, name: str, change: Change, left: torch.Tensor, right: torch.Tensor, scale: float
    ) -> LowRank:
        left = change.ordered(left)
        if split_dim(name) == 0:
            left = self.of(name, left)
        elif split_dim(name) == 1:
            right = self.of(name, right)
        # Factors of (out, in), of which an embedding's weight is the transpose.
        b, a = (right.T, left.T) if change.out_dim else (left, right)
        if change.magnitude is None:
            return LowRank(self.own(a), self.own(b), scale)
        ratio = self._ratio(name, change, left, right, scale)
        return Dora(self.own(a), self.own(b), scale, self.own(ratio))

    def _ratio(
        self, name: str, change: Change, left: torch.Tensor, right: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the magnitudes of this rank's outputs divided by the changed weight's norms."""
        assert change.magnitude is not None
        inputs = 1 - change.out_dim
        weight = self._weight(name).float()
        weight = weight.addmm(left.to(weight), right.to(weight), alpha=scale)
        squares = weight.square().sum(inputs, keepdim=True)
        if split_dim(name) == inputs:
            squares = parallel.all_reduce(squares)
        magnitude = change.ordered(change.magnitude).unsqueeze(inputs)
        if split_dim(name) == change.out_dim:
            magnitude = self.of(name, magnitude)
        # The rows of a padded vocabulary are zeros.
        tiny = torch.finfo(torch.float32).tiny
        return (magnitude.to(squares) / squares.sqrt().clamp(min=tiny)).flatten()

    def of_bias(self, name: str, change: Change) -> list[adapters.Change]:
        """Return the change of a module that a change of its bias makes."""
        module = self.model.get_submodule(name.removesuffix(".bias"))
        assert isinstance(module, ParallelLinear)
        length = _n_rows(module)
        bias = torch.zeros(length) if module.bias is None else module.bias.float().cpu()
        shift = torch.zeros(length)
        if change.replacement is not None:
            shift = self.of(name, change.ordered(change.replacement)).float() - bias
        if change.added is not None:
            vector, scale = change.added
            added = self.of(name, change.ordered(vector)).float()
            shift = shift.add(added, alpha=scale * self.scale)
        if split_dim(name.replace(".bias", ".weight")) == 1 and parallel.rank():
            shift = torch.zeros(length)  # what is added to a sum comes from the first rank
        return [Shifted(self.own(shift))]


def _n_rows(module: nn.Module) -> int:
    """Return how many rows this rank has of a linear layer's weight."""
    assert isinstance(module, ParallelLinear)
    divided = isinstance(module, ColumnParallelLinear)
    return module.out_features // parallel.world_size() if divided else module.out_features
