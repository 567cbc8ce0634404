"""A tokenizer's pieces as bytes, which grammars are matched against."""

import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from llama.structure.worker import build_tokenizer
from llama.tokenizer import BaseTokenizer, Tokenizer
from llama.tokenizers.json_tokenizer import JsonTokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer

_MAX_GRAMMARS = 64  # compiled ones that are kept
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SHIFTS = torch.arange(8, dtype=torch.uint8)  # of bits in bytes, lowest first
_lock = threading.Lock()
_numbers = count()


class Compiled(NamedTuple):
    """A compiled grammar, whose copies sequences take; or the error that it gave."""

    matcher: Any
    unenforced: tuple[str, ...] = ()
    error: str = ""


class Vocabulary:
    """The pieces that a grammar chooses from.

    After the tokenizer's pieces stand, for those that lose the space before them where they open
    an answer, the pieces without it; then the end of the text. Grammars see all of them.

    Attributes:
        number: of this vocabulary, in this process.
        pieces: bytes; none for control pieces.
        n_words: of the tokenizer's pieces.
        text: int32 bits of the ids that have a text, (ceil(n_words / 32),).
        opening: for each of the tokenizer's pieces the one that it is where it opens a text,
            (n_words,).
        blank: whether a piece is a space that is dropped there, (n_words,).
        reopening: the marks after which a text opens again.
        grammars: compiled ones, the latest last.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        shortened: Sequence[int],
        reopening: Collection[int] = (),
    ):
        """Build a vocabulary.

        Args:
            pieces: bytes; none for control pieces.
            shortened: ids of those that lose the space before them where they open a text.
            reopening: see above.
        """
        self.number = next(_numbers)
        self.n_words = len(pieces)
        self.pieces = list(pieces)
        self.text = pack(torch.tensor([bool(piece) for piece in pieces]))
        self.blank = torch.zeros(self.n_words, dtype=torch.bool)
        ids = {piece: i for i, piece in enumerate(pieces) if piece}
        opening = list(range(self.n_words))
        for i in shortened:
            rest = pieces[i][1:]
            if rest not in ids:
                ids[rest] = len(self.pieces)
                self.pieces.append(rest)
            opening[i] = ids[rest]
            self.blank[i] = not rest
        self.opening = torch.tensor(opening)
        self.drops_spaces = bool(shortened)
        self.reopening = frozenset(reopening if shortened else ())
        self.end = len(self.pieces)
        self.pieces.append(b"<end>")
        self.tokenizer = build_tokenizer(self.pieces)
        self.grammars: OrderedDict[str, Compiled] = OrderedDict()

    def opened(self, token: int) -> int:
        """Return the piece that a token is to a grammar where it opens a text."""
        return int(self.opening[token])

    def may_open(self, bits: torch.Tensor) -> torch.Tensor:
        """Return which tokens may open a text, (n_words,), from which pieces may come next."""
        return bits[self.opening] | self.blank

    def keep(self, grammar: str, compiled: Compiled) -> None:
        """Keep a compiled grammar, and drop the one that wasn't used for longest."""
        with _lock:
            self.grammars[grammar] = compiled
            while len(self.grammars) > _MAX_GRAMMARS:
                self.grammars.popitem(last=False)

    def kept(self, grammar: str) -> Compiled | None:
        """Return a grammar that was compiled before."""
        with _lock:
            if grammar in self.grammars:
                self.grammars.move_to_end(grammar)
            return self.grammars.get(grammar)


_Built = dict[tuple[tuple[int, str], ...], Vocabulary]
_vocabularies: "WeakKeyDictionary[BaseTokenizer, _Built]" = WeakKeyDictionary()


def vocabulary_of(tokenizer: BaseTokenizer, visible: Mapping[int, str]) -> Vocabulary:
    """Return a tokenizer's vocabulary, which is built once.

    Args:
        visible: control pieces whose spelling is part of the text, by id.

    Raises:
        ValueError: the tokenizer is of a kind whose pieces have no bytes of their own.
    """
    key = tuple(sorted(visible.items()))
    with _lock:
        built = _vocabularies.setdefault(tokenizer, {})
        if key not in built:
            pieces = piece_bytes(tokenizer)
            for i, text in visible.items():
                pieces[i] = text.encode()
            shortened = _shortened(tokenizer, pieces)
            # After a mark the text begins again (``llama.tokenizers.control.with_marks``).
            reopening = visible if tokenizer.spaced else ()
            built[key] = Vocabulary(pieces, shortened, reopening)
        return built[key]


def piece_bytes(tokenizer: BaseTokenizer) -> list[bytes]:
    """Return the bytes that each piece adds to a text; none for control pieces.

    Raises:
        ValueError: the tokenizer is of a kind whose pieces have no bytes of their own.
    """
    silent = {*tokenizer.control_ids.values(), tokenizer.bos_id, tokenizer.eos_id}
    silent |= {tokenizer.pad_id, *tokenizer.stop_ids}
    if isinstance(tokenizer, Tokenizer):
        model = tokenizer.sp_model
        ids = range(tokenizer.n_words)
        silent |= {i for i in ids if model.is_unknown(i) or model.is_unused(i)}
        names = [tokenizer.token_piece(i) for i in ids]
        pieces = [_spelled(name, model.is_byte(i)) for i, name in enumerate(names)]
    elif isinstance(tokenizer, JsonTokenizer | TiktokenTokenizer):
        pieces = tokenizer.piece_bytes()
    else:
        raise ValueError(f"response_format knows no bytes of a {type(tokenizer).__name__}'s pieces")
    return [b"" if i in silent else piece for i, piece in enumerate(pieces)]


def _spelled(name: str, is_byte: bool) -> bytes:
    """Return the bytes of a piece as SentencePiece writes it."""
    found = _BYTE.fullmatch(name) if is_byte else None
    return bytes([int(found[1], 16)]) if found else name.replace("▁", " ").encode()


def _shortened(tokenizer: BaseTokenizer, pieces: Sequence[bytes]) -> list[int]:
    """Return the pieces whose space decoding drops at the beginning of a text.

    A byte's piece may keep it although the others don't: one of either kind is tried.
    """
    drops: dict[bool, bool] = {}
    shortened = []
    for i, piece in enumerate(pieces):
        if piece.startswith(b" "):
            is_byte = piece == b" " and bool(_BYTE.fullmatch(tokenizer.token_piece(i)))
            if is_byte not in drops:
                drops[is_byte] = tokenizer.decode([i]) != tokenizer.decode_infilling([i])
            if drops[is_byte]:
                shortened.append(i)
    return shortened


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Return bits, bool (n,), as int32 words, (ceil(n / 32),): bit i % 32 of word i // 32."""
    padded = torch.nn.functional.pad(bits.view(torch.uint8), (0, -len(bits) % 32))
    return (padded.view(-1, 8) << _SHIFTS).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Return the bits of int32 words, (n_words,), as bools, (32 * n_words,)."""
    return ((words.view(torch.uint8)[:, None] >> _SHIFTS) & 1).view(torch.bool).flatten()
