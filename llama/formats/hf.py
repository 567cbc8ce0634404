"""Hugging Face directories: ``config.json``, safetensors or PyTorch files, in and out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.args import read_params
from llama.errors import printable
from llama.files import check_plain, open_shard, text_files
from llama.formats.extras import need
from llama.formats.layout import is_rotary, meta_name, to_interleaved
from llama.weights import Checkpoint, Weights

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def open_hf(directory: Path) -> Checkpoint:
    """Map a directory that ``transformers`` has written.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it isn't a Llama, needs what this network hasn't, or is damaged.
    """
    path = directory / "config.json"
    config = read_params(path)
    params, classifies = _params(config, str(path)), _is_classifier(config, str(path))
    tensors = {}
    for name, tensor in _open_weights(directory).items():
        if name.endswith("rotary_emb.inv_freq"):  # stale: it follows from the hyper-parameters
            continue
        if name == "lm_head.weight" and (classifies or params["tie_word_embeddings"]):  # stale too
            continue
        # A bare LlamaModel's names lack the prefix.
        meta = meta_name(name) or meta_name(f"model.{name}")
        if meta is None:
            raise ValueError(f"{directory} has the unexpected {printable(name)}")
        if meta in tensors:
            raise ValueError(f"{directory} holds {meta} twice, under two names")
        tensors[meta] = tensor
    check_plain(tensors, str(directory))
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise ValueError(f"{odd[0]} in {directory} is {tensors[odd[0]].dtype}: it is quantised")
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
    if "generation_config.json" not in files:  # older directories keep these ids in config.json
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        files["generation_config.json"] = json.dumps(ids).encode()
    return Checkpoint(str(path), params, [weights], [str(directory)], dtype, files)


def _params(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``config.json`` in the terms of ``params.json``."""
    kind = config.get("model_type")
    if kind != "llama":
        raise ValueError(f"{source} is of model_type {printable(repr(kind))}: expected 'llama'")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            raise ValueError(f"{source} has {name}, which this network doesn't have")
    if config.get("hidden_act", "silu") != "silu":
        act = printable(repr(config["hidden_act"]))
        raise ValueError(f"{source} has the hidden_act {act}: expected 'silu'")
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
    params = {ours: config[theirs] for theirs, ours in names.items()}
    params["norm_eps"] = config.get("rms_norm_eps", 1e-6)  # LlamaConfig's default
    if config.get("num_key_value_heads") is not None:
        params["n_kv_heads"] = config["num_key_value_heads"]
    if config.get("head_dim") is not None:
        params["head_dim"] = config["head_dim"]
    if type(config.get("max_position_embeddings")) is int:
        params["max_seq_len"] = config["max_position_embeddings"]
    # transformers 5 says in rope_parameters what older versions said in two places.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source} has rope_scaling {printable(repr(rope))}: expected an object")
    theta = rope.get("rope_theta") or config.get("rope_theta")
    params["rope_theta"] = 10000.0 if theta is None else theta
    scaling = {k: v for k, v in rope.items() if k not in ("type", "rope_theta")}
    kind = scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{source} turns a part of each head (partial_rotary_factor) only")
    scaling.pop("partial_rotary_factor", None)
    if kind == "linear":  # what else stands beside it has no meaning
        scaling = {"rope_type": "linear", "factor": rope.get("factor")}
    if kind != "default":
        params["rope_scaling"] = scaling
    tied = config.get("tie_word_embeddings", False)
    params["tie_word_embeddings"] = tied
    for name in ("dim", "n_heads", "head_dim"):  # what is calculated with, before all is checked
        value = params.get(name, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {printable(repr(value))} in {source}: expected 1 or more")
    return params


def _is_classifier(config: Mapping[str, Any], source: str) -> bool:
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    known = ("LlamaForCausalLM", "LlamaForSequenceClassification", "LLaMAForCausalLM")
    if not isinstance(architectures, list) or architectures[0] not in known:
        raise ValueError(
            f"{source} is of architecture {printable(repr(architectures))}: expected "
            "LlamaForCausalLM or LlamaForSequenceClassification"
        )
    return architectures[0] == "LlamaForSequenceClassification"


def _labels(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    given = config.get("id2label")
    names = given if isinstance(given, dict) else {}
    rows = tensors["output.weight"].shape[0] if "output.weight" in tensors else len(names)
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(rows)]


def _open_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, mapped, under Hugging Face's names."""
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
    weight_map = read_params(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(f"{path} has no weight_map from tensors to files beside it")
    tensors: dict[str, torch.Tensor] = {}
    there = {entry.name for entry in path.parent.iterdir() if entry.is_file()}
    for file in sorted(set(weight_map.values())):
        if file not in there:
            raise FileNotFoundError(f"{path} names {printable(file)}, which is missing")
        found = open_tensors(path.parent / file)
        for name in (name for name, where in weight_map.items() if where == file):
            if name not in found:
                raise ValueError(
                    f"{path} says that {printable(name)} is in {printable(file)}, but it isn't: "
                    "download both again"
                )
        tensors |= found
    return tensors


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Map a ``.safetensors`` file or a PyTorch file.

    Raises:
        ImportError: the package ``safetensors`` is missing.
        ValueError: the file is damaged or isn't what its name says.
    """
    if path.suffix != ".safetensors":
        return open_shard(path)
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = printable(str(error), 200)
        raise ValueError(f"{path} is damaged or no safetensors file ({reason})") from error
