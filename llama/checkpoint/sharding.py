"""The division of parameters among files and ranks: pure functions of shapes and tensors."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeVar

import torch

from llama.args import ModelArgs
from llama.layers.quantization import Form

T = TypeVar("T")

Forms = Mapping[str, Form]
"""The forms of quantised weights by their modules' names; the other modules' are plain."""

_PLAIN: Forms = {}

# The dimension along which shards and ranks divide a parameter; others are not divided.
# Source: ``ColumnParallelLinear`` and ``RowParallelLinear`` in Meta's llama/model.py.
_SPLIT_DIM = {
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}


def input_widths(args: ModelArgs) -> set[int]:
    """Return the input dimensions of the network's linear layers."""
    return {args.dim, args.n_heads * args.head_dim, args.hidden_dim}


def check_model_parallel_size(args: ModelArgs, ranks: int, forms: Forms = _PLAIN) -> None:
    """Raise ``ValueError``, listing the possible numbers, if ranks can't divide the network."""
    blocks = _divided_blocks(args, forms)
    if type(ranks) is not int:
        raise ValueError(f"model_parallel_size is {ranks!r}: expected a whole number")

    def fits(n: int) -> bool:
        if n < 1:
            return False
        kv_heads = args.kv_heads
        if any(width % (n * form.block_size(width)) for width, form in blocks):
            return False
        divides = args.n_heads % n == args.dim % n == args.hidden_dim % n == 0
        return divides and (kv_heads % n == 0 or n % kv_heads == 0)

    if not fits(ranks):
        sizes = ", ".join(str(n) for n in range(1, args.n_heads + 1) if fits(n)) or "none"
        found = ""
        if blocks:
            width, form = max(blocks, key=lambda block: block[1].block_size(block[0]))
            found = f", in {form.name} blocks of {form.block_size(width)}"
        raise ValueError(
            f"{ranks} parts can't be made of {args.n_heads} heads, {args.kv_heads} key/value "
            f"heads, dim {args.dim} and hidden size {args.hidden_dim}{found}: possible are {sizes}"
        )


def _divided_blocks(args: ModelArgs, forms: Forms) -> set[tuple[int, Form]]:
    """Return the widths that ranks divide among them, and the forms of their weights."""
    shapes = full_shapes(args)
    named = ((f"{module}.weight", form) for module, form in forms.items())
    return {(shapes[n][1], form) for n, form in named if n in shapes and split_dim(n) == 1}


def parameter_count(args: ModelArgs, ranks: int = 1) -> int:
    """Return the number of one rank's parameters, by arithmetic alone."""
    q_dim = args.n_heads * args.head_dim // ranks
    kv_dim = max(args.kv_heads, ranks) // ranks * args.head_dim
    attention = 2 * args.dim * q_dim + 2 * args.dim * kv_dim
    if args.attention_bias:  # each rank has the whole of what is added to a sum
        attention += q_dim + 2 * kv_dim + args.dim
    feed_forward = 3 * args.dim * args.hidden_dim // ranks
    if args.mlp_bias:
        feed_forward += 2 * args.hidden_dim // ranks + args.dim
    block = attention + feed_forward + 2 * args.dim
    vocabulary = args.vocab_size * (args.dim // ranks)
    if ranks > 1 or not args.tie_word_embeddings:  # ranks divide the two along different dims
        vocabulary += -(-args.n_outputs // ranks) * args.dim
    return args.n_layers * block + vocabulary + args.dim


def cache_bytes(args: ModelArgs, dtype: torch.dtype, ranks: int = 1, in_int8: bool = False) -> int:
    """Return the bytes of one rank's key/value cache."""
    positions = args.max_batch_size * args.max_seq_len
    heads = max(args.kv_heads, ranks) // ranks
    # In eight bits each head has a scale at each position.
    entry = args.head_dim + dtype.itemsize if in_int8 else args.head_dim * dtype.itemsize
    return 2 * args.n_layers * positions * heads * entry


def weight_bytes(args: ModelArgs, dtype: torch.dtype, ranks: int = 1, forms: Forms = _PLAIN) -> int:
    """Return the bytes of one rank's parameters in memory, approximately if quantised."""
    if not forms:
        return parameter_count(args, ranks) * dtype.itemsize
    in_dtype = {module: form.in_dtype(dtype) for module, form in forms.items()}
    sizes = _stored_sizes(args, dtype, in_dtype)
    size = sum(sizes.values())
    if args.tie_word_embeddings and ranks > 1:  # who divide the two along different dims
        size += sum(part for n, part in sizes.items() if n.startswith("tok_embeddings."))
    return size // ranks


def stored_bytes(args: ModelArgs, dtype: torch.dtype, forms: Forms = _PLAIN) -> int:
    """Return the bytes of a checkpoint's stored weights, by arithmetic alone."""
    return sum(_stored_sizes(args, dtype, forms).values())


def _stored_sizes(args: ModelArgs, dtype: torch.dtype, forms: Forms) -> dict[str, int]:
    """Return the bytes of each stored tensor by its name."""
    sizes = {}
    for name, shape in full_shapes(args, forms).items():
        form = form_of(forms, name)
        stored = dtype if form is None else form.dtypes()[name.rpartition(".")[2]]
        sizes[name] = prod(shape) * stored.itemsize
    return sizes


def quantized_count(args: ModelArgs, forms: Forms) -> int:
    """Return the number of a checkpoint's weights that have forms."""
    return sum(prod(shape) for name, shape in full_shapes(args).items() if form_of(forms, name))


def form_of(forms: Forms, name: str) -> Form | None:
    """Return the form of a parameter's module, given the parameter's name; None if it is plain."""
    module, _, part = name.rpartition(".")
    return None if part == "bias" else forms.get(module)


def full_shapes(args: ModelArgs, forms: Forms = _PLAIN) -> dict[str, tuple[int, ...]]:
    """Return the parameters' shapes before they are divided among shards or ranks.

    An output that is the embedding (``tie_word_embeddings``) isn't among them. A weight that has a
    form has one entry for each of its stored tensors.
    """
    q_dim = args.n_heads * args.head_dim
    kv_dim = args.kv_heads * args.head_dim
    biased = {"attention": args.attention_bias, "feed_forward": args.mlp_bias}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        block = {
            "attention.wq": (q_dim, args.dim),
            "attention.wk": (kv_dim, args.dim),
            "attention.wv": (kv_dim, args.dim),
            "attention.wo": (args.dim, q_dim),
            "feed_forward.w1": (args.hidden_dim, args.dim),
            "feed_forward.w2": (args.dim, args.hidden_dim),
            "feed_forward.w3": (args.hidden_dim, args.dim),
            "attention_norm": (args.dim,),
            "ffn_norm": (args.dim,),
        }
        for name, shape in block.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            if biased.get(name.partition(".")[0]):
                shapes[f"layers.{i}.{name}.bias"] = shape[:1]
    shapes["norm.weight"] = (args.dim,)
    if args.n_outputs and not args.tie_word_embeddings:
        shapes["output.weight"] = (args.n_outputs, args.dim)
    stored: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        form = form_of(forms, name)
        if form is None:
            stored[name] = shape
        else:
            module = name.removesuffix(".weight")
            parts = form.shapes(shape[0], shape[1])
            stored |= {f"{module}.{part}": size for part, size in parts.items()}
    return stored


def split_dim(name: str) -> int | None:
    """Return the dimension along which a parameter is divided; None if each rank has all of it."""
    module, part = name.split(".")[-2:]
    dim = _SPLIT_DIM.get(module)
    # One scale belongs to a whole row, one bias to a whole sum, and an order to all inputs.
    return None if part == "order" or (part in ("scale", "zero", "bias") and dim == 1) else dim


def stored_dim(name: str, shapes: Sequence[tuple[int, ...]], width: object) -> int | None:
    """Return the dimension along which a checkpoint's files divide a parameter.

    It is the one along which ranks do, except for an embedding whose files hold rows of the whole
    ``width``, the network's ``dim``: Llama 3's.

    Source: ``VocabParallelEmbedding`` in https://github.com/meta-llama/llama-models
    (models/llama3/model.py)
    """
    by_rows = name == "tok_embeddings.weight" and len(shapes) > 1
    if by_rows and all(len(shape) == 2 and shape[1] == width for shape in shapes):
        return 0
    return split_dim(name)


def joined_shape(
    name: str, shapes: Sequence[tuple[int, ...]], args: ModelArgs
) -> tuple[int, ...] | None:
    """Return the shape of concatenated pieces; None if they don't fit together."""
    dim = stored_dim(name, shapes, args.dim)
    if dim is None:
        return shapes[0] if len(set(shapes)) == 1 else None
    rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(rests) > 1 or any(len(shape) <= dim for shape in shapes):
        return None
    first = shapes[0]
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


def distinct_pieces(name: str, pieces: Sequence[T], args: ModelArgs) -> Sequence[T]:
    """Return pieces without the copies of key/value heads that more shards than heads have."""
    if name.split(".")[-2] in ("wk", "wv") and len(pieces) > args.kv_heads:
        return pieces[:: len(pieces) // args.kv_heads]
    return pieces


def rank_part(
    name: str, pieces: Sequence[torch.Tensor], args: ModelArgs, rank: int, ranks: int
) -> torch.Tensor:
    """Return the part of a parameter that one of ``ranks`` ranks holds.

    Args:
        name: the parameter's name.
        pieces: the parameter as the shards hold it, one piece a shard.
        args: the hyper-parameters.
        rank: the rank's number, from 0.
        ranks: the number of ranks.

    Returns:
        A view of a piece if the part lies within one, a new tensor otherwise.
    """
    dim = split_dim(name)
    if dim is None:
        return pieces[0]
    pieces = distinct_pieces(name, pieces, args)
    if stored_dim(name, [tuple(piece.shape) for piece in pieces], args.dim) != dim:
        return torch.cat([rank_part(name, [piece], args, rank, ranks) for piece in pieces])
    total = sum(piece.shape[dim] for piece in pieces)
    if name.split(".")[-2] in ("wk", "wv") and ranks > args.kv_heads:
        length, begin = args.head_dim, rank * args.kv_heads // ranks * args.head_dim
    else:
        length = -(-total // ranks)  # rounded up: a vocabulary may not divide
        begin = rank * length
    end = min(begin + length, total)
    overlaps, first = [], 0
    for piece in pieces:
        low, high = max(begin - first, 0), min(end - first, piece.shape[dim])
        if low < high:
            overlaps.append(piece.narrow(dim, low, high - low))
        first += piece.shape[dim]
    if end - begin < length:  # rows of the padded vocabulary, whose logits are cut
        overlaps.append(pieces[0].new_zeros(length - max(end - begin, 0), *pieces[0].shape[1:]))
    return overlaps[0] if len(overlaps) == 1 else torch.cat(overlaps, dim)
