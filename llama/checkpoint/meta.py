"""Meta's layout: ``consolidated.*.pth``, ``params.json`` and ``tokenizer.model``."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.base import Checkpoint, Weights, text_files
from llama.checkpoint.params import read_params, scheme_of
from llama.checkpoint.sharding import applied_scheme
from llama.checkpoint.tensor_files import check_plain, main_dtype, open_shard, unwrapped
from llama.layers.quantization import Int4, Scheme


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
        ValueError: a file is no checkpoint.
    """
    paths = find_shards(ckpt_dir)
    source = str(ckpt_dir / "params.json")
    params = read_params(ckpt_dir / "params.json")
    scheme = scheme_of(params, source)
    shards = [_open_unwrapped(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        check_plain(shard, str(path), scheme)
    _check_shard_count(ckpt_dir, len(paths), shards[0], params, scheme)
    plain = {name: t for name, t in shards[0].items() if not applied_scheme(scheme, name)}
    dtype = main_dtype(plain, str(paths[0]))
    names = [str(path) for path in paths]
    parts = [Weights.of(shard, mapped=True) for shard in shards]
    files: dict[str, Path | bytes] = dict(text_files(ckpt_dir))
    if "tokenizer.model" not in files and "tokenizer.json" not in files:
        with contextlib.suppress(FileNotFoundError):
            files["tokenizer.model"] = find_tokenizer(ckpt_dir)
    return Checkpoint(source, params, parts, names, dtype, files, scheme=scheme)


def _open_unwrapped(path: Path) -> dict[str, torch.Tensor]:
    """Map a file that may have been saved from ``torch.compile`` or a trainer's wrapper."""
    shard = open_shard(path)
    tensors = {unwrapped(name): tensor for name, tensor in shard.items()}
    if len(tensors) < len(shard):
        raise ValueError(f"{path} holds some tensors twice, under two names: save one of each")
    return tensors


def _check_shard_count(
    ckpt_dir: Path,
    n_shards: int,
    first: Mapping[str, torch.Tensor],
    params: Mapping[str, Any],
    scheme: Scheme | None,
) -> None:
    """Raise ``FileNotFoundError`` if the first shard's width shows that the last ones are missing.

    No error if the shapes make no sense: ``Checkpoint.check`` names them later.
    """
    embedding, dim = first.get("tok_embeddings.weight"), params.get("dim")
    if embedding is None or embedding.dim() != 2 or not embedding.shape[1]:
        return
    if not isinstance(dim, int):
        return
    if isinstance(scheme, Int4):
        dim //= 2  # a byte holds two codes
    total = dim // embedding.shape[1]
    if n_shards < total <= 64 and total * embedding.shape[1] == dim:
        raise FileNotFoundError(
            f"{ckpt_dir} has {n_shards} of {total} weight files: "
            f"consolidated.{n_shards:02d}.pth is missing"
        )
