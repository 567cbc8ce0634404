"""llama2.c's files: ``model.bin`` in its first, float32 version and ``tokenizer.bin``."""

import re
import struct
from math import prod
from pathlib import Path

import torch

from llama.errors import printable
from llama.files import text_files
from llama.formats.extras import need
from llama.weights import Checkpoint, Shape, Weights

_HEADER = struct.Struct("<7i")
# How its later versions begin, as the little-endian number of which "ak42" are the characters.
_LATER = b"24ka"
# What the pieces begin with, in tokenizer.bin with line ends around the second and the third.
_FIRST = ["<unk>", "<s>", "</s>"]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def open_llama2c(path: Path) -> Checkpoint:
    """Map a ``model.bin``; a ``tokenizer.model`` or ``tokenizer.bin`` beside it is its tokenizer.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: ``tokenizer.bin`` needs the package ``protobuf``.
        ValueError: the file isn't one of llama2.c's first version, or incomplete.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the path of a .bin file of llama2.c")
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if head.startswith(_LATER):
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
    shared = vocab_size > 0
    params = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": abs(vocab_size),
        "hidden_dim": hidden_dim,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shared,
    }
    kinds = _shapes(dim, hidden_dim, n_layers, dim // n_heads * n_kv_heads, abs(vocab_size))
    kinds["rope"] = (seq_len, dim // n_heads)  # cosines and sines, which are calculated anew
    if not shared:
        kinds["output.weight"] = (abs(vocab_size), dim)
    expected = _HEADER.size + 4 * sum(map(prod, kinds.values()))
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes where its header makes it {expected}: it is "
            "incomplete or no file of llama2.c"
        )
    tensors = _tensors(path, kinds)
    files: dict[str, Path | bytes] = dict(text_files(path.parent))
    if "tokenizer.model" not in files and (path.parent / "tokenizer.bin").is_file():
        files["tokenizer.model"] = read_tokenizer(path.parent / "tokenizer.bin")
    return Checkpoint(
        str(path), params, [Weights.of(tensors, mapped=True)], [str(path)], torch.float32, files
    )


def _shapes(
    dim: int, hidden_dim: int, n_layers: int, kv_dim: int, vocab_size: int
) -> dict[str, Shape]:
    """What lies behind the header, in this order: a layer's weights together with their like."""
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


def _tensors(path: Path, kinds: dict[str, Shape]) -> dict[str, torch.Tensor]:
    size = path.stat().st_size // 4
    numbers = torch.from_file(str(path), shared=False, size=size, dtype=torch.float32)
    pieces = numbers[_HEADER.size // 4 :].split([prod(shape) for shape in kinds.values()])
    tensors = {}
    for (name, shape), piece in zip(kinds.items(), pieces, strict=True):
        if name in ("tok_embeddings.weight", "norm.weight", "output.weight"):
            tensors[name] = piece.view(shape)
        elif name != "rope":
            layers = piece.view(shape).unbind()
            tensors |= {f"layers.{i}.{name}": tensor for i, tensor in enumerate(layers)}
    return tensors


def read_tokenizer(path: Path) -> bytes:
    """A ``tokenizer.bin`` as the SentencePiece model that it was made from.

    Raises:
        ImportError: the package ``protobuf`` is missing.
        ValueError: the file is damaged or something else.
    """
    data = path.read_bytes()
    pieces, offset = [], 4  # what it begins with is the longest piece's length
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fI", data, offset)
            text = data[offset + 8 : offset + 8 + length].decode()
            offset += 8 + length
            pieces.append((text.replace(" ", "▁"), score))
    except (struct.error, UnicodeDecodeError):
        offset = -1
    if offset != len(data) or [piece.strip("\n") for piece, _ in pieces[:3]] != _FIRST:
        found = printable(", ".join(piece for piece, _ in pieces[:3]))
        raise ValueError(
            f"{path} is damaged or no tokenizer of llama2.c: expected scored pieces to its end, "
            f"the first of them {', '.join(_FIRST)}; found {found or 'none'}"
        )
    proto = need("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    special = {0: kinds.UNKNOWN, 1: kinds.CONTROL, 2: kinds.CONTROL}
    for i, (piece, score) in enumerate(pieces):
        kind = special.get(i, kinds.BYTE if _BYTE.fullmatch(piece) else kinds.NORMAL)
        piece = _FIRST[i] if i in special else piece
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = proto.TrainerSpec.BPE, len(pieces)
    trainer.byte_fallback = sum(piece.type == kinds.BYTE for piece in model.pieces) == 256
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    return bytes(model.SerializeToString())
