"""A checkpoint directory in Meta's layout: ``params.json`` and ``consolidated.NN.pth`` shards."""

import dataclasses
import json
import logging
import time
from pathlib import Path

import torch

from llama import parallel
from llama.model import ModelArgs, Transformer

logger = logging.getLogger(__name__)

# Published files carry these tables, which follow from the hyper-parameters.
_DERIVED = ("rope.freqs", "rotary_emb.inv_freq")

Tensors = dict[str, torch.Tensor]


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The checkpoint's weight files in order.

    Raises:
        FileNotFoundError: the directory or its shards are missing.
    """
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {ckpt_dir}: check ckpt_dir")
    shards = sorted(ckpt_dir.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(
            f"{ckpt_dir} has no weights: expected consolidated.00.pth, consolidated.01.pth, ..."
        )
    for number, path in enumerate(shards):
        if path.name != f"consolidated.{number:02d}.pth":
            raise FileNotFoundError(
                f"{ckpt_dir} has {len(shards)} weight files but consolidated.{number:02d}.pth is "
                f"missing (found {path.name} in its place): download it again"
            )
    return shards


def read_args(ckpt_dir: Path, n_words: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """The hyper-parameters in ``params.json``, with the size of the cache.

    Args:
        n_words: the tokenizer's vocabulary, which a ``vocab_size`` of -1 stands for.

    Raises:
        FileNotFoundError: there is no ``params.json``.
        ValueError: it is malformed, or holds a key or value that nobody knows.
    """
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: a checkpoint needs its hyper-parameters")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}, not an object of parameters")
    known = [field.name for field in dataclasses.fields(ModelArgs)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(
            f"{path} has the unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}: "
            f"known are {', '.join(known)}"
        )
    args = ModelArgs(**{**params, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size})
    _check_args(args, path)
    if args.vocab_size == -1:
        args.vocab_size = n_words
    if n_words > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {n_words} pieces, but {path} gives the model a vocabulary of "
            f"{args.vocab_size}: this is another model's tokenizer"
        )
    return args


def _check_args(args: ModelArgs, path: Path) -> None:
    sizes = ("dim", "n_layers", "n_heads", "multiple_of", "max_seq_len", "max_batch_size")
    for name in (*sizes, "n_kv_heads", "vocab_size"):
        value = getattr(args, name)
        if (name, value) in (("n_kv_heads", None), ("vocab_size", -1)):
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r} ({path}): expected a whole number above 0")
    for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
        value = getattr(args, name)
        if name == "ffn_dim_multiplier" and value is None:
            continue
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value!r} ({path}): expected a number above 0")
    if args.dim % args.n_heads or args.head_dim % 2:
        raise ValueError(
            f"dim {args.dim} and n_heads {args.n_heads} ({path}) don't give heads of an even size"
        )
    if args.n_heads % args.kv_heads:
        raise ValueError(
            f"n_heads {args.n_heads} is no multiple of n_kv_heads {args.kv_heads} ({path})"
        )


def open_shard(path: Path) -> Tensors:
    """Map a shard's tensors into memory; nothing is read until it is used.

    Raises:
        ValueError: the file is no checkpoint.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as a checkpoint: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} is no checkpoint: expected a dictionary of named tensors")
    return {name: t for name, t in tensors.items() if not name.endswith(_DERIVED)}


def load(
    ckpt_dir: Path, args: ModelArgs, device: torch.device, dtype: torch.dtype | None
) -> Transformer:
    """Build the network and fill this rank's part of it from a checkpoint.

    Args:
        args: the checkpoint's hyper-parameters (``read_args``).
        device: where weights and cache shall be.
        dtype: what they shall be; None chooses by checkpoint and device (``choose_dtype``).

    Raises:
        FileNotFoundError: weight files are missing.
        ValueError: a tensor is missing, unexpected or of the wrong shape, or the number of shards
            isn't the number of ranks.
    """
    start = time.monotonic()
    paths = find_shards(ckpt_dir)
    ranks = parallel.world_size()
    if len(paths) != ranks:
        raise ValueError(
            f"{ckpt_dir} has {len(paths)} shard{'s' * (len(paths) > 1)} but {ranks} "
            f"process{'es' * (ranks > 1)} run: start it with "
            f"torchrun --nproc_per_node {len(paths)}"
        )
    path = paths[parallel.rank()]
    tensors = open_shard(path)
    with torch.device("meta"):
        model = Transformer(args)
    _check_tensors(path, tensors, model)
    if dtype is None:
        stored = tensors["tok_embeddings.weight"].dtype
        dtype = parallel.choose_dtype(stored, device.type, parallel.has_fast_bf16(device))
    # Assigned as they are, mapped tensors stay mapped: only another dtype or device copies.
    model.load_state_dict(
        {name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True
    )
    model.requires_grad_(False)
    model.allocate_buffers(device, dtype)
    logger.info("loaded %s in %.2f seconds", ckpt_dir, time.monotonic() - start)
    return model


def _check_tensors(path: Path, tensors: Tensors, model: Transformer) -> None:
    expected = model.state_dict()
    for problem, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("has the unexpected", sorted(tensors.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{path} {problem} {', '.join(names[:5])}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {path} has the shape {tuple(tensor.shape)}, but params.json and the "
                f"tokenizer make it {tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} in {path} is {tensor.dtype}, not a floating-point tensor")
