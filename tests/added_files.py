"""Directories with added pieces that tests make."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llama.generation import TINY

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def write(directory: Path, **contents: object) -> dict[str, Path]:
    """Write JSON files, in whose names ``__`` stands for a dot; gives all files."""
    for name, value in contents.items():
        (directory / name.replace("__", ".")).write_text(json.dumps(value))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return {path.name: path for path in directory.iterdir()}


def with_model(
    directory: Path,
    config: Mapping[str, Any],
    own: Mapping[str, str] | None = None,
    **contents: object,
) -> dict[str, Path]:
    """A directory with the embedded tokenizer, whose own further pieces have types by names."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((TINY / "tokenizer.model").read_bytes())
    for text, kind in (own or {}).items():
        score = 0.0 if kind == "USER_DEFINED" else -1e9
        proto.pieces.add(piece=text, score=score, type=getattr(proto.SentencePiece, kind))
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **names, **config}
    return write(directory, tokenizer_config__json=config, **contents)


def decoder(specs: list[dict[str, Any]], first: int = 768) -> dict[str, Any]:
    flags = dict.fromkeys((*FLAGS, "special"), False)
    return {str(first + i): {**flags, **spec} for i, spec in enumerate(specs)}
