"""Checkpoints in Meta's layout, written in any number of files."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.checkpoint.base import Checkpoint, Weights, vocabulary_size
from llama.checkpoint.forms import forms_params
from llama.checkpoint.memory import device_memory
from llama.checkpoint.meta import open_meta, scaled_rope
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import (
    Forms,
    check_model_parallel_size,
    form_of,
    full_shapes,
    stored_bytes,
)
from llama.cli import progress


def save(
    shards: Sequence[Mapping[str, torch.Tensor]],
    args: ModelArgs,
    out_dir: Path,
    model_parallel_size: int = 1,
    files: Mapping[str, Path | bytes] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda _: None,
    forms: Forms | None = None,
) -> None:
    """Write a checkpoint in Meta's layout, with bitwise the same weights in any number of files.

    A model of one process is saved by ``save([model.state_dict()], model.params, out_dir)``.
    The directory appears when all of it is written.

    Args:
        shards: the weights in one or more parts, as a checkpoint's files hold them.
        args: the network's hyper-parameters.
        out_dir: the directory to write; must not exist.
        model_parallel_size: the number of files to write.
        files: other files to write, such as a ``tokenizer.model``: by name, a path or the content.
        dtype: the dtype to store; None for the shards'. Quantised weights stay as they are.
        progress: called with the number of bytes that have been written.
        forms: the forms of the shards' quantised weights by module.

    Raises:
        FileExistsError: ``out_dir`` already exists.
        MemoryError: one file's weights, which are put together in memory, don't fit it.
        OSError: the disk is full.
        ValueError: the shards don't make the network, or it can't be divided into as many parts.
    """
    forms = forms or {}
    checkpoint = _checkpoint_of(shards, args, dtype, forms)
    checkpoint.check(args)
    check_model_parallel_size(args, model_parallel_size, forms)
    total = stored_bytes(args, checkpoint.dtype, forms)
    memory = device_memory(torch.device("cpu"))
    if memory is not None and total // model_parallel_size > memory:
        raise MemoryError(
            f"a file of {total / model_parallel_size / 1e9:.1f} GB is put together in memory, and "
            f"there are {memory / 1e9:.1f} GB: give a larger model_parallel_size"
        )
    with new_directory(out_dir, total) as partial:
        params = _params(args)
        if forms:
            modules = [name.removesuffix(".weight") for name in full_shapes(args)]
            params["quantization"] = forms_params(forms, modules)
        write_json(partial / "params.json", params)
        write_files(partial, files or {})
        written = 0
        for rank in range(model_parallel_size):
            shard = _shard(checkpoint, args, rank, model_parallel_size, dtype)
            path = partial / f"consolidated.{rank:02d}.pth"
            with _ProgressFile(path, written, progress) as file:
                torch.save(shard, file)
                written = file.written


def _checkpoint_of(
    shards: Sequence[Mapping[str, torch.Tensor]],
    args: ModelArgs,
    dtype: torch.dtype | None,
    forms: Forms,
) -> Checkpoint:
    """Return shards as a checkpoint of the dtype that it is to be stored in."""
    parts = [shard if isinstance(shard, Weights) else Weights.of(shard) for shard in shards]
    if args.tie_word_embeddings:  # a state dictionary has the output, a checkpoint doesn't
        for part in parts:
            for name in [name for name in part.shapes if name.startswith("output.")]:
                part.shapes.pop(name)
    names = [f"part {number}" for number in range(len(parts))]
    plain = "norm.weight" if forms else "tok_embeddings.weight"
    own = parts[0][plain].dtype if plain in parts[0] else None
    stored = dtype or own or torch.float32
    return Checkpoint("ModelArgs", {}, parts, names, stored, forms=forms)


def _shard(
    checkpoint: Checkpoint, args: ModelArgs, rank: int, ranks: int, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the tensors of one file."""
    tensors = {}
    for name in checkpoint.parts[0]:
        tensor = checkpoint.rank_part(name, args, rank, ranks)
        if name.startswith("output."):  # ranks need padding, files don't
            n_rows = args.n_outputs - rank * tensor.shape[0]
            tensor = tensor[: max(n_rows, 0)]
        is_quantized = form_of(checkpoint.forms, name)
        tensor = tensor.detach().to("cpu", None if is_quantized else dtype).contiguous()
        # torch.save writes the whole storage of a view.
        owns_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor if owns_storage else tensor.clone()
    return tensors


def _params(args: ModelArgs) -> dict[str, Any]:
    """Return ``params.json``: of the keys that Meta's code doesn't have, only those needed."""
    always = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
    defaults = dataclasses.asdict(ModelArgs())
    derived = ModelArgs(
        dim=args.dim,
        n_heads=args.n_heads,
        multiple_of=args.multiple_of,
        ffn_dim_multiplier=args.ffn_dim_multiplier,
    )
    defaults |= {"head_dim": derived.head_dim, "hidden_dim": derived.hidden_dim}
    params = {
        key: value
        for key, value in dataclasses.asdict(args).items()
        if key not in ("max_seq_len", "max_batch_size")
        and (key in always or value != defaults[key])
    }
    if params.get("rope_scaling") == scaled_rope(args.dim, args.n_layers):
        params = {key: value for key, value in params.items() if key != "rope_scaling"}
        params["use_scaled_rope"] = True  # Meta's code would ignore the other
    return params


@contextlib.contextmanager
def new_directory(out_dir: Path, size: int) -> Iterator[Path]:
    """Yield a directory to fill with ``size`` bytes; it gets its name when it is complete.

    Raises:
        FileExistsError: ``out_dir`` already exists.
        OSError: the disk has less free space.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} already exists: give another name or remove it")
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
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_files(directory: Path, files: Mapping[str, Path | bytes]) -> None:
    """Write files, given by path or by content, into a directory.

    ``config.json`` is left out: it describes weights in the layout that they were read from.
    """
    for name, source in files.items():
        if name == "config.json":
            continue
        data = source if isinstance(source, bytes) else source.read_bytes()
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)


class _ProgressFile(io.FileIO):
    """A file that reports the number of bytes written to it and to the files before it."""

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


def save_meta(
    source: Checkpoint,
    args: ModelArgs,
    out_dir: Path,
    model_parallel_size: int = 1,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write an opened checkpoint in Meta's layout; arguments and errors as for ``save``."""
    save(
        source.parts,
        args,
        out_dir,
        model_parallel_size,
        source.files,
        dtype,
        progress,
        source.forms,
    )


def reshard(in_dir: str, out_dir: str, model_parallel_size: int = 1) -> None:
    """Write a checkpoint again in another number of files.

    Args:
        in_dir: a checkpoint in Meta's layout.
        out_dir: the directory to write; must not exist.
        model_parallel_size: the number of consolidated.*.pth files to write.
    """
    source, target = open_meta(Path(str(in_dir))), Path(str(out_dir))
    args = make_args(source.params, source.source, n_words=vocabulary_size(source))
    with progress(stored_bytes(args, source.dtype, source.forms), "writing") as show:
        save_meta(source, args, target, model_parallel_size, progress=show)
    print(f"wrote {target}", file=sys.stderr)
