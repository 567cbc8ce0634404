"""From a checkpoint in Meta's layout to a network, and back into any number of files."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.files import (
    Tensors,
    check_tensors,
    find_shards,
    find_tokenizer,
    open_shard,
    open_shards,
    release,
)
from llama.model import ModelArgs, Transformer
from llama.params import read_args
from llama.sharding import (
    cache_bytes,
    check_model_parallel_size,
    parameter_count,
    rank_part,
)

logger = logging.getLogger(__name__)


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
        MemoryError: weights and cache are more than the machine has.
        ValueError: a tensor is missing, unexpected or of the wrong shape, or the network can't be
            divided among the ranks.
    """
    start = time.monotonic()
    rank, ranks = parallel.rank(), parallel.world_size()
    shards = open_shards(ckpt_dir, args)
    check_model_parallel_size(args, ranks)
    if dtype is None:
        stored = shards[0]["tok_embeddings.weight"].dtype
        dtype = parallel.choose_dtype(stored, device.type, parallel.has_fast_bf16(device))
    check_memory(args, dtype, device, ranks)
    with torch.device("meta"):
        model = Transformer(args)
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


def check_memory(args: ModelArgs, dtype: torch.dtype, device: torch.device, ranks: int) -> None:
    """Raise ``MemoryError``, saying what to change, if weights and cache can't fit the device."""
    available = parallel.device_memory(device)
    here = parallel.local_ranks() if device.type == "cpu" else 1  # which share this memory
    weights = parameter_count(args, ranks) * dtype.itemsize * here
    cache = cache_bytes(args, dtype, ranks) * here
    if available is None or weights + cache <= available:
        return
    left = (available - weights) * args.max_seq_len * args.max_batch_size // cache
    if left >= 1:
        advice = (
            f"max_seq_len={args.max_seq_len} times max_batch_size={args.max_batch_size} can be at "
            f"most {left}"
        )
    elif weights * 2 // dtype.itemsize < available:
        advice = f"dtype={dtype} could be torch.bfloat16"
    else:
        advice = "the weights alone are too much: share them among more GPUs or more machines"
    raise MemoryError(
        f"weights of {weights / 1e9:.1f} GB and a cache of {cache / 1e9:.1f} GB don't fit the "
        f"{available / 1e9:.1f} GB of this machine's {device.type}: {advice}"
    )


def _shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def save(
    shards: list[Tensors],
    args: ModelArgs,
    out_dir: Path,
    model_parallel_size: int = 1,
    tokenizer: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a checkpoint in Meta's layout, bit by bit the same weights in another number of files.

    A model of one process is saved by ``save([model.state_dict()], model.params, out_dir)``.
    The directory appears when all of it is written.

    Args:
        shards: the weights as they lie now, in one or more parts.
        model_parallel_size: how many files to write.
        tokenizer: a ``tokenizer.model`` to put beside them.
        progress: called with the number of bytes that have been written.

    Raises:
        FileExistsError: ``out_dir`` is there already.
        MemoryError: one file's weights, which are put together in memory, are too much for it.
        OSError: the disk is full.
        ValueError: the shards don't make the network, or it can't be divided into as many parts.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} is there already: give another name or remove it")
    check_tensors(shards, args, [f"part {number}" for number in range(len(shards))])
    check_model_parallel_size(args, model_parallel_size)
    _check_room(shards, out_dir, model_parallel_size)
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        cache, optional = ("max_seq_len", "max_batch_size"), ("n_kv_heads", "rope_theta")
        default = dataclasses.asdict(ModelArgs())
        params = {
            key: value
            for key, value in dataclasses.asdict(args).items()
            # Meta's own code doesn't know every key: what says nothing new is left out.
            if key not in cache and not (key in optional and value == default[key])
        }
        (partial / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / "tokenizer.model")
        written = 0
        for number in range(model_parallel_size):
            part = {}
            for name in shards[0]:
                pieces = [shard[name] for shard in shards]
                whole = rank_part(name, pieces, args, number, model_parallel_size)
                if name == "output.weight":  # padding is the ranks' affair, not the files'
                    rows = args.vocab_size - number * whole.shape[0]
                    whole = whole[: max(rows, 0)]
                whole = whole.detach().cpu().contiguous()
                # torch.save writes the whole of what a view is a part of.
                whole_storage = whole.untyped_storage().nbytes() == whole.nbytes
                part[name] = whole if whole_storage else whole.clone()
            with _Reporting(partial / f"consolidated.{number:02d}.pth", written, progress) as file:
                torch.save(part, file)
                written = file.written
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(shards: list[Tensors], out_dir: Path, model_parallel_size: int) -> None:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    memory = parallel.device_memory(torch.device("cpu"))
    if memory is not None and total // model_parallel_size > memory:
        raise MemoryError(
            f"a file of {total / model_parallel_size / 1e9:.1f} GB is put together in memory, and "
            f"there are {memory / 1e9:.1f} GB: take a larger model_parallel_size"
        )
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        raise OSError(f"{total / 1e9:.1f} GB don't fit the {free / 1e9:.1f} GB free in {existing}")


class _Reporting(io.FileIO):
    """A file that tells how many bytes have been written to it, and to others before."""

    def __init__(self, path: Path, written: int, progress: Callable[[int], None]):
        super().__init__(path, "w")
        self.written = written
        self._progress = progress

    def write(self, data: Any) -> int:
        view, done = memoryview(data), 0
        while done < view.nbytes:  # one call may write a part only
            done += super().write(view[done : done + (1 << 26)])
            self._progress(self.written + done)
        self.written += done
        return done


def _progress_bar(total: int) -> Callable[[int], None]:
    """A function that shows how much of ``total`` bytes is done."""
    shown = -1

    def show(done: int) -> None:
        nonlocal shown
        percent = min(100, 100 * done // total)
        if percent > shown:
            shown = percent
            bar = "#" * (30 * percent // 100)
            print(f"\r[{bar:<30}] {percent} % of {total / 1e9:.2f} GB", end="", file=sys.stderr)

    return show


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
    shards = open_shards(source, args)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    save(
        shards,
        args,
        target,
        model_parallel_size,
        tokenizer,
        progress=_progress_bar(total),
    )
    print(f"\nwrote {target}", file=sys.stderr)


if __name__ == "__main__":
    import fire

    from llama.inspection import inspect

    try:
        fire.Fire({"reshard": reshard} if sys.argv[1:2] == ["reshard"] else inspect)
    except (MemoryError, OSError, ValueError) as error:
        sys.exit(f"llama.checkpoint: {error}")
