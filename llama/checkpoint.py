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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.cli import progress, run
from llama.files import open_meta
from llama.memory import release
from llama.model import ModelArgs, Transformer
from llama.params import make_args
from llama.quantization import pack_all, swap
from llama.rounding import Int4, Scheme
from llama.sharding import cache_bytes, check_model_parallel_size, stored_bytes, weight_bytes
from llama.weights import Checkpoint, Weights

logger = logging.getLogger(__name__)


def load(
    checkpoint: Checkpoint,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype | None,
    cache_in_int8: bool = False,
) -> Transformer:
    """Build the network and fill this rank's part of it from any number of parts.

    Where the checkpoint is quantised, so is the network.

    Args:
        args: the checkpoint's hyper-parameters (``make_args``).
        device: where weights and cache shall be.
        dtype: what they shall be; None chooses by checkpoint and device (``choose_dtype``).
        cache_in_int8: whether the cache has eight bits instead.

    Raises:
        MemoryError: weights and cache are more than the machine has.
        ValueError: a tensor is missing, unexpected or of the wrong shape, or the network can't be
            divided among the ranks.
    """
    start = time.monotonic()
    rank, ranks = parallel.rank(), parallel.world_size()
    checkpoint.check(args)
    scheme = checkpoint.scheme
    check_model_parallel_size(args, ranks, scheme)
    if dtype is None:
        fast_bf16 = parallel.has_fast_bf16(device)
        dtype = parallel.choose_dtype(checkpoint.dtype, device.type, fast_bf16)
    check_memory(args, dtype, device, ranks, scheme, cache_in_int8)
    with torch.device("meta"):
        model = Transformer(args)
        if scheme:
            swap(model, scheme, dtype)
    tensors: dict[str, torch.Tensor] = {}
    stay_mapped = []
    for name in model.state_dict():
        module = name.rpartition(".")[0]
        if module == "output" and args.tie_word_embeddings and ranks == 1:
            tensors[name] = tensors[name.replace("output", "tok_embeddings")]
            continue
        part = checkpoint.rank_part(name, args, rank, ranks)
        kept = scheme and scheme.takes(module)
        part = part.to(device, part.dtype if kept else dtype).contiguous()
        mapped = checkpoint.mapped(name)
        # What needs no change stays mapped: it is read when it is used, and never copied.
        if any(_shares_memory(part, tensor) for tensor in mapped):
            stay_mapped.append(name)
        else:
            if part.untyped_storage().nbytes() > part.nbytes:
                part = part.clone()  # of what was made whole, only this rank's part stays
            release(mapped)
        tensors[name] = part
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    for name in stay_mapped:
        model.get_parameter(name).is_mapped = True  # type: ignore[attr-defined]
    if scheme:
        tensors.clear()
        pack_all(model)
    model.allocate_buffers(device, dtype, cache_in_int8)
    logger.info("loaded %s in %.2f seconds", checkpoint.names[0], time.monotonic() - start)
    return model


def check_memory(
    args: ModelArgs,
    dtype: torch.dtype,
    device: torch.device,
    ranks: int,
    scheme: Scheme | None = None,
    cache_in_int8: bool = False,
) -> None:
    """Raise ``MemoryError``, saying what to change, if weights and cache can't fit the device."""
    available = parallel.device_memory(device)
    here = parallel.local_ranks() if device.type == "cpu" else 1  # which share this memory
    weights = weight_bytes(args, dtype, ranks, scheme) * here
    cache = cache_bytes(args, dtype, ranks, cache_in_int8) * here
    if available is None or weights + cache <= available:
        return
    left = (available - weights) * args.max_seq_len * args.max_batch_size // cache
    if left >= 1:
        advice = (
            f"max_seq_len={args.max_seq_len} times max_batch_size={args.max_batch_size} can be at "
            f"most {left}"
        )
    elif scheme is None and weights * 2 // dtype.itemsize < available:
        advice = f"dtype={dtype} could be torch.bfloat16"
    elif scheme is None and weight_bytes(args, dtype, ranks, Int4()) * here < available:
        advice = "quantize could be 'int8' or 'int4'"
    else:
        advice = "the weights alone are too much: share them among more GPUs or more machines"
    raise MemoryError(
        f"weights of {weights / 1e9:.1f} GB and a cache of {cache / 1e9:.1f} GB don't fit the "
        f"{available / 1e9:.1f} GB of this machine's {device.type}: {advice}"
    )


def _shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def save(
    shards: Sequence[Mapping[str, torch.Tensor]],
    args: ModelArgs,
    out_dir: Path,
    model_parallel_size: int = 1,
    files: Mapping[str, Path | bytes] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda _: None,
    scheme: Scheme | None = None,
) -> None:
    """Write a checkpoint in Meta's layout, bit by bit the same weights in another number of files.

    A model of one process is saved by ``save([model.state_dict()], model.params, out_dir)``.
    The directory appears when all of it is written.

    Args:
        shards: the weights as they lie now, in one or more parts.
        model_parallel_size: how many files to write.
        files: what to put beside them, such as a ``tokenizer.model``: a path or the contents.
        dtype: what to store; None for what the shards hold. Quantised weights stay as they are.
        progress: called with the number of bytes that have been written.
        scheme: how the shards' weights are quantised.

    Raises:
        FileExistsError: ``out_dir`` is there already.
        MemoryError: one file's weights, which are put together in memory, are too much for it.
        OSError: the disk is full.
        ValueError: the shards don't make the network, or it can't be divided into as many parts.
    """
    parts = [shard if isinstance(shard, Weights) else Weights.of(shard) for shard in shards]
    if args.tie_word_embeddings:
        for part in parts:
            for name in [name for name in part.shapes if name.startswith("output.")]:
                part.shapes.pop(name)
    names = [f"part {number}" for number in range(len(parts))]
    known = "norm.weight" if scheme else "tok_embeddings.weight"
    first = parts[0][known].dtype if known in parts[0] else None
    stored = dtype or first or torch.float32
    checkpoint = Checkpoint("ModelArgs", {}, parts, names, stored, scheme=scheme)
    checkpoint.check(args)
    check_model_parallel_size(args, model_parallel_size, scheme)
    total = stored_bytes(args, stored, scheme)
    memory = parallel.device_memory(torch.device("cpu"))
    if memory is not None and total // model_parallel_size > memory:
        raise MemoryError(
            f"a file of {total / model_parallel_size / 1e9:.1f} GB is put together in memory, and "
            f"there are {memory / 1e9:.1f} GB: take a larger model_parallel_size"
        )
    with new_directory(out_dir, total) as partial:
        params = _params(args) | ({"quantization": scheme.params()} if scheme else {})
        write_json(partial / "params.json", params)
        write_files(partial, files or {})
        written = 0
        for number in range(model_parallel_size):
            tensors = {}
            for name in parts[0]:
                tensor = checkpoint.rank_part(name, args, number, model_parallel_size)
                if name.startswith("output."):  # padding is the ranks' affair, not the files'
                    rows = args.n_outputs - number * tensor.shape[0]
                    tensor = tensor[: max(rows, 0)]
                kept = scheme and scheme.takes(name.rpartition(".")[0])
                tensor = tensor.detach().to("cpu", None if kept else dtype).contiguous()
                # torch.save writes the whole of what a view is a part of.
                whole_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
                tensors[name] = tensor if whole_storage else tensor.clone()
            with _Reporting(partial / f"consolidated.{number:02d}.pth", written, progress) as file:
                torch.save(tensors, file)
                written = file.written


def _params(args: ModelArgs) -> dict[str, Any]:
    """What ``params.json`` says: Meta's own code doesn't know every key, so nothing needless."""
    always = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
    usual = dataclasses.asdict(ModelArgs())
    derived = ModelArgs(
        dim=args.dim,
        n_heads=args.n_heads,
        multiple_of=args.multiple_of,
        ffn_dim_multiplier=args.ffn_dim_multiplier,
    )
    usual |= {"head_dim": derived.head_dim, "hidden_dim": derived.hidden_dim}
    return {
        key: value
        for key, value in dataclasses.asdict(args).items()
        if key not in ("max_seq_len", "max_batch_size") and (key in always or value != usual[key])
    }


@contextlib.contextmanager
def new_directory(out_dir: Path, size: int) -> Iterator[Path]:
    """A directory to fill with ``size`` bytes, which gets its name once it is complete.

    Raises:
        FileExistsError: ``out_dir`` is there already.
        OSError: the disk hasn't that much room.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} is there already: give another name or remove it")
    existing = next(parent for parent in out_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise OSError(f"{size / 1e9:.1f} GB don't fit the {free / 1e9:.1f} GB free in {existing}")
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_files(directory: Path, files: Mapping[str, Path | bytes]) -> None:
    """Put files, given by path or by contents, into a directory."""
    for name, source in files.items():
        data = source if isinstance(source, bytes) else source.read_bytes()
        (directory / name).write_bytes(data)


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


def reshard(in_dir: str, out_dir: str, model_parallel_size: int = 1) -> None:
    """Write a checkpoint again in another number of files.

    Args:
        in_dir: a checkpoint in Meta's layout.
        out_dir: where to write it; must not exist.
        model_parallel_size: how many ``consolidated.*.pth`` files to write.
    """
    source, target = open_meta(Path(str(in_dir))), Path(str(out_dir))
    args = make_args(source.params, source.source, n_words=vocabulary_size(source))
    with progress(stored_bytes(args, source.dtype, source.scheme), "writing") as show:
        save(
            source.parts,
            args,
            target,
            model_parallel_size,
            source.files,
            progress=show,
            scheme=source.scheme,
        )
    print(f"wrote {target}", file=sys.stderr)


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """The number of rows of the embedding, -1 where it is missing."""
    shape = checkpoint.parts[0].shapes.get("tok_embeddings.weight", ())
    return shape[0] if shape else -1


if __name__ == "__main__":
    from llama.inspection import inspect

    if sys.argv[1:2] == ["reshard"]:
        run(reshard, "llama.checkpoint reshard", sys.argv[2:])
    else:
        run(inspect, "llama.checkpoint")
