"""The family and size of a model, by its shape, its tokenizer and its folder's name."""

import re
from pathlib import Path

from llama.args import ModelArgs
from llama.tokenizer import BaseTokenizer

# (dim, n_layers) -> the size's name
_SIZES = {
    (4096, 32): "7B",
    (5120, 40): "13B",
    (6656, 60): "33B",
    (8192, 48): "34B",
    (8192, 80): "65B or 70B",
}
_PUBLISHED_NAME = re.compile(r"llama-2-\d+b(-chat)?|CodeLlama-\d+b(-Python|-Instruct)?")


def identify(directory: Path, args: ModelArgs, tokenizer: BaseTokenizer | None) -> str:
    """Return the model's family and size, as far as they are known; "unknown" otherwise.

    Judges by the folder's name, the shape and the tokenizer.
    """
    size = _SIZES.get((args.dim, args.n_layers), "unknown size")
    name = directory.resolve().name
    if _PUBLISHED_NAME.fullmatch(name):
        return f"{name} by its folder's name ({size} by its shape)"
    if size == "unknown size":
        return "unknown"
    if args.rope_theta == 1e6 or (tokenizer and tokenizer.prefix_id is not None):
        return f"Code Llama {size.removeprefix('65B or ')}"
    if size == "65B or 70B":
        return "LLaMA 65B" if args.kv_heads == args.n_heads else "Llama 2 70B"
    return f"LLaMA {size}" if size == "33B" else f"LLaMA or Llama 2 {size}"
