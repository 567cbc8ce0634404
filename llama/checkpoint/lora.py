"""LoRA adapters as PEFT writes them, merged into a checkpoint (https://arxiv.org/abs/2106.09685)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.checkpoint.adapter_files import AdapterFiles, open_adapter
from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.lora_changes import (
    EMBEDDING,
    OUTPUT,
    Change,
    check_change,
    read_changes,
    stays_tied,
)
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import full_shapes


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
    if base.forms:
        raise ValueError(
            f"{base.names[0]} is quantised, and an adapter can't be merged into that: merge it "
            "into the original weights, and quantise the result (llama.convert does both), or load "
            "it on call (Llama.load_adapter)"
        )
    shape = base.parts[0].shapes.get(EMBEDDING, ())
    n_words = shape[0] if shape and base.params.get("vocab_size", -1) == -1 else 0
    args = make_args(base.params, base.source, n_words)
    base.check(args)
    files = open_adapter(directory)
    if files.has_prompt:
        raise ValueError(
            f"{directory} holds virtual tokens ({files.config['peft_type']}), which can't be "
            "merged into weights: build the model without it, and give it to Llama.load_adapter"
        )
    changes = read_changes(files.tensors, files.config, args, files.path)
    params = _merged_params(base.params, args, changes, files)
    base_shapes, shapes = full_shapes(args), full_shapes(make_args(params, base.source, 0))
    for name, change in changes.items():
        check_change(name, change, shapes.get(name), files.path)

    def read(name: str) -> torch.Tensor:
        def read_base() -> torch.Tensor:
            if name.endswith(".bias") and name not in base_shapes:
                return torch.zeros(shapes[name])
            return base.rank_part(name, args, 0, 1)

        return changes[name].apply(read_base) if name in changes else read_base()

    def mapped(name: str) -> list[torch.Tensor]:
        tied = name == OUTPUT and args.tie_word_embeddings
        return base.mapped(EMBEDDING if tied else name)

    names = [f"{base.names[0]} with {directory}"]
    weights = Weights(shapes, read, mapped)
    texts = _text_files(base, directory)
    return Checkpoint(base.source, params, [weights], names, base.dtype, texts, in_float32=True)


def _text_files(base: Checkpoint, directory: Path) -> dict[str, Path | bytes]:
    files = text_files(directory)
    if not {"tokenizer.model", "tokenizer.json"} & files.keys():
        return dict(base.files)
    # One tokenizer's settings and templates would mislead another.
    kept = {name: file for name, file in base.files.items() if name == "generation_config.json"}
    return kept | files


def _merged_params(
    params: Mapping[str, Any], args: ModelArgs, changes: dict[str, Change], files: AdapterFiles
) -> dict[str, Any]:
    """Return the merged model's hyper-parameters.

    Of tied weights' changes one is left, or each has its own and the weights are no longer tied.
    """
    merged = {**params, "vocab_size": args.vocab_size}
    if files.classifies and args.labels is None:
        score = changes[OUTPUT].replacement if OUTPUT in changes else None
        if score is None or score.dim() != 2:
            raise ValueError(f"{files.path} lacks the classifier's weight (score): save it again")
        merged["labels"] = [f"LABEL_{i}" for i in range(len(score))]
        merged["tie_word_embeddings"] = False
    elif args.tie_word_embeddings:
        merged["tie_word_embeddings"] = stays_tied(changes, files.config, files.path)
    for name in changes:
        if name.endswith(".bias") and name not in full_shapes(args):  # the base's are zeros
            merged["attention_bias" if ".attention." in name else "mlp_bias"] = True
    new = changes[EMBEDDING].replacement if EMBEDDING in changes else None
    if new is not None and new.dim() == 2:
        merged["vocab_size"] = len(new)
    untied = not merged.get("tie_word_embeddings") and merged.get("labels") is None
    output = changes[OUTPUT].replacement if OUTPUT in changes else None
    if merged["vocab_size"] != args.vocab_size and untied and output is None:
        raise ValueError(
            f"{files.path} has an embedding of {merged['vocab_size']} rows but no lm_head, and the "
            f"base's has {args.vocab_size}: save the adapter with save_embedding_layers=True"
        )
    return merged
