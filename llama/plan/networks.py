"""Networks to plan for: those of checkpoints, by their headers, and of published sizes."""

from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint, Weights, chosen_scheme, vocabulary_size
from llama.checkpoint.load import choose_dtype
from llama.checkpoint.memory import Network
from llama.checkpoint.params import make_args
from llama.checkpoint.pretrained import LoadConfig
from llama.checkpoint.sharding import check_model_parallel_size, full_shapes
from llama.plan.flags import WorkFlags

_LLAMA_2: dict[str, Any] = {"vocab_size": 32000}
_GROUPED: dict[str, Any] = {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 32000}
_LLAMA_3: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256}
_SMALL: dict[str, Any] = {"hidden_dim": 8192, "tie_word_embeddings": True, **_LLAMA_3}
SIZES: dict[str, dict[str, Any]] = {
    "7B": _LLAMA_2,
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40, **_LLAMA_2},
    "34B": {"n_layers": 48, "hidden_dim": 22016, **_GROUPED},
    "70B": {"n_layers": 80, "hidden_dim": 28672, **_GROUPED},
    "1B": {"dim": 2048, "n_layers": 16, **_SMALL},
    "3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, **_SMALL},
    "8B": {"hidden_dim": 14336, **_LLAMA_3},
    "405B": {"dim": 16384, "n_layers": 126, "n_heads": 128, "hidden_dim": 53248, **_LLAMA_3},
}
"""The ``params.json`` of published checkpoints: Llama 2's and Code Llama's, then Llama 3's."""


def open_network(ckpt_dir: str, kind: str, work: WorkFlags) -> Network:
    """Return the network of a checkpoint or of a published size, with a cache for one sequence.

    Args:
        ckpt_dir: the path, or a key of ``SIZES``.
        kind: of the devices: "cuda" or "cpu".
        work: how it is loaded.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ImportError: its format needs a package that isn't installed.
        ValueError: it can't be read, or not be loaded so.
    """
    config = LoadConfig(
        ckpt_dir,
        max_seq_len=work.n_context,
        dtype=work.dtype,
        quantize=work.quantize,
        group_size=work.group_size,
        kv_cache_dtype=work.kv_cache_dtype,
    )
    is_size = ckpt_dir in SIZES and not Path(ckpt_dir).exists()
    checkpoint = _published(ckpt_dir) if is_size else open_checkpoint(Path(ckpt_dir))
    rows = vocabulary_size(checkpoint)
    args = make_args(checkpoint.params, checkpoint.source, rows, config.max_seq_len, 1)
    checkpoint.check(args)
    forms = checkpoint.forms
    if config.quantize is not None:
        is_wide = config.quantize == "none"
        scheme = None if is_wide else chosen_scheme(checkpoint, config.quantize, config.group_size)
        forms = {} if scheme is None else scheme.forms(args)
    check_model_parallel_size(args, 1, forms)  # groups divide the widths
    dtype = config.dtype or choose_dtype(checkpoint.dtype, kind, fast_bf16=True)
    return Network(args, dtype, forms, config.kv_cache_dtype == "int8")


def _published(name: str) -> Checkpoint:
    """Return a checkpoint of a published size, whose tensors have shapes only."""
    tensors: dict[str, torch.Tensor] = {}
    weights = Weights(full_shapes(ModelArgs(**SIZES[name])), tensors.__getitem__)
    return Checkpoint(name, SIZES[name], [weights], [name], torch.bfloat16)
