"""Perplexity of each GGUF type: here and in llama.cpp, on the same file and the same text.

    python benchmarks/gguf_types.py                  # the embedded model, on unseen stories
    python benchmarks/gguf_types.py CKPT TEXT_FILE --types Q4_0,Q4_K_M --n_tokens 4096

llama.cpp quantises the checkpoint's weights to each type. Types with blocks of 256 need widths that
divide by 256: zeros fill others up, which changes nothing but the sizes. Bits are averages over all
weights, of the file and of the network in memory.
"""

import contextlib
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import weights
from quality import of_llama_cpp, stories

from llama import Llama, ModelArgs, cli
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import vocabulary_size, widened
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import full_shapes, parameter_count, weight_bytes
from llama.convert import convert
from llama.generation import TINY
from llama.perplexity import perplexity

BLOCK = 256
TYPES = "Q8_0,Q6_K,Q5_K_M,Q5_1,Q5_0,Q4_K_M,Q4_K_S,Q4_1,Q4_0,IQ4_NL,IQ4_XS,Q3_K_M,Q2_K"


def padded(
    args: ModelArgs, tensors: dict[str, torch.Tensor]
) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    """Return a network of the same function whose widths are whole blocks.

    A norm divides by the mean over more numbers, for which its weight and epsilon make up.
    """
    dim, hidden_dim = (-(-size // BLOCK) * BLOCK for size in (args.dim, args.hidden_dim))
    group = args.n_heads // args.kv_heads
    kv_heads = args.kv_heads
    while kv_heads * group * args.head_dim % BLOCK:
        kv_heads += 1
    wide = replace(
        args,
        dim=dim,
        hidden_dim=hidden_dim,
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        norm_eps=args.norm_eps * args.dim / dim,
    )
    filled = {}
    for name, shape in full_shapes(wide).items():
        tensor = tensors[name] * math.sqrt(args.dim / dim) ** name.endswith("norm.weight")
        missing = [new - old for new, old in zip(shape, tensor.shape, strict=True)]
        filled[name] = F.pad(tensor, [n for size in missing[::-1] for n in (0, size)])
    return wide, filled


def main(
    ckpt: str = str(TINY),
    text_file: str | None = None,
    types: str = TYPES,
    dtypes: str = "float32,bfloat16",
    n_tokens: int = 10_240,
    context: int = 512,
    stride: int = 256,
) -> None:
    """Print a table of perplexities.

    Args:
        ckpt: a checkpoint of any format.
        text_file: UTF-8; stories like the embedded model's by default.
        types: of those that ``llama_model_quantize`` makes without an importance matrix.
        dtypes: of the network here.
        n_tokens: tokens of the text, at most.
        context, stride: as for ``llama.perplexity``.
    """
    text = stories() if text_file is None else Path(text_file).read_text(encoding="utf-8")
    columns = ["type", "bits, file", "bits, memory", "llama.cpp", *dtypes.split(",")]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
        whole = Path(directory) / "whole"
        convert(ckpt, str(whole), dtype="bfloat16")
        source = open_checkpoint(whole)
        own = make_args(source.params, source.source, vocabulary_size(source))
        plain = widened(source, own).parts[0]
        args, tensors = padded(own, {name: plain[name] for name in plain})
        args.max_seq_len = context
        tokenizer = next(path for path in sorted(whole.glob("tokenizer.*")))
        for kind in types.split(","):
            path = Path(directory) / f"{kind}.gguf"
            weights.write_quantized_gguf(kind)(args, tensors, path)
            tokens: list[int] = []
            values, bits = [], 0.0
            for dtype in map(cli.dtype_of, dtypes.split(",")):
                assert dtype is not None
                llama = Llama.build(path, tokenizer, context, 4, device="cpu", dtype=dtype)
                if not tokens:
                    tokens = llama.tokenizer.encode(text, bos=False, eos=False)[:n_tokens]
                found = llama.model.params
                bits = 8 * weight_bytes(found, dtype, 1, llama.model.forms) / parameter_count(found)
                values.append(perplexity(llama, tokens, context, stride).value)
                del llama
            theirs = of_llama_cpp(path, tokens, context, stride).value
            changes = [100 * math.log(value / theirs) for value in values]
            file_bits = 8 * path.stat().st_size / parameter_count(args)
            with contextlib.redirect_stdout(sys.__stdout__):
                row = f"| {kind} | {file_bits:.2f} | {bits:.2f} | {theirs:.4f} |"
                print(row, *(f"{change:+.3f} % |" for change in changes), flush=True)
            path.unlink()


if __name__ == "__main__":
    cli.run(main)
