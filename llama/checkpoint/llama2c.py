"""llama2.c's files: ``model.bin`` in its first, float32 version and ``tokenizer.bin``.

Source: https://github.com/karpathy/llama2.c (export.py and tokenizer.py)
"""

import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.base import Checkpoint, Shape, Weights, text_files
from llama.errors import need, printable

_HEADER = struct.Struct("<7i")
# The first bytes of later versions: the little-endian number whose characters are "ak42".
_LATER_MAGIC = b"24ka"
# The first pieces of tokenizer.bin, which has line ends around the second and the third.
_FIRST_PIECES = ["<unk>", "<s>", "</s>"]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def open_llama2c(path: Path) -> Checkpoint:
    """Map a ``model.bin``; a ``tokenizer.model`` or ``tokenizer.bin`` next to it is its tokenizer.

    Raises:
        FileNotFoundError: ``path`` doesn't exist.
        ImportError: ``tokenizer.bin`` needs the package ``protobuf``.
        ValueError: the file isn't one of llama2.c's first version, or incomplete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the path of a .bin file of llama2.c")
    params, shapes = _read_header(path)
    expected = _HEADER.size + 4 * sum(map(prod, shapes.values()))
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes where its header makes it {expected}: it is "
            "incomplete or no file of llama2.c"
        )
    weights = Weights.of(_map_tensors(path, shapes), mapped=True)
    files: dict[str, Path | bytes] = dict(text_files(path.parent))
    if "tokenizer.model" not in files and (path.parent / "tokenizer.bin").is_file():
        files["tokenizer.model"] = read_tokenizer(path.parent / "tokenizer.bin")
    return Checkpoint(str(path), params, [weights], [str(path)], torch.float32, files)


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Return the hyper-parameters and the shapes of the tensors that follow, in their order."""
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if head.startswith(_LATER_MAGIC):
        version = int.from_bytes(head[4:8], "little")
        raise ValueError(
            f"{path} is of llama2.c's version {version}: only the first, float32 one is read here, "
            "which its export.py writes with --version 0"
        )
    if len(head) < _HEADER.size:
        raise ValueError(f"{path} has {len(head)} bytes, less than llama2.c's header: it is cut")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = _HEADER.unpack(head)
    numbers = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), seq_len)
    if min(numbers) < 1 or dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
        raise ValueError(
            f"{path} is no file of llama2.c: dim {dim}, hidden_dim {hidden_dim}, n_layers "
            f"{n_layers}, n_heads {n_heads}, n_kv_heads {n_kv_heads}, vocab_size {vocab_size}, "
            f"seq_len {seq_len}, as its header reads, make no model"
        )
    is_tied = vocab_size > 0  # the sign says it
    params = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": abs(vocab_size),
        "hidden_dim": hidden_dim,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": is_tied,
    }
    shapes = _shapes(dim, hidden_dim, n_layers, dim // n_heads * n_kv_heads, abs(vocab_size))
    shapes["rope"] = (seq_len, dim // n_heads)  # cosines and sines, which follow from the others
    if not is_tied:
        shapes["output.weight"] = (abs(vocab_size), dim)
    return params, shapes


def _shapes(
    dim: int, hidden_dim: int, n_layers: int, kv_dim: int, vocab_size: int
) -> dict[str, Shape]:
    """Return the shapes in the file's order: a weight's tensors of all layers lie together."""
    return {
        "tok_embeddings.weight": (vocab_size, dim),
        "attention_norm.weight": (n_layers, dim),
        "attention.wq.weight": (n_layers, dim, dim),
        "attention.wk.weight": (n_layers, kv_dim, dim),
        "attention.wv.weight": (n_layers, kv_dim, dim),
        "attention.wo.weight": (n_layers, dim, dim),
        "ffn_norm.weight": (n_layers, dim),
        "feed_forward.w1.weight": (n_layers, hidden_dim, dim),
        "feed_forward.w2.weight": (n_layers, dim, hidden_dim),
        "feed_forward.w3.weight": (n_layers, hidden_dim, dim),
        "norm.weight": (dim,),
    }


def _map_tensors(path: Path, shapes: dict[str, Shape]) -> dict[str, torch.Tensor]:
    """Map the tensors behind the header under Meta's names."""
    size = path.stat().st_size // 4
    numbers = torch.from_file(str(path), shared=False, size=size, dtype=torch.float32)
    pieces = numbers[_HEADER.size // 4 :].split([prod(shape) for shape in shapes.values()])
    tensors = {}
    for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
        if name in ("tok_embeddings.weight", "norm.weight", "output.weight"):
            tensors[name] = piece.view(shape)
        elif name != "rope":
            layers = piece.view(shape).unbind()
            tensors |= {f"layers.{i}.{name}": tensor for i, tensor in enumerate(layers)}
    return tensors


def read_tokenizer(path: Path) -> bytes:
    """Convert a ``tokenizer.bin`` back to the SentencePiece model that it was made from.

    Raises:
        ImportError: the package ``protobuf`` is missing.
        ValueError: the file is damaged or no tokenizer.
    """
    pieces = _read_pieces(path)
    proto = need("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    types = proto.ModelProto.SentencePiece
    special = {0: types.UNKNOWN, 1: types.CONTROL, 2: types.CONTROL}
    for i, (piece, score) in enumerate(pieces):
        piece_type = special.get(i, types.BYTE if _BYTE.fullmatch(piece) else types.NORMAL)
        piece = _FIRST_PIECES[i] if i in special else piece
        model.pieces.add(piece=piece, score=score, type=piece_type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = proto.TrainerSpec.BPE, len(pieces)
    trainer.byte_fallback = sum(piece.type == types.BYTE for piece in model.pieces) == 256
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    return bytes(model.SerializeToString())


def _read_pieces(path: Path) -> list[tuple[str, float]]:
    """Return the pieces of a ``tokenizer.bin`` with their scores."""
    data = path.read_bytes()
    pieces, offset = [], 4  # the first number is the longest piece's length
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fI", data, offset)
            text = data[offset + 8 : offset + 8 + length].decode()
            offset += 8 + length
            pieces.append((text.replace(" ", "▁"), score))
    except (struct.error, UnicodeDecodeError):
        offset = -1
    if offset != len(data) or [piece.strip("\n") for piece, _ in pieces[:3]] != _FIRST_PIECES:
        found = printable(", ".join(piece for piece, _ in pieces[:3]))
        raise ValueError(
            f"{path} is damaged or no tokenizer of llama2.c: expected scored pieces to its end, "
            f"the first of them {', '.join(_FIRST_PIECES)}; found {found or 'none'}"
        )
    return pieces
