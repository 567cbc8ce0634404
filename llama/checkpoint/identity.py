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
_LLAMA3_SIZES = {
    (2048, 16): "1B",
    (3072, 28): "3B",
    (4096, 32): "8B",
    (8192, 80): "70B",
    (16384, 126): "405B",
}
_LLAMA3_VOCABULARY = 128_000  # ids and more; fine-tuned models add a few
_MISTRAL_HIDDEN = 14336  # of Mistral 7B, whose other sizes are Llama's 7B; that has 11008
_PUBLISHED_NAME = re.compile(
    r"llama-2-\d+b(-chat)?|CodeLlama-\d+b(-Python|-Instruct)?|\d+b_(pre_trained|instruction_tuned)"
    r"|(Meta-)?Llama-?3(\.\d)?-\d+B(-Instruct)?(-MP\d+)?"
)


def identify(directory: Path, args: ModelArgs, tokenizer: BaseTokenizer | None) -> str:
    """Return the model's family and size, as far as they are known; "unknown" otherwise.

    Judges by the folder's name, the shape and the tokenizer.
    """
    is_llama3 = args.vocab_size >= _LLAMA3_VOCABULARY
    sizes = _LLAMA3_SIZES if is_llama3 else _SIZES
    size = sizes.get((args.dim, args.n_layers), "unknown size")
    name = directory.resolve().name
    if _PUBLISHED_NAME.fullmatch(name):
        return f"{name} by its folder's name ({size} by its shape)"
    if size == "unknown size":
        return "unknown"
    if is_llama3:
        return f"{_llama3_version(args, size)} {size}"
    if size == "7B" and args.hidden_dim == _MISTRAL_HIDDEN:
        return "Mistral 7B"
    if args.rope_theta == 1e6 or (tokenizer and tokenizer.prefix_id is not None):
        return f"Code Llama {size.removeprefix('65B or ')}"
    if size == "65B or 70B":
        return "LLaMA 65B" if args.kv_heads == args.n_heads else "Llama 2 70B"
    return f"LLaMA {size}" if size == "33B" else f"LLaMA or Llama 2 {size}"


def _llama3_version(args: ModelArgs, size: str) -> str:
    if args.rope_scaling is None:
        return "Llama 3"
    if size in ("1B", "3B"):
        return "Llama 3.2"
    return "Llama 3.1 or 3.3" if size == "70B" else "Llama 3.1"
