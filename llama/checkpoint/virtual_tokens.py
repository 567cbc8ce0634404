"""Prompt tuning, P-tuning and prefix tuning as PEFT saves them: virtual tokens before a prompt.

Papers: https://arxiv.org/abs/2104.08691, https://arxiv.org/abs/2103.10385 and
https://arxiv.org/abs/2101.00190.
"""

import torch

from llama import parallel
from llama.args import ModelArgs
from llama.checkpoint.adapter_files import AdapterFiles
from llama.checkpoint.sharding import rank_part
from llama.errors import short


def read_prompt(files: AdapterFiles, args: ModelArgs) -> torch.Tensor:
    """Return the embeddings of prompt tuning's or P-tuning's virtual tokens, (n_virtual, dim).

    Raises:
        ValueError: they are missing, don't fit the model, or fill its cache.
    """
    return _embeddings(files, args, args.dim)


def read_prefix(files: AdapterFiles, args: ModelArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of prefix tuning's virtual tokens, this rank's heads of them.

    They are what the cache holds of real tokens: PEFT hands them to the network as keys that are
    rotated already, in whose order half a head lies between the elements of a pair.

    Returns:
        Each of the shape (n_layers, n_virtual, local key/value heads, head_dim).

    Raises:
        ValueError: as in ``read_prompt``.
    """
    heads = args.kv_heads * args.head_dim
    flat = _embeddings(files, args, 2 * args.n_layers * heads)
    both = flat.unflatten(1, (args.n_layers, 2, heads)).movedim(-1, 0)  # (heads, n_virtual, …, 2)
    rank, ranks = parallel.rank(), parallel.world_size()
    local = rank_part("layers.0.attention.wk.weight", [both], args, rank, ranks)
    keys, values = local.unflatten(0, (-1, args.head_dim)).permute(4, 3, 2, 0, 1)
    pairs = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return pairs, values


def _embeddings(files: AdapterFiles, args: ModelArgs, width: int) -> torch.Tensor:
    path, n_virtual = files.path, files.config["num_virtual_tokens"]
    found = files.tensors.get("prompt_embeddings")
    if found is None:
        raise ValueError(
            f"{path} lacks prompt_embeddings: save the adapter with PEFT's save_pretrained"
        )
    if found.shape != (n_virtual, width):
        raise ValueError(
            f"{path} has prompt_embeddings of the shape {tuple(found.shape)}, where "
            f"{(n_virtual, width)} is expected by its {short(n_virtual)} num_virtual_tokens and "
            "the model: one of the files belongs to another adapter, or it to another model"
        )
    if n_virtual >= args.max_seq_len:
        raise ValueError(
            f"{path} has {n_virtual} virtual tokens, which leave no room for a prompt in "
            f"max_seq_len={args.max_seq_len}: give Llama.build a larger max_seq_len"
        )
    return found
