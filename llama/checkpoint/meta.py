"""Meta's layout: ``consolidated.*.pth``, ``params.json`` and ``tokenizer.model``."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.forms import read_forms
from llama.checkpoint.params import read_params
from llama.checkpoint.rounding import is_made_here
from llama.checkpoint.sharding import Forms, form_of
from llama.checkpoint.tensor_files import check_plain, main_dtype, open_shard, unwrapped
from llama.errors import printable, short


def find_shards(ckpt_dir: Path) -> list[Path]:
    """Return the checkpoint's weight files in order.

    Raises:
        FileNotFoundError: the directory or one of its shards is missing.
    """
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {ckpt_dir}: check ckpt_dir")
    shards = sorted(ckpt_dir.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(
            f"{ckpt_dir} has no weights: expected consolidated.00.pth, consolidated.01.pth, ..."
        )
    for number, path in enumerate(shards):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no regular file: download it again")
        if path.name != f"consolidated.{number:02d}.pth":
            raise FileNotFoundError(
                f"{ckpt_dir} has {len(shards)} weight files but consolidated.{number:02d}.pth is "
                f"missing (found {path.name} in its place): download it again"
            )
    return shards


def find_tokenizer(ckpt_dir: Path) -> Path:
    """Return the checkpoint's tokenizer, in the directory or, as in Llama 2's layout, one level up.

    Raises:
        FileNotFoundError: there is none.
    """
    for directory in (ckpt_dir, ckpt_dir.resolve().parent):
        path = directory / "tokenizer.model"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no tokenizer.model in {ckpt_dir} or its parent: give its path as tokenizer_path"
    )


def open_meta(ckpt_dir: Path) -> Checkpoint:
    """Map a checkpoint in Meta's layout.

    Raises:
        FileNotFoundError: weight files or ``params.json`` are missing.
        ValueError: a file is no checkpoint, or the network is no Llama that this library has.
    """
    paths = find_shards(ckpt_dir)
    source = str(ckpt_dir / "params.json")
    params = read_params(ckpt_dir / "params.json")
    _check_kind(ckpt_dir, params, source)
    _read_scaled_rope(params, source)
    shards = [_open_unwrapped(path) for path in paths]
    forms = read_forms(params.pop("quantization", None), shards[0], source)
    for path, shard in zip(paths, shards, strict=True):
        check_plain(shard, str(path), forms)
        _check_orders(shard, str(path), forms)
    _check_shard_count(ckpt_dir, len(paths), shards[0], params)
    if not forms and all(_is_tied(shard) for shard in shards):
        params["tie_word_embeddings"] = True
        for shard in shards:
            del shard["output.weight"]
    plain = {name: t for name, t in shards[0].items() if not form_of(forms, name)}
    dtype = main_dtype(plain, str(paths[0]))
    if dtype == torch.float32 and not all(map(is_made_here, forms.values())):
        dtype = torch.float16  # of GGUF files, whose norms are float32 beside any weights
    names = [str(path) for path in paths]
    parts = [Weights.of(shard, mapped=True) for shard in shards]
    files: dict[str, Path | bytes] = dict(text_files(ckpt_dir))
    if "tokenizer.model" not in files and "tokenizer.json" not in files:
        with contextlib.suppress(FileNotFoundError):
            files["tokenizer.model"] = find_tokenizer(ckpt_dir)
    return Checkpoint(source, params, parts, names, dtype, files, forms=forms)


def _open_unwrapped(path: Path) -> dict[str, torch.Tensor]:
    """Map a file that may have been saved from ``torch.compile`` or a trainer's wrapper."""
    shard = open_shard(path)
    tensors = {unwrapped(name): tensor for name, tensor in shard.items()}
    if len(tensors) < len(shard):
        raise ValueError(f"{path} holds some tensors twice, under two names: save one of each")
    return tensors


def _check_orders(shard: Mapping[str, torch.Tensor], name: str, forms: Forms) -> None:
    """Raise ``ValueError`` unless orders of inputs have each input once."""
    for key, tensor in shard.items():
        if key.endswith(".order") and form_of(forms, key):
            order = tensor.flatten().sort().values
            if not torch.equal(order, torch.arange(len(order), dtype=order.dtype)):
                raise ValueError(
                    f"{printable(key)} in {name} doesn't have each number from 0 to "
                    f"{len(order) - 1} once: convert the weights again"
                )


# What the params.json of Meta's other models have, and this library doesn't read.
_QUANTIZED = "weights of four bits for ExecuTorch: take the model's bfloat16 weights"
_VISION = "a model that sees images: take one of text alone, such as Llama 3.1 8B"
_OTHER_KINDS = {
    "quantization_args": _QUANTIZED,
    "lora_args": _QUANTIZED,
    "vision_chunk_size": _VISION,
    "vision_max_num_chunks": _VISION,
    "vision_num_cross_attention_layers": _VISION,
    "vision_model": _VISION,
    "moe_args": "a mixture of experts, Llama 4: take a dense model, such as Llama 3.3 70B",
}


def _check_kind(ckpt_dir: Path, params: Mapping[str, Any], source: str) -> None:
    """Raise ``ValueError`` for those of Meta's models that are another network."""
    found = next((key for key in _OTHER_KINDS if params.get(key) is not None), None)
    if found is not None:
        raise ValueError(f"{source} has {found}, which describes {_OTHER_KINDS[found]}")
    scales = next(ckpt_dir.glob("fp8_scales_*.pt"), None)
    if scales is not None:
        raise ValueError(
            f"{scales} belongs to weights of eight bits (FP8), which this version doesn't read: "
            "take the bfloat16 ones, such as Llama-3.1-405B-MP8"
        )


LLAMA_32 = ((2048, 16), (3072, 28))
"""``dim`` and ``n_layers`` of Llama 3.2's 1B and 3B."""

_CONTEXT = 8192  # of Llama 3's training
_SCALED_CONTEXT = 131072


def scaled_rope(dim: object, n_layers: object) -> dict[str, Any]:
    """Return the ``rope_scaling`` that ``use_scaled_rope`` stands for in Meta's ``params.json``.

    The key doesn't tell Llama 3.1's scaling from that of the smaller Llama 3.2: the shape does.

    Source: ``apply_scaling`` in https://github.com/meta-llama/llama-models
    (models/llama3/model.py), and the ``config.json`` of
    https://huggingface.co/meta-llama/Llama-3.2-1B
    """
    return {
        "rope_type": "llama3",
        "factor": 32.0 if (dim, n_layers) in LLAMA_32 else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _CONTEXT,
    }


def _read_scaled_rope(params: dict[str, Any], source: str) -> None:
    """Replace ``use_scaled_rope``, and add the length of Llama 3's training."""
    is_scaled = params.pop("use_scaled_rope", False)
    if type(is_scaled) is not bool:
        raise ValueError(
            f"use_scaled_rope is {short(is_scaled)} in {source}: expected true or false"
        )
    if is_scaled and params.get("rope_scaling") is not None:
        raise ValueError(f"{source} has use_scaled_rope and rope_scaling: remove one of them")
    if is_scaled:
        params["rope_scaling"] = scaled_rope(params.get("dim"), params.get("n_layers"))
    if params.get("rope_theta") == 500000:
        params.setdefault("max_seq_len", _SCALED_CONTEXT if is_scaled else _CONTEXT)


def _is_tied(shard: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a file has one tensor as embedding and output, as those of Llama 3.2 do."""
    embedding, output = shard.get("tok_embeddings.weight"), shard.get("output.weight")
    if embedding is None or output is None:
        return False
    same_place = embedding.data_ptr() == output.data_ptr() and embedding.numel() > 0
    return same_place and (embedding.shape, embedding.stride()) == (output.shape, output.stride())


def _check_shard_count(
    ckpt_dir: Path,
    n_shards: int,
    first: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
) -> None:
    """Raise ``FileNotFoundError`` if the first file's heads show that the last ones are missing.

    No error if the shapes make no sense: ``Checkpoint.check`` names them later.
    """
    wq, dim = first.get("layers.0.attention.wq.weight"), params.get("dim")
    n_heads, head_dim = params.get("n_heads"), params.get("head_dim", -1)
    if isinstance(n_heads, int) and isinstance(head_dim, int) and head_dim > 0:
        dim = n_heads * head_dim
    if wq is None or wq.dim() != 2 or not len(wq) or not isinstance(dim, int):
        return
    total = dim // len(wq)
    if n_shards < total <= 64 and total * len(wq) == dim:
        raise FileNotFoundError(
            f"{ckpt_dir} has {n_shards} of {total} weight files: "
            f"consolidated.{n_shards:02d}.pth is missing"
        )
