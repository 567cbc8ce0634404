"""Hugging Face directories: ``config.json``, safetensors or PyTorch files."""

import json
import logging
import re
from pathlib import Path

import torch

from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.hf_config import DTYPES, hf_dtype, hf_labels, hf_params, hf_task
from llama.checkpoint.memory import release
from llama.checkpoint.params import read_params
from llama.checkpoint.tensor_files import check_plain, main_dtype, open_tensors, unwrapped
from llama.errors import printable

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"

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
    """Return Meta's name of a module or, with ``.weight`` or ``.bias`` behind it, of its parameter.

    None for a name that the Llama network doesn't have.
    """
    stem, suffix = _stem_and_suffix(hf_name)
    if stem in _GLOBAL:
        return META_NAMES[stem] + suffix
    match = _LAYER.fullmatch(stem)
    if match is None or match[2] in _GLOBAL or match[2] not in META_NAMES:
        return None
    return f"layers.{match[1]}.{META_NAMES[match[2]]}{suffix}"


def hf_name(meta_name: str) -> str:
    """Return Hugging Face's name of a module or parameter; ``lm_head`` for ``output``.

    Raises:
        KeyError: the network has no such module.
    """
    stem, suffix = _stem_and_suffix(meta_name)
    if not stem.startswith("layers."):
        return _HF_NAMES[stem] + suffix
    _, layer, module = stem.split(".", 2)
    return f"model.layers.{layer}.{_HF_NAMES[module]}{suffix}"


def is_rotary(meta_name: str) -> bool:
    """Return whether a module or parameter gives queries or keys, whose rows lie in another order.

    Source: ``permute`` in transformers' ``convert_llama_weights_to_hf.py``.
    """
    return _stem_and_suffix(meta_name)[0].endswith((".attention.wq", ".attention.wk"))


def _stem_and_suffix(name: str) -> tuple[str, str]:
    stem = name.removesuffix(".bias") if name.endswith(".bias") else name.removesuffix(".weight")
    return stem, name[len(stem) :]


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
    config, source = read_params(path), str(path)
    params, task = hf_params(config, source), hf_task(config, source)
    tensors = _open_renamed(directory, classifies=task == "ForSequenceClassification")
    dtype = main_dtype(tensors, source, hf_dtype(config, source))
    if task == "ForSequenceClassification":
        if _OUTPUT not in tensors:
            raise ValueError(f"{directory} lacks {_OUTPUT}, the classifier's score.weight")
        params["labels"] = hf_labels(config, len(tensors[_OUTPUT]))
        params["tie_word_embeddings"] = False
    elif params["tie_word_embeddings"]:
        params["tie_word_embeddings"] = _tie(tensors, dtype, source)
    elif task == "Model" and _OUTPUT not in tensors:
        params["labels"] = []
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        fits = tensor.dim() > 0 and head_dim % 2 == 0 and tensor.shape[0] % head_dim == 0
        return to_interleaved(tensor, head_dim) if is_rotary(name) and fits else tensor

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weights = Weights(shapes, read, lambda name: (tensors[name],))
    files: dict[str, Path | bytes] = dict(text_files(directory))
    files["config.json"] = path
    if "generation_config.json" not in files:  # older directories keep these ids in config.json
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        files["generation_config.json"] = json.dumps(ids).encode()
    return Checkpoint(source, params, [weights], [str(directory)], dtype, files)


def _tie(tensors: dict[str, torch.Tensor], dtype: torch.dtype, source: str) -> bool:
    """Remove a stored output that is the embedding; return whether the two are tied indeed.

    As in transformers, one of them stands for both, and two that differ in ``dtype`` are used both.
    """
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


def _open_renamed(directory: Path, classifies: bool) -> dict[str, torch.Tensor]:
    """Map all tensors of a directory under Meta's names."""
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}  # under the files' own names
    for name, tensor in _open_weights(directory).items():
        if name.endswith("rotary_emb.inv_freq"):  # stale: it follows from the hyper-parameters
            continue
        bare = unwrapped(name)
        if bare == "lm_head.weight" and classifies:  # stale too
            continue
        meta = meta_name(bare) or meta_name(f"model.{bare}")
        if meta is None:
            raise ValueError(f"{directory} has the unexpected {printable(name)}")
        if meta in tensors:
            raise ValueError(
                f"{directory} holds {meta} twice, under two names: one is {printable(name)}"
            )
        tensors[meta] = stored[name] = tensor
    check_plain(stored, str(directory))
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{printable(name)} in {directory} is {tensor.dtype}: it is quantised")
    return tensors


def _open_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Map all tensors of a directory under Hugging Face's names.

    As transformers does, a single file comes before an index beside it, which is an older one's.
    """
    for name in _WEIGHTS:
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            if index.is_file():
                logger.warning("%s is ignored: %s beside it holds all weights", index, name)
            return open_tensors(path)
        if index.is_file():
            return _open_index(index)
    names = [file for name in _WEIGHTS for file in (name, f"{name}.index.json")]
    raise FileNotFoundError(
        f"{directory} has no weights: expected one of {', '.join(names)}; download them, or run "
        "git lfs pull in a clone"
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
