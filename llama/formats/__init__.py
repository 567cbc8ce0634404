"""Checkpoints of every format, told apart by what lies there.

A format's module is imported when it is needed, so that none slows down the start.
"""

import re
from pathlib import Path

from llama.files import find_shards, open_meta
from llama.weights import Checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Map a checkpoint: Meta's or Hugging Face's directory, a GGUF file or llama2.c's.

    Raises:
        FileNotFoundError: there is nothing, or a part of it is missing.
        ImportError: the format needs a package that isn't installed.
        ValueError: it is of no known format, damaged, or no Llama.
    """
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return _open_gguf(path)
        if path.suffix == ".bin" and not magic.startswith(b"PK"):
            from llama.formats.llama2c import open_llama2c

            return open_llama2c(path)
        raise ValueError(
            f"{path} is neither a GGUF file nor one of llama2.c: give a directory, or such a file"
        )
    if path.is_dir() and not any(path.glob("consolidated.*.pth")):
        if (path / "config.json").is_file():
            from llama.formats.hf import open_hf

            return open_hf(path)
        found = sorted(path.glob("*.gguf"))
        models = {re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", file.name) for file in found}
        if len(models) == 1:  # in one file, or in parts
            return _open_gguf(found[0])
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise ValueError(f"{path} has several GGUF files: give the path of one ({names})")
    find_shards(path)  # says what is missing
    return open_meta(path)


def _open_gguf(path: Path) -> Checkpoint:
    from llama.formats.gguf import open_gguf

    return open_gguf(path)


def apply_adapter(base: Checkpoint, directory: Path) -> Checkpoint:
    """A checkpoint with a LoRA adapter merged in, see ``llama.formats.lora``."""
    from llama.formats.lora import apply_adapter

    return apply_adapter(base, directory)
