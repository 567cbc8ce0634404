"""The networks that benchmarks measure, and what a pass through one reads and calculates."""

from math import prod

import torch

from llama import ModelArgs
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.sharding import cache_bytes, parameter_count, weight_bytes
from llama.layers.quantization import Form

SHAPES = {
    "1M": ModelArgs(dim=128, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=1024),
    "18M": ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32000),
    "SmolLM2": ModelArgs(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49152, tie_word_embeddings=True
    ),
    "110M": ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000),
    "1.1B": ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000),
    "7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000),
    "13B": ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=32000),
    "70B": ModelArgs(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        vocab_size=32000,
        multiple_of=4096,
        ffn_dim_multiplier=1.3,
    ),
}


def read_bytes(
    args: ModelArgs, weights: str | Form = "bf16", ranks: int = 1, group_size: int | None = None
) -> int:
    """Return the bytes of weights that one rank reads in a step: all but the embedding.

    Args:
        weights: "bf16", "int8", "int4", or the form that all of a file's weights have.
        group_size: of int4, as for ``quantize=``.
    """
    forms: dict[str, Form] = {}
    if isinstance(weights, str) and weights != "bf16":
        forms = make_scheme(weights, group_size).forms(args)
    elif not isinstance(weights, str):
        forms = dict.fromkeys(make_scheme("int4").forms(args), weights)
    whole = weight_bytes(args, torch.bfloat16, ranks, forms)
    n_embedding = args.vocab_size * args.dim // ranks
    if "tok_embeddings" in forms:
        form = forms["tok_embeddings"]
        parts = form.shapes(args.vocab_size, args.dim // ranks)
        sizes = form.dtypes()
        return whole - sum(sizes[name].itemsize * prod(shape) for name, shape in parts.items())
    return whole - 2 * n_embedding


def position_bytes(args: ModelArgs, ranks: int = 1) -> int:
    """Return the bytes that one rank's cache in bfloat16 has for a position of one sequence."""
    positions = args.max_batch_size * args.max_seq_len
    return cache_bytes(args, torch.bfloat16, ranks) // positions


def prompt_flops(args: ModelArgs, length: int) -> float:
    """Return the floating-point operations of a prompt, with the last token's logits only.

    A product takes two for each weight and token. Attention takes four for each element of a query
    and each position that it attends to: a multiplication and an addition with the key and with
    the value.
    """
    tables = 2 * args.vocab_size * args.dim
    products = 2 * (parameter_count(args) - tables) * length + 2 * args.vocab_size * args.dim
    attended = length * (length + 1) / 2
    return products + 4 * args.n_layers * args.n_heads * args.head_dim * attended
