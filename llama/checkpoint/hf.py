"""Hugging Face directories: ``config.json``, safetensors or PyTorch files."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.hf_config import DTYPES, hf_dtype, hf_labels, hf_params, hf_task
from llama.checkpoint.hf_files import open_modules
from llama.checkpoint.hf_names import is_rotary, meta_name, to_interleaved
from llama.checkpoint.hf_quantized import quantization_settings, read_quantized
from llama.checkpoint.memory import release
from llama.checkpoint.packed import Modules, Packed
from llama.checkpoint.params import read_params
from llama.checkpoint.tensor_files import check_plain, main_dtype
from llama.errors import printable
from llama.layers.quantization import StoredWeight

logger = logging.getLogger(__name__)

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_HALF = (torch.float16, torch.bfloat16)


def open_hf(directory: Path, file: Path | None = None) -> Checkpoint:
    """Map a directory that ``transformers`` has written, or a tool that quantises weights.

    Args:
        directory: that of ``config.json``.
        file: the file of all weights; None to look for one or more by their names.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: a package that the format needs is missing.
        ValueError: it is no Llama, needs something that this network lacks, or is damaged.
    """
    path = directory / "config.json"
    config, source = read_params(path), str(path)
    params, task = hf_params(config, source), hf_task(config, source)
    settings = quantization_settings(config, directory)
    modules = open_modules(directory, file, classifies=task == "ForSequenceClassification")
    packed = read_quantized(settings, modules, source)
    tensors = _plain(modules, packed, params, str(directory))
    packed = {str(meta_name(module)): weight for module, weight in packed.items()}
    dtype = _dtype(tensors, packed, config, source)
    if params["tie_word_embeddings"] and task != "ForSequenceClassification":
        params["tie_word_embeddings"] = _tie(tensors, packed, dtype, source)
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])
    weights = _weights(tensors, packed, modules, head_dim)
    if task == "ForSequenceClassification":
        if _OUTPUT not in weights:
            raise ValueError(f"{directory} lacks {_OUTPUT}, the classifier's score.weight")
        params["labels"] = hf_labels(config, weights.shapes[_OUTPUT][0])
        params["tie_word_embeddings"] = False
    elif task == "Model" and _OUTPUT not in weights and not params["tie_word_embeddings"]:
        params["labels"] = []
    return Checkpoint(
        source,
        params,
        [weights],
        [str(file or directory)],
        dtype,
        _texts(directory, config),
        in_float32=any(weight.form is None for weight in packed.values()),
        kinds=_kinds(tensors, packed),
        forms={module: weight.form for module, weight in packed.items() if weight.form},
    )


def _texts(directory: Path, config: Mapping[str, Any]) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = dict(text_files(directory))
    files["config.json"] = directory / "config.json"
    if "generation_config.json" not in files:  # older directories keep these ids in config.json
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        files["generation_config.json"] = json.dumps(ids).encode()
    return files


def _plain(
    modules: Modules, packed: Mapping[str, Packed], params: Mapping[str, Any], name: str
) -> dict[str, torch.Tensor]:
    """Return the tensors that aren't quantised, under Meta's names.

    Raises:
        ValueError: there are others than weights and biases.
    """
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}  # under Hugging Face's names
    for module, parts in modules.items():
        meta = str(meta_name(module))
        used = packed[module].names if module in packed else ()
        for part, tensor in parts.items():
            if part in used or (part == "bias" and _is_needless(tensor, used, meta, params)):
                continue
            if part not in ("weight", "bias"):
                raise ValueError(f"{name} has the unexpected {printable(f'{module}.{part}')}")
            if f"{meta}.{part}" in tensors:  # score and lm_head
                raise ValueError(
                    f"{name} holds {meta}.{part} twice, under two names: one is {module}.{part}"
                )
            tensors[f"{meta}.{part}"] = stored[f"{module}.{part}"] = tensor
    check_plain(stored, name)
    for key, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{key} in {name} is {tensor.dtype}: it is quantised")
    return tensors


def _is_needless(
    bias: torch.Tensor, used: tuple[str, ...], module: str, params: Mapping[str, Any]
) -> bool:
    """Return whether a bias is one of zeros, which tools write beside each quantised weight."""
    kind = "attention_bias" if ".attention." in module else "mlp_bias"
    return bool(used) and not params.get(kind) and not bias.any()


def _dtype(
    tensors: Mapping[str, torch.Tensor],
    packed: Mapping[str, Packed],
    config: Mapping[str, Any],
    source: str,
) -> torch.dtype:
    """Return the dtype of plain weights; a half-precision one if the others are quantised."""
    stated = hf_dtype(config, source)
    dtype = main_dtype(tensors, source, stated)
    if not packed or dtype in _HALF:
        return dtype
    return stated if stated in _HALF else torch.float16


def _kinds(tensors: Mapping[str, torch.Tensor], packed: Mapping[str, Packed]) -> dict[str, str]:
    """Return the format's names of types by tensor, where some are quantised."""
    if not packed:
        return {}
    plain = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    return plain | {f"{module}.weight": weight.kind for module, weight in packed.items()}


def _weights(
    tensors: Mapping[str, torch.Tensor],
    packed: Mapping[str, Packed],
    modules: Modules,
    head_dim: int,
) -> Weights:
    """Return all weights under Meta's names, with rotary rows in Meta's order."""
    parts = {str(meta_name(module)): parts for module, parts in modules.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for module, weight in packed.items():
        stored = weight.form.shapes(*weight.shape) if weight.form else {"weight": weight.shape}
        shapes |= {f"{module}.{part}": shape for part, shape in stored.items()}

    def in_order(tensor: torch.Tensor) -> torch.Tensor:
        fits = tensor.dim() > 0 and head_dim % 2 == 0 and tensor.shape[0] % head_dim == 0
        return to_interleaved(tensor, head_dim) if fits else tensor

    last: tuple[str, StoredWeight] = ("", {})  # its tensors are read one after another

    def read(name: str) -> torch.Tensor:
        nonlocal last
        module, _, part = name.rpartition(".")
        if name in tensors:
            tensor = tensors[name]
        else:
            if module != last[0]:
                last = ("", {})  # released before the next one is made
                last = (module, packed[module].read())
            tensor = last[1][part]
        return in_order(tensor) if is_rotary(module) and part != "order" else tensor

    def mapped(name: str) -> list[torch.Tensor]:
        if name in tensors:
            return [tensors[name]]
        module = name.rpartition(".")[0]
        return [parts[module][part] for part in packed[module].names]

    return Weights(shapes, read, mapped)


def _tie(
    tensors: dict[str, torch.Tensor],
    packed: Mapping[str, Packed],
    dtype: torch.dtype,
    source: str,
) -> bool:
    """Remove a stored output that is the embedding; return whether the two are tied indeed.

    As in transformers, one of them stands for both, and two that differ in ``dtype`` are used both.
    """
    if "output" in packed or ("tok_embeddings" in packed and _OUTPUT in tensors):
        return False
    output, embedding = tensors.pop(_OUTPUT, None), tensors.get(_EMBEDDING)
    if output is None:
        return True
    if embedding is None:
        tensors[_EMBEDDING] = output
        return True
    is_same = output.shape == embedding.shape
    if is_same and (output.data_ptr(), output.dtype) != (embedding.data_ptr(), embedding.dtype):
        rows = zip(output.split(4096), embedding.split(4096), strict=True)
        is_same = all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in rows)
        release([output])
    if not is_same:
        logger.warning(
            "%s has tie_word_embeddings, but the stored lm_head.weight differs from the embedding: "
            "it is used",
            source,
        )
        tensors[_OUTPUT] = output
    return is_same
