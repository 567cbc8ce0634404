"""Hugging Face directories: ``config.json``, safetensors or PyTorch files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.params import read_params
from llama.checkpoint.tensor_files import check_plain, open_tensors
from llama.errors import printable

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Hugging Face's name of a module, without its layer's prefix, and Meta's.
META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
    "lm_head": "output",
    # LlamaForSequenceClassification has it in place of lm_head.
    "score": "output",
}
_GLOBAL = ("model.embed_tokens", "model.norm", "lm_head", "score")
_HF_NAMES = {meta: hf for hf, meta in META_NAMES.items() if hf != "score"}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")


def meta_name(hf_name: str) -> str | None:
    """Return Meta's name of a module or, with ``.weight`` at the end, of its weight.

    None for a name that the Llama network doesn't have.
    """
    stem = hf_name.removesuffix(".weight")
    suffix = hf_name[len(stem) :]
    if stem in _GLOBAL:
        return META_NAMES[stem] + suffix
    match = _LAYER.fullmatch(stem)
    if match is None or match[2] in _GLOBAL or match[2] not in META_NAMES:
        return None
    return f"layers.{match[1]}.{META_NAMES[match[2]]}{suffix}"


def hf_name(meta_name: str) -> str:
    """Return Hugging Face's name of a module or weight; ``lm_head`` for ``output``.

    Raises:
        KeyError: the network has no such module.
    """
    stem = meta_name.removesuffix(".weight")
    suffix = meta_name[len(stem) :]
    if not stem.startswith("layers."):
        return _HF_NAMES[stem] + suffix
    _, layer, module = stem.split(".", 2)
    return f"model.layers.{layer}.{_HF_NAMES[module]}{suffix}"


def is_rotary(meta_name: str) -> bool:
    """Return whether a module or weight gives queries or keys, whose rows are ordered differently.

    Source: ``permute`` in transformers' ``convert_llama_weights_to_hf.py``.
    """
    return meta_name.removesuffix(".weight").endswith((".attention.wq", ".attention.wk"))


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return queries' or keys' rows in Meta's order, where a rotated pair is adjacent.

    Args:
        weight: shape (n_heads * head_dim, ...); in Hugging Face's order half a head lies between
            the two.
        head_dim: the size of a head.

    Returns:
        A copy of the same shape.
    """
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def from_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a copy in Hugging Face's order: the inverse of ``to_interleaved``."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def open_hf(directory: Path) -> Checkpoint:
    """Map a directory that ``transformers`` has written.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package ``safetensors`` is missing.
        ValueError: it is no Llama, needs something that this network lacks, or is damaged.
    """
    path = directory / "config.json"
    config = read_params(path)
    params, classifies = _params(config, str(path)), _is_classifier(config, str(path))
    tensors = _open_renamed(directory, without_head=classifies or params["tie_word_embeddings"])
    if classifies:
        params["labels"] = _labels(config, tensors)
        params["tie_word_embeddings"] = False
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        fits = tensor.dim() == 2 and head_dim % 2 == 0 and tensor.shape[0] % head_dim == 0
        return to_interleaved(tensor, head_dim) if is_rotary(name) and fits else tensor

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weights = Weights(shapes, read, lambda name: (tensors[name],))
    embedding = tensors.get("tok_embeddings.weight")
    dtype = torch.float32 if embedding is None else embedding.dtype
    files: dict[str, Path | bytes] = dict(text_files(directory))
    files["config.json"] = path
    if "generation_config.json" not in files:  # older directories keep these ids in config.json
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        files["generation_config.json"] = json.dumps(ids).encode()
    return Checkpoint(str(path), params, [weights], [str(directory)], dtype, files)


def _open_renamed(directory: Path, without_head: bool) -> dict[str, torch.Tensor]:
    """Map all tensors of a directory under Meta's names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _open_weights(directory).items():
        if name.endswith("rotary_emb.inv_freq"):  # stale: it follows from the hyper-parameters
            continue
        if name == "lm_head.weight" and without_head:  # stale too
            continue
        # A bare LlamaModel's names lack the prefix.
        meta = meta_name(name) or meta_name(f"model.{name}")
        if meta is None:
            raise ValueError(f"{directory} has the unexpected {printable(name)}")
        if meta in tensors:
            raise ValueError(f"{directory} holds {meta} twice, under two names")
        tensors[meta] = tensor
    check_plain(tensors, str(directory))
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} in {directory} is {tensor.dtype}: it is quantised")
    return tensors


def _params(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the hyper-parameters of ``config.json`` with the keys of ``params.json``."""
    _check_supported(config, source)
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "vocab_size": "vocab_size",
        "intermediate_size": "hidden_dim",
    }
    missing = [name for name in names if name not in config]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    params = {meta: config[hf] for hf, meta in names.items()}
    params["norm_eps"] = config.get("rms_norm_eps", 1e-6)  # LlamaConfig's default
    if config.get("num_key_value_heads") is not None:
        params["n_kv_heads"] = config["num_key_value_heads"]
    if config.get("head_dim") is not None:
        params["head_dim"] = config["head_dim"]
    if type(config.get("max_position_embeddings")) is int:
        params["max_seq_len"] = config["max_position_embeddings"]
    params |= _rope_params(config, source)
    params["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    for name in ("dim", "n_heads", "head_dim"):  # they are used before make_args checks all
        value = params.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {printable(repr(value))} in {source}: expected 1 or more")
    return params


def _check_supported(config: Mapping[str, Any], source: str) -> None:
    """Raise ``ValueError`` if ``config.json`` describes another network than Llama's."""
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ValueError(
            f"{source} is of model_type {printable(repr(model_type))}: expected 'llama'"
        )
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            raise ValueError(f"{source} has {name}, which this network doesn't have")
    if config.get("hidden_act", "silu") != "silu":
        act = printable(repr(config["hidden_act"]))
        raise ValueError(f"{source} has the hidden_act {act}: expected 'silu'")


def _rope_params(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``rope_theta`` and, where frequencies are scaled, ``rope_scaling``."""
    # transformers 5 has in rope_parameters what older versions had in two places.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source} has rope_scaling {printable(repr(rope))}: expected an object")
    theta = rope.get("rope_theta") or config.get("rope_theta")
    params: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else theta}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{source} rotates a part of each head (partial_rotary_factor) only: this network "
            "rotates all of it"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = {"rope_type": rope_type} | {
        key: value
        for key, value in rope.items()
        if key not in ("type", "rope_type", "rope_theta", "partial_rotary_factor")
    }
    if rope_type == "linear":  # other keys have no meaning with it
        scaling = {"rope_type": "linear", "factor": rope.get("factor")}
    if rope_type != "default":
        params["rope_scaling"] = scaling
    return params


def _is_classifier(config: Mapping[str, Any], source: str) -> bool:
    """Return whether the network gives a classifier's logits in place of tokens'."""
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    supported = ("LlamaForCausalLM", "LlamaForSequenceClassification", "LLaMAForCausalLM")
    if not isinstance(architectures, list) or architectures[0] not in supported:
        raise ValueError(
            f"{source} is of architecture {printable(repr(architectures))}: expected "
            "LlamaForCausalLM or LlamaForSequenceClassification"
        )
    return architectures[0] == "LlamaForSequenceClassification"


def _labels(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the classes' names in the order of the logits."""
    id2label = config.get("id2label")
    names = id2label if isinstance(id2label, dict) else {}
    n_labels = tensors["output.weight"].shape[0] if "output.weight" in tensors else len(names)
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(n_labels)]


def _open_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Map all tensors of a directory under Hugging Face's names."""
    for name in _INDEXES:
        if (directory / name).is_file():
            return _open_index(directory / name)
    for name in _SINGLE:
        if (directory / name).is_file():
            return open_tensors(directory / name)
    raise FileNotFoundError(
        f"{directory} has no weights: expected one of {', '.join((*_SINGLE, *_INDEXES))}"
    )


def _open_index(path: Path) -> dict[str, torch.Tensor]:
    """Map all tensors of the files that an index names."""
    weight_map = read_params(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(f"{path} has no weight_map from tensors to files next to it")
    tensors: dict[str, torch.Tensor] = {}
    existing = {entry.name for entry in path.parent.iterdir() if entry.is_file()}
    for file in sorted(set(weight_map.values())):
        if file not in existing:
            raise FileNotFoundError(f"{path} names {printable(file)}, which is missing")
        opened = open_tensors(path.parent / file)
        for name in (name for name, target in weight_map.items() if target == file):
            if name not in opened:
                raise ValueError(
                    f"{path} says that {printable(name)} is in {printable(file)}, but it isn't: "
                    "download both again"
                )
        tensors |= opened
    return tensors
