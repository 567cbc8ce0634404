"""The networks that benchmarks measure, and what a pass through one reads and calculates."""

from llama import ModelArgs
from llama.checkpoint.memory import Network
from llama.checkpoint.rounding import make_scheme
from llama.checkpoint.sharding import parameter_count
from llama.layers.quantization import Form
from llama.plan import costs
from llama.plan.networks import SIZES

SHAPES = {
    "1M": ModelArgs(dim=128, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=1024),
    "18M": ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32000),
    "SmolLM2": ModelArgs(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49152, tie_word_embeddings=True
    ),
    "110M": ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000),
    "1.1B": ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000),
    **{name: ModelArgs(**params) for name, params in SIZES.items()},
}


def network_of(
    args: ModelArgs, weights: str | Form = "bf16", group_size: int | None = None
) -> Network:
    """Return a network in bfloat16 as it is computed.

    Args:
        weights: "bf16", "int8", "int4", or the form that all of a file's weights have.
        group_size: of int4, as for ``quantize=``.
    """
    forms: dict[str, Form] = {}
    if isinstance(weights, str) and weights != "bf16":
        forms = make_scheme(weights, group_size).forms(args)
    elif not isinstance(weights, str):
        forms = dict.fromkeys(make_scheme("int4").forms(args), weights)
    return Network(args, forms=forms)


def read_bytes(args: ModelArgs, weights: str | Form = "bf16") -> int:
    """Return the bytes of weights that a step reads; ``weights`` as for ``network_of``."""
    return int(costs.read_bytes(network_of(args, weights)))


def position_bytes(args: ModelArgs) -> int:
    """Return the bytes that a cache in bfloat16 has for a position of one sequence."""
    return costs.position_bytes(Network(args))


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
