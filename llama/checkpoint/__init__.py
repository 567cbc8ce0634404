"""Checkpoints of every format: files to weights, and back.

A format's module is imported when it is needed, so that none slows down the start.
"""

import re
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
    if path.is_file():
        return _open_file(path)
    is_meta = any(path.glob("consolidated.*.pth"))
    if path.is_dir() and (not is_meta or Folder(path).is_hf_beside_meta):
        gguf_files = sorted(path.glob("*.gguf"))
        # Beside GGUF files alone config.json is what the model's page says of it.
        is_hf = any([*path.glob("model*.safetensors*"), *path.glob("pytorch_model*")])
        if (path / "config.json").is_file() and (is_hf or not gguf_files):
            from llama.checkpoint.hf import open_hf

            return open_hf(path)
        models = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", file.name) for file in gguf_files}
        if len(models) == 1:  # in one file, or in parts
            return _open_gguf(gguf_files[0])
        if gguf_files:
            names = listed([file.name for file in gguf_files])
            raise ValueError(f"{path} has several GGUF files: give the path of one ({names})")
    find_shards(path)  # raises the FileNotFoundError that names the missing file
    return open_meta(path)


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return _open_gguf(path)
    if path.suffix == ".bin" and not magic.startswith(b"PK"):
        from llama.checkpoint.llama2c import open_llama2c

        return open_llama2c(path)
    if path.name in Folder(path.parent).whole_files:
        from llama.checkpoint.hf import open_hf

        return open_hf(path.parent, path)
    raise ValueError(
        f"{path} is neither a GGUF file nor one of llama2.c: give a directory, or such a file"
    )


def _open_gguf(path: Path) -> Checkpoint:
    from llama.checkpoint.gguf import open_gguf

    return open_gguf(path)


def apply_adapter(base: Checkpoint, directory: Path) -> Checkpoint:
    """Merge a LoRA adapter into a checkpoint (``llama.checkpoint.lora.apply_adapter``)."""
    from llama.checkpoint.lora import apply_adapter

    with clear_errors(explain_adapter, directory):
        return apply_adapter(base, directory)
