"""Checkpoints of every format: files to weights, and back.

A format's module is imported when it is needed, so that none slows down the start.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.folders import Folder
from llama.checkpoint.meta import find_shards, open_meta
from llama.checkpoint.recognition import clear_errors, explain_adapter, explain_path
from llama.errors import listed


def open_checkpoint(path: Path) -> Checkpoint:
    """Map a checkpoint: Meta's or Hugging Face's directory, or a file of weights.

    The file is GGUF's, llama2.c's, or one in a directory of Hugging Face that holds all weights.

    Raises:
        FileNotFoundError: the path or a part of the checkpoint is missing.
        ImportError: the format needs a package that isn't installed.
        ValueError: the format is unknown, a file is damaged, or the network is no Llama.
    """
    with clear_errors(explain_path, path):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    for name, open_format in FORMATS.items():
        checkpoint = open_format(path)
        if checkpoint is not None:
            return replace(checkpoint, format=name)
    if path.is_file():
        raise ValueError(
            f"{path} is neither a GGUF file nor one of llama2.c: give a directory, or such a file"
        )
    find_shards(path)  # raises the FileNotFoundError that names the missing file
    return open_meta(path)


def _meta(path: Path) -> Checkpoint | None:
    is_meta = any(path.glob("consolidated.*.pth")) and not Folder(path).is_hf_beside_meta
    return open_meta(path) if is_meta else None


def _gguf(path: Path) -> Checkpoint | None:
    files = [path] if _magic(path) == b"GGUF" else sorted(path.glob("*.gguf"))
    if not files or _is_hf(path):
        return None
    from llama.checkpoint.gguf import open_gguf

    models = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", file.name) for file in files}
    if len(models) > 1:
        names = listed([file.name for file in files])
        raise ValueError(f"{path} has several GGUF files: give the path of one ({names})")
    return open_gguf(files[0])  # alone, or the first of its parts


def _llama2c(path: Path) -> Checkpoint | None:
    if not path.is_file() or path.suffix != ".bin" or _magic(path).startswith(b"PK"):
        return None
    from llama.checkpoint.llama2c import open_llama2c

    return open_llama2c(path)


def _hf(path: Path) -> Checkpoint | None:
    is_whole_file = path.is_file() and path.name in Folder(path.parent).whole_files
    if not is_whole_file and not _is_hf(path):
        return None
    from llama.checkpoint.hf import open_hf

    return open_hf(path.parent, path) if is_whole_file else open_hf(path)


def _is_hf(path: Path) -> bool:
    # Beside GGUF files alone config.json is what the model's page says of it.
    has_weights = any([*path.glob("model*.safetensors*"), *path.glob("pytorch_model*")])
    return (path / "config.json").is_file() and (has_weights or not any(path.glob("*.gguf")))


def _magic(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(4)


FORMATS: dict[str, Callable[[Path], Checkpoint | None]] = {
    "meta": _meta,
    "gguf": _gguf,
    "llama2c": _llama2c,
    "hf": _hf,
}
"""Each returns None for a path of another format. The first that doesn't opens the checkpoint."""


def apply_adapter(base: Checkpoint, directory: Path) -> Checkpoint:
    """Merge a LoRA adapter into a checkpoint (``llama.checkpoint.lora.apply_adapter``)."""
    from llama.checkpoint.lora import apply_adapter

    with clear_errors(explain_adapter, directory):
        return apply_adapter(base, directory)
