"""LoRA adapters as PEFT writes them, merged into a checkpoint (https://arxiv.org/abs/2106.09685)."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.checkpoint.base import Checkpoint, Shape, Weights, text_files
from llama.checkpoint.hf import hf_name, is_rotary, meta_name, to_interleaved
from llama.checkpoint.lora_config import rank_and_scale, read_config, row_indices
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import full_shapes
from llama.checkpoint.tensor_files import check_plain, open_tensors
from llama.errors import printable

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"

# The suffix of a module's tensor, longest first, and the tensor's role: a factor, the trained
# weight, the weight that the adapter changes where it isn't the base's, or some trained rows.
_KINDS = {
    ".token_adapter.trainable_tokens_delta": "rows",
    ".token_adapter.base_layer.weight": "base",
    ".original_module.weight": "base",
    ".modules_to_save.weight": "whole",
    ".base_layer.weight": "base",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".weight": "weight",
}


@dataclass
class _Change:
    """An adapter's change of one weight; its parts apply in this order.

    Attributes:
        base: replaces the weight and the one tied to it.
        whole: replaces the weight alone.
        rows: indices, and the rows that replace those.
        factors: tensors of the shapes (n, r) and (r, m), and the scale of their product.
        head_dim: the size of a head, for queries and keys, whose rows the adapter has in another
            order; None for others.
    """

    base: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    rows: tuple[list[int], torch.Tensor] | None = None
    factors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    head_dim: int | None = None

    @property
    def replacement(self) -> torch.Tensor | None:
        return self.base if self.whole is None else self.whole

    def apply(self, read_base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the changed weight in float32, so that it is rounded once, when it is stored."""
        new = self.replacement
        weight = (read_base() if new is None else self._ordered(new)).float()
        if self.rows is not None:
            indices, rows = self.rows
            weight = weight.index_copy(0, torch.tensor(indices), rows.float())
        if self.factors is not None:
            left, right, scale = self.factors
            weight = weight.addmm(self._ordered(left.float()), right.float(), alpha=scale)
        return weight

    def _ordered(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.head_dim is None else to_interleaved(rows, self.head_dim)


def apply_adapter(base: Checkpoint, directory: Path) -> Checkpoint:
    """Merge an adapter into a checkpoint; each weight is calculated when it is read.

    Args:
        base: the checkpoint that the adapter was trained on, not quantised.
        directory: has ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``. A
            tokenizer in it replaces the base's.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package ``safetensors`` is missing.
        ValueError: the adapter is damaged, belongs to another model, or can't be merged.
    """
    if base.scheme is not None:
        raise ValueError(
            f"{base.names[0]} is quantised, and an adapter can't be merged into that: merge it "
            "into the original weights, and quantise the result (llama.convert does both)"
        )
    shape = base.parts[0].shapes.get(_EMBEDDING, ())
    n_words = shape[0] if shape and base.params.get("vocab_size", -1) == -1 else 0
    args = make_args(base.params, base.source, n_words)
    base.check(args)
    config = read_config(directory / "adapter_config.json")
    path, tensors = _open_weights(directory)
    changes = _changes(tensors, config, args, path)
    params = _merged_params(base.params, args, changes, config, path)
    shapes = full_shapes(make_args(params, base.source, 0))
    for name, change in changes.items():
        _check_change(name, change, shapes[name], path)

    def read(name: str) -> torch.Tensor:
        def read_base() -> torch.Tensor:
            return base.rank_part(name, args, 0, 1)

        return changes[name].apply(read_base) if name in changes else read_base()

    def mapped(name: str) -> list[torch.Tensor]:
        tied = name == _OUTPUT and args.tie_word_embeddings
        return base.mapped(_EMBEDDING if tied else name)

    files = dict(base.files)
    adapter_files = text_files(directory)
    if "tokenizer.model" in adapter_files or "tokenizer.json" in adapter_files:
        # One tokenizer's settings and templates would mislead another.
        files = {name: file for name, file in files.items() if name == "generation_config.json"}
        files |= adapter_files
    names = [f"{base.names[0]} with {directory}"]
    weights = Weights(shapes, read, mapped)
    return Checkpoint(base.source, params, [weights], names, base.dtype, files, in_float32=True)


def _open_weights(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Map the adapter's tensors under PEFT's names, and return their file's path too."""
    for name in _WEIGHTS:
        path = directory / name
        if path.is_file():
            tensors = open_tensors(path)
            check_plain(tensors, str(path))
            return path, tensors
    raise FileNotFoundError(f"{directory} has no adapter weights: expected {' or '.join(_WEIGHTS)}")


def _changes(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], args: ModelArgs, path: Path
) -> dict[str, _Change]:
    """Return the changes that the file's tensors make, by the name of the changed weight."""
    weights = full_shapes(args).keys() | {_OUTPUT}
    classifies = args.labels is not None or config.get("task_type") == "SEQ_CLS"
    head, other_head = ("score", "lm_head") if classifies else ("lm_head", "score")
    by_module: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        suffix = next((end for end in _KINDS if key.endswith(end)), None)
        if suffix is None:
            raise ValueError(
                f"{path} has {printable(key)}: expected a Llama's LoRA factors and weights only; "
                "merge the adapter with PEFT (merge_and_unload) and load the result"
            )
        module = key.removeprefix(_PREFIX).removesuffix(suffix)
        if (
            not key.startswith(_PREFIX)
            or meta_name(f"{module}.weight") not in weights
            or module == other_head
        ):
            raise ValueError(
                f"{path} changes {printable(key)}, which the base model lacks: the adapter "
                "belongs to another model"
            )
        by_module[module][_KINDS[suffix]] = tensor
    if not by_module:
        raise ValueError(f"{path} has no tensors: save the adapter again")
    modules = {hf_name(name).removesuffix(".weight") for name in weights - {_OUTPUT}} | {head}
    saved = tuple(config["modules_to_save"])
    missing = sorted(module for module in modules - by_module.keys() if module.endswith(saved))
    if missing:
        raise ValueError(
            f"{path} lacks {missing[0]}, which modules_to_save in adapter_config.json names: save "
            "the adapter again"
        )
    return {
        str(meta_name(f"{module}.weight")): _change(module, kinds, config, args, path)
        for module, kinds in by_module.items()
    }


def _change(
    module: str,
    kinds: dict[str, torch.Tensor],
    config: Mapping[str, Any],
    args: ModelArgs,
    path: Path,
) -> _Change:
    """Return the change that a module's tensors, by their roles, make."""
    name = str(meta_name(f"{module}.weight"))
    change = _Change(head_dim=args.head_dim if is_rotary(name) else None)
    change.base, change.whole = kinds.pop("base", None), kinds.pop("whole", None)
    if "weight" in kinds:
        trained = module.endswith(tuple(config["modules_to_save"]))
        setattr(change, "whole" if trained else "base", kinds.pop("weight"))
    if "rows" in kinds:
        change.rows = row_indices(module, config, path), kinds.pop("rows")
    pair = ("embedding_A", "embedding_B") if name == _EMBEDDING else ("A", "B")
    if kinds:
        if kinds.keys() != set(pair):
            raise ValueError(
                f"{path} has {', '.join(f'lora_{kind}' for kind in kinds)} of {module}: expected "
                f"lora_{pair[0]} and lora_{pair[1]}; save the adapter again"
            )
        a, b = (kinds[kind] for kind in pair)
        rank, scale = rank_and_scale(module, config)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{path} has LoRA factors of the shapes {tuple(a.shape)} and {tuple(b.shape)} for "
                f"{module}, but adapter_config.json makes its rank {rank}: one of the two files "
                "belongs to another adapter"
            )
        # An embedding's factors are those of its transpose.
        change.factors = (a.T, b.T, scale) if name == _EMBEDDING else (b, a, scale)
    return change


def _merged_params(
    params: Mapping[str, Any],
    args: ModelArgs,
    changes: dict[str, _Change],
    config: Mapping[str, Any],
    path: Path,
) -> dict[str, Any]:
    """Return the merged model's hyper-parameters.

    Of tied weights' changes one is left, or each has its own and the weights are no longer tied.
    """
    merged = {**params, "vocab_size": args.vocab_size}
    if config.get("task_type") == "SEQ_CLS" and args.labels is None:
        score = changes[_OUTPUT].replacement if _OUTPUT in changes else None
        if score is None or score.dim() != 2:
            raise ValueError(f"{path} lacks the classifier's weight (score): save it again")
        merged["labels"] = [f"LABEL_{i}" for i in range(len(score))]
        merged["tie_word_embeddings"] = False
    elif args.tie_word_embeddings:
        merged["tie_word_embeddings"] = _stays_tied(changes, config, path)
    new = changes[_EMBEDDING].replacement if _EMBEDDING in changes else None
    if new is not None and new.dim() == 2:
        merged["vocab_size"] = len(new)
    untied = not merged.get("tie_word_embeddings") and merged.get("labels") is None
    output = changes[_OUTPUT].replacement if _OUTPUT in changes else None
    if merged["vocab_size"] != args.vocab_size and untied and output is None:
        raise ValueError(
            f"{path} has an embedding of {merged['vocab_size']} rows but no lm_head, and the "
            f"base's has {args.vocab_size}: save the adapter with save_embedding_layers=True"
        )
    return merged


def _stays_tied(changes: dict[str, _Change], config: Mapping[str, Any], path: Path) -> bool:
    """Return whether a tied output still is the embedding, as it would be in PEFT's model."""
    both = config.get("ensure_weight_tying") and _EMBEDDING in changes
    embedding = changes.setdefault(_EMBEDDING, _Change())
    output = changes.setdefault(_OUTPUT, _Change())
    bases = [change.base for change in (embedding, output) if change.base is not None]
    if len(bases) == 2 and not torch.equal(*bases):
        raise ValueError(f"{path} has an embed_tokens and an lm_head that differ: the base has one")
    embedding.base = output.base = bases[0] if bases else None
    own = [c.whole is not None or c.factors is not None for c in (embedding, output)]
    if embedding.rows is not None and own[1]:
        raise ValueError(
            f"{path} changes rows of the embedding and all of the output, which are one in the "
            "base: merge the adapter with PEFT and load the result"
        )
    # Rows that are trained in the embedding change the output with it, unless it has its own.
    same_rows = output.rows is None or (
        embedding.rows is not None
        and embedding.rows[0] == output.rows[0]
        and torch.equal(embedding.rows[1], output.rows[1])
    )
    if not both and (any(own) or not same_rows):
        return False
    del changes[_OUTPUT]
    return True


def _check_change(name: str, change: _Change, shape: Shape, path: Path) -> None:
    """Raise ``ValueError`` if an adapter's tensors don't fit a weight of this shape."""
    pairs = []
    if change.replacement is not None:
        pairs.append((change.replacement, shape))
    if change.factors is not None:
        left, right, _ = change.factors
        pairs += [(left, (shape[0], left.shape[1])), (right, (right.shape[0], *shape[1:]))]
    if change.rows is not None:
        indices, rows = change.rows
        pairs.append((rows, (len(indices), *shape[1:])))
        if not all(0 <= i < shape[0] for i in indices):
            raise ValueError(f"{path} has rows of {name} beyond its {shape[0]}: of another model?")
    hint = ""
    if name in (_EMBEDDING, _OUTPUT):
        hint = ", or its vocabulary was resized and it wasn't saved with save_embedding_layers=True"
    for tensor, expected in pairs:
        if tensor.shape != expected:
            raise ValueError(
                f"{path} has the shape {tuple(tensor.shape)} for {hf_name(name)}, where {expected} "
                f"is expected: the adapter belongs to another model{hint}"
            )
