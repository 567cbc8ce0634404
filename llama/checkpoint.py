"""A checkpoint directory in Meta's layout: ``params.json`` and ``consolidated.NN.pth`` shards."""

import contextlib
import ctypes
import dataclasses
import json
import logging
import mmap
import os
import shutil
import sys
import time
from pathlib import Path

import fire
import torch

from llama import parallel
from llama.model import ModelArgs, Transformer
from llama.sharding import (
    check_model_parallel_size,
    distinct_pieces,
    full_shapes,
    joined_shape,
    rank_part,
)

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


def find_tokenizer(ckpt_dir: Path) -> Path:
    """The checkpoint's tokenizer, beside it or, as in Llama 2's layout, one directory up.

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


def read_args(
    ckpt_dir: Path, n_words: int, max_seq_len: int = 512, max_batch_size: int = 8
) -> ModelArgs:
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
    """Build the network and fill this rank's part of it from any number of shards.

    Args:
        args: the checkpoint's hyper-parameters (``read_args``).
        device: where weights and cache shall be.
        dtype: what they shall be; None chooses by checkpoint and device (``choose_dtype``).

    Raises:
        FileNotFoundError: weight files are missing.
        ValueError: a tensor is missing, unexpected or of the wrong shape, or the network can't be
            divided among the ranks.
    """
    start = time.monotonic()
    rank, ranks = parallel.rank(), parallel.world_size()
    check_model_parallel_size(args, ranks)
    shards = open_shards(ckpt_dir, args)
    with torch.device("meta"):
        model = Transformer(args)
    if dtype is None:
        stored = shards[0]["tok_embeddings.weight"].dtype
        dtype = parallel.choose_dtype(stored, device.type, parallel.has_fast_bf16(device))
    tensors = {}
    for name in model.state_dict():
        pieces = [shard[name] for shard in shards]
        # What needs no change stays mapped: it is read when it is used, and never copied.
        tensors[name] = rank_part(name, pieces, args, rank, ranks).to(device, dtype).contiguous()
        if not any(_shares_memory(tensors[name], piece) for piece in pieces):
            release(pieces)
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    model.allocate_buffers(device, dtype)
    logger.info("loaded %s in %.2f seconds", ckpt_dir, time.monotonic() - start)
    return model


def open_shards(ckpt_dir: Path, args: ModelArgs) -> list[Tensors]:
    """Map all shards and check that together they make the network of ``args``.

    Raises:
        FileNotFoundError: weight files are missing.
        ValueError: a file is no checkpoint, or a tensor is missing, unexpected or misshapen.
    """
    paths = find_shards(ckpt_dir)
    shards = [open_shard(path) for path in paths]
    expected = full_shapes(args)
    for path, shard in zip(paths, shards, strict=True):
        for problem, names in (
            ("lacks", sorted(expected.keys() - shard.keys())),
            ("has the unexpected", sorted(shard.keys() - expected.keys())),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ValueError(f"{path} {problem} {', '.join(names[:5])}{more}")
    for name, shape in expected.items():
        pieces = [shard[name] for shard in shards]
        for path, piece in zip(paths, pieces, strict=True):
            if not piece.is_floating_point():
                raise ValueError(f"{name} in {path} is {piece.dtype}, not a floating-point tensor")
        found = joined_shape(name, distinct_pieces(name, pieces, args))
        if found != shape:
            raise ValueError(
                f"{name} in {ckpt_dir} has the shape {found or 'of none of its shards'}, but "
                f"params.json and the tokenizer make it {shape}"
            )
    return shards


def _shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def release(tensors: list[torch.Tensor]) -> None:
    """Let go of the memory of mapped tensors that were copied; they can still be read again."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for tensor in tensors:
        # Only whole pages, so that neighbours in the file keep theirs.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.is_contiguous() and start < end:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
            )


def save(
    shards: list[Tensors],
    args: ModelArgs,
    out_dir: Path,
    model_parallel_size: int = 1,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint in Meta's layout, bit by bit the same weights in another number of files.

    A model of one process is saved by ``save([model.state_dict()], model.params, out_dir)``.
    The directory appears when all of it is written.

    Args:
        shards: the weights as they lie now, in one or more parts.
        model_parallel_size: how many files to write.
        tokenizer: a ``tokenizer.model`` to put beside them.

    Raises:
        FileExistsError: ``out_dir`` is there already.
        ValueError: the network can't be divided into as many parts.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} is there already: give another name or remove it")
    check_model_parallel_size(args, model_parallel_size)
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        cache = ("max_seq_len", "max_batch_size")
        params = {k: v for k, v in dataclasses.asdict(args).items() if k not in cache}
        (partial / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / "tokenizer.model")
        for number in range(model_parallel_size):
            _show_progress(number, model_parallel_size)
            part = {}
            for name in shards[0]:
                pieces = [shard[name] for shard in shards]
                whole = rank_part(name, pieces, args, number, model_parallel_size)
                if name == "output.weight":  # padding is the ranks' affair, not the files'
                    rows = args.vocab_size - number * whole.shape[0]
                    whole = whole[: max(rows, 0)]
                part[name] = whole.detach().to("cpu", copy=True).contiguous()
            torch.save(part, partial / f"consolidated.{number:02d}.pth")
        _show_progress(model_parallel_size, model_parallel_size)
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _show_progress(done: int, total: int) -> None:
    bar = "#" * (30 * done // total)
    end = "\n" if done == total else ""
    print(f"\r[{bar:<30}] {done}/{total} files", end=end, file=sys.stderr, flush=True)


def reshard(in_dir: str, out_dir: str, model_parallel_size: int = 1) -> None:
    """Write a checkpoint again in another number of files.

    Args:
        in_dir: a checkpoint in Meta's layout.
        out_dir: where to write it; must not exist.
        model_parallel_size: how many ``consolidated.*.pth`` files to write.
    """
    source, target = Path(str(in_dir)), Path(str(out_dir))
    first = open_shard(find_shards(source)[0]).get("tok_embeddings.weight")
    args = read_args(source, n_words=-1 if first is None else first.shape[0])
    tokenizer = None
    with contextlib.suppress(FileNotFoundError):
        tokenizer = find_tokenizer(source)
    save(open_shards(source, args), args, target, model_parallel_size, tokenizer)


if __name__ == "__main__":
    fire.Fire({"reshard": reshard})
