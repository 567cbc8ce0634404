"""Checkpoints written as Hugging Face's directories."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.chat.jinja import INST, LLAMA3
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.hf_names import from_interleaved, hf_name, is_rotary
from llama.checkpoint.meta import LLAMA_32, scaled_rope
from llama.checkpoint.save import new_directory, write_files, write_json
from llama.checkpoint.sharding import full_shapes
from llama.errors import need
from llama.rope import attention_factor, rope_factors
from llama.tokenizers import load_tokenizer
from llama.tokenizers.tiktoken import hf_files, is_tiktoken

SHARD_BYTES = 5_000_000_000
"""The most bytes of weights that one file gets, as in ``transformers``' ``save_pretrained``."""

# Llama 3.1's and 3.2's scaling, which GGUF files have as one factor for each frequency.
_LLAMA3 = [scaled_rope(*shape) for shape in ((None, None), LLAMA_32[0])]


def save_hf(
    checkpoint: Checkpoint,
    args: ModelArgs,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a checkpoint as ``transformers`` does, in files of at most 5 GB.

    Args:
        checkpoint: the weights, not quantised.
        args: the checkpoint's hyper-parameters (``make_args``).
        out_dir: the directory to write; must not exist.
        dtype: the dtype to store; None for each tensor's own.
        progress: called with the number of bytes that have been written.

    Raises:
        FileExistsError: ``out_dir`` already exists.
        ImportError: the package ``safetensors`` is missing.
        OSError: the disk is full.
        ValueError: the weights don't make the network, or the format can't describe it.
    """
    safetensors = need("safetensors.torch")
    checkpoint.check(args)
    config = _config(checkpoint, args, dtype or checkpoint.dtype)
    shards, total = _divide(args, (dtype or checkpoint.dtype).itemsize)
    with new_directory(out_dir, total) as partial:
        write_json(partial / "config.json", config)
        write_files(partial, {**_text_defaults(checkpoint), **checkpoint.files})
        weight_map, written = {}, 0
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = "model.safetensors"
            tensors = {}
            for name in names:
                tensor = checkpoint.rank_part(name, args, 0, 1).to(dtype)
                if is_rotary(name):
                    tensor = from_interleaved(tensor, args.head_dim)
                key = hf_name(name)
                if name == "output.weight" and args.labels is not None:
                    key = "score.weight"
                # safetensors refuses tensors that share memory.
                tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
                weight_map[key] = file
                written += tensor.nbytes
                progress(written)
            safetensors.save_file(tensors, partial / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": written}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)


def _divide(args: ModelArgs, itemsize: int) -> tuple[list[list[str]], int]:
    """Return the names of each file's tensors, and the bytes of all."""
    shards: list[list[str]] = [[]]
    shard_bytes = total = 0
    for name, shape in full_shapes(args).items():
        nbytes = torch.Size(shape).numel() * itemsize
        if shards[-1] and shard_bytes + nbytes > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += nbytes
        total += nbytes
    return shards, total


def _config(checkpoint: Checkpoint, args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``config.json``."""
    tokenizer = None
    if {"tokenizer.model", "tokenizer.json"} & checkpoint.files.keys():
        tokenizer = load_tokenizer(checkpoint.files, args.vocab_size)
    task = "ForCausalLM" if args.labels is None else "ForSequenceClassification"
    task = "Model" if args.labels == [] else task
    scaling, length = _rope_scaling(args, checkpoint.params.get("max_seq_len"))
    config: dict[str, Any] = {
        "architectures": [f"Llama{task}"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": length,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": args.tie_word_embeddings,
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if tokenizer is not None:
        stops = sorted(tokenizer.stop_ids)
        config["bos_token_id"] = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
        config["pad_token_id"] = tokenizer.pad_id if tokenizer.pad_id >= 0 else None
    if args.labels:
        config["id2label"] = {str(i): label for i, label in enumerate(args.labels)}
        config["label2id"] = {label: i for i, label in enumerate(args.labels)}
    return config


def _rope_scaling(args: ModelArgs, length: int | None) -> tuple[dict[str, Any] | None, int]:
    """Return the rotary scaling as ``config.json`` has it, and ``max_position_embeddings``.

    Args:
        args: the hyper-parameters.
        length: how long a text may be; None if the checkpoint, as Meta's, doesn't say.
    """
    scaling = dict(args.rope_scaling or {})
    kind = scaling.get("rope_type")
    if kind == "dynamic":  # where the trained length isn't stated twice
        return scaling, int(scaling.pop("original_max_position_embeddings"))
    if kind == "factors":
        scaling = _as_published(args) or {
            "rope_type": "longrope",  # the one kind that lists factors
            "factor": 1.0,
            "short_factor": scaling["factors"],
            "long_factor": scaling["factors"],
            "attention_factor": scaling.get("attention_factor", 1.0),
            "original_max_position_embeddings": length or 4096,
        }
    stretched = scaling.get("original_max_position_embeddings", 4096) * scaling.get("factor", 1)
    return scaling or None, length or int(stretched)


def _as_published(args: ModelArgs) -> dict[str, Any] | None:
    """Return Llama 3.1's or 3.2's scaling if it has the same factors."""
    for published in _LLAMA3:
        twin = ModelArgs(**{**vars(args), "rope_scaling": published})
        same = torch.allclose(rope_factors(twin), rope_factors(args), rtol=1e-4)
        if same and attention_factor(args) == 1:
            return published
    return None


def _text_defaults(checkpoint: Checkpoint) -> Mapping[str, bytes]:
    """Return the tokenizer's settings that Meta's directories leave out."""
    if "tokenizer.model" not in checkpoint.files:
        return {}
    model = checkpoint.files["tokenizer.model"]
    data = model if isinstance(model, bytes) else model.read_bytes()
    if is_tiktoken(data):
        return hf_files(data, "tokenizer.model", LLAMA3)
    has_steps = load_tokenizer(checkpoint.files).step_id is not None
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        **({} if has_steps else {"chat_template": INST}),
    }
    return {"tokenizer_config.json": json.dumps(config, indent=2).encode()}
