"""Llama 3's ``tokenizer.model``, a text of byte pairs that the package ``tiktoken`` merges.

Each line has a piece's bytes in base64 and its id, which is also the rank of its merge. The file
has neither the expression that splits texts into words nor the control pieces, which follow on the
last line's id; both are the same for Llama 3, 3.1, 3.2 and 3.3.

Source: https://github.com/meta-llama/llama-models (models/llama3/tokenizer.py)
"""

import base64
import json
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from llama.errors import need, printable
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.json_tokenizer import BYTE_LEVEL
from llama.tokenizers.pre_tokenizers import RULES

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|\Z)")
_MAX_BYTES = 20_000_000  # ten times Llama 3's

(_WORDS,) = RULES["llama3"]
# Meta's tokenizer cuts texts, since tiktoken's expressions fail on very long ones, and then words
# or white space, since merging takes far longer than their length.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000

_N_CONTROLS = 256
# Of the control pieces those with a name; the others are reserved. Llama 3 itself, before 3.1,
# has other reserved ones in the place of those that it doesn't use.
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
_LETTERS = {byte: letter for letter, byte in BYTE_LEVEL.items()}


def is_tiktoken(data: bytes) -> bool:
    """Return whether a ``tokenizer.model`` is tiktoken's text, by its first line."""
    return _LINE.match(data) is not None


class TiktokenTokenizer(BaseTokenizer):
    """Llama 3's byte pairs, encoded as Meta's tokenizer encodes."""

    def __init__(self, data: bytes, name: str, vocab_size: int | None = None):
        """Read a vocabulary.

        Args:
            data: the content of a ``tokenizer.model``.
            name: the file's name in errors.
            vocab_size: the number of ids that the model has; control pieces beyond are dropped.

        Raises:
            ImportError: the package ``tiktoken`` is missing.
            ValueError: the file is damaged.
        """
        self._pieces = _read(data, name)
        n_pieces = len(self._pieces)
        # The package finds its own vocabularies on the network, and needs nothing for this one.
        self._bpe = need("tiktoken").Encoding(
            name,
            pat_str=_WORDS,
            mergeable_ranks={piece: i for i, piece in enumerate(self._pieces)},
            special_tokens={},
        )
        names = _control_names()
        if vocab_size is not None:
            if n_pieces > vocab_size:
                raise ValueError(
                    f"{name} has {n_pieces} pieces, and the model a vocabulary of {vocab_size}: "
                    "this is another model's tokenizer"
                )
            names = names[: vocab_size - n_pieces]
        self.control_ids = {piece: n_pieces + i for i, piece in enumerate(names)}
        self.n_words = n_pieces + len(names)
        self.bos_id = self.control_ids.get("<|begin_of_text|>", -1)
        self.eos_id = self.control_ids.get("<|end_of_text|>", -1)
        self.pad_id = self.control_ids.get("<|finetune_right_pad_id|>", -1)
        ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        self.stop_ids = frozenset(self.control_ids[p] for p in ends if p in self.control_ids)
        self.add_bos = self.bos_id >= 0
        self._control_names = names

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        ids: list[int] = []
        for part in _parts(s):
            ids += self._bpe.encode_ordinary(part)
        return ids

    def _to_text(self, ids: list[int], continued: bool) -> str:
        pieces = (self._pieces[i] for i in ids if i < len(self._pieces))
        return b"".join(pieces).decode(errors="replace")

    def token_piece(self, t: int) -> str:
        """Return a piece as a ``tokenizer.json`` has it: a letter for each byte."""
        self._check_id(t)
        if t >= len(self._pieces):
            return self._control_names[t - len(self._pieces)]
        return _spelled(self._pieces[t])

    def piece_bytes(self) -> list[bytes]:
        """Return the bytes that each piece adds to a text; none for control pieces."""
        return self._pieces + [b""] * len(self._control_names)


def _read(data: bytes, name: str) -> list[bytes]:
    """Return the pieces' bytes by id.

    Raises:
        ValueError: the file is damaged, or far too large.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(
            f"{name} has {len(data):,} bytes, far more than a tokenizer of Llama 3: download it "
            "again"
        )
    found: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            piece, i = base64.b64decode(text, validate=True), int(rank)
        except ValueError as error:
            shown = printable(line[:100].decode(errors="replace"), 40)
            raise ValueError(
                f"line {number} of {name} is {shown!r}, not a piece in base64 and its id: "
                "download it again"
            ) from error
        if found.setdefault(i, piece) != piece:
            raise ValueError(f"{name} has two pieces with the id {i}: download it again")
    pieces = [found[i] for i in sorted(found)]
    if sorted(found) != list(range(len(found))) or len(set(pieces)) < len(pieces):
        raise ValueError(
            f"{name} has {len(pieces)} pieces that aren't different or not numbered from 0 on: "
            "download it again"
        )
    if missing := {bytes([byte]) for byte in range(256)} - set(pieces):
        raise ValueError(
            f"{name} lacks {len(missing)} of the 256 single bytes, of which every text can be "
            "made: download it again"
        )
    return pieces


def n_words(data: bytes, name: str, vocab_size: int | None = None) -> int:
    """Return the number of ids of a vocabulary; control pieces beyond ``vocab_size`` don't count.

    Raises:
        ValueError: the file is damaged.
    """
    n_pieces = len(_read(data, name))
    n_all = n_pieces + _N_CONTROLS
    return n_all if vocab_size is None else max(min(n_all, vocab_size), n_pieces)


def _control_names() -> list[str]:
    reserved = (f"<|reserved_special_token_{i}|>" for i in count())
    return [_NAMED.get(i) or next(reserved) for i in range(_N_CONTROLS)]


def _parts(text: str) -> Iterator[str]:
    """Yield the parts of a text that are encoded by themselves."""
    for begin in range(0, len(text), _MAX_CHARS):
        chunk, start = text[begin : begin + _MAX_CHARS], 0
        if len(chunk) > _MAX_RUN:
            for run in re.finditer(r"\s+|\S+", chunk):
                for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                    yield chunk[start:end]
                    start = end
        yield chunk[start:]


def _spelled(piece: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in piece)


def hf_files(data: bytes, name: str, chat_template: str | None = None) -> dict[str, bytes]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers`` reads.

    Args:
        data: the content of a ``tokenizer.model``.
        name: the file's name in errors.
        chat_template: in Jinja's language, if there is one.

    Raises:
        ValueError: the file is damaged.
    """
    pieces = _read(data, name)
    ids = {piece: i for i, piece in enumerate(pieces)}
    begin = _NAMED[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"SpecialToken": {"id": begin, "type_id": 0}}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": len(pieces) + i, "content": text, **flags, "special": True}
            for i, text in enumerate(_control_names())
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [words, byte_level],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special, sequence],
            "pair": [special, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [len(pieces)], "tokens": [begin]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {_spelled(piece): i for piece, i in ids.items()},
            "merges": _merges(pieces, ids),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": _NAMED[1],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _merges(pieces: list[bytes], ids: dict[bytes, int]) -> list[tuple[str, str]]:
    """Return all pairs that make a piece, in the order of the pieces' ranks."""
    merges = []
    for piece in pieces:
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
        merges += [(_spelled(a), _spelled(b)) for _, _, a, b in sorted(pairs)]
    return merges
