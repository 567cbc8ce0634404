"""A SentencePiece model with pieces that the files next to it add or describe."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from llama.errors import need, printable
from llama.tokenizer import Tokenizer
from llama.tokenizers.added import AddedPiece, AddedWords, is_letter
from llama.tokenizers.descriptions import Description


class ExtendedTokenizer(Tokenizer):
    """A SentencePiece model with added pieces.

    Attributes:
        spaced_words: whether a text after an added word begins with SentencePiece's space, as a
            text on its own does, unless it has one.
    """

    def __init__(
        self,
        name: str,
        proto: bytes,
        silent: Mapping[int, AddedPiece],
        structure: Mapping[int, AddedPiece],
        words: Mapping[int, AddedPiece],
    ):
        """Load a model.

        Args:
            name: its name in errors.
            proto: its content.
            silent: control pieces, which have no text.
            structure: control pieces that are part of a decoded text.
            words: pieces that texts become.

        Raises:
            ValueError: ``proto`` is no SentencePiece model.
        """
        super().__init__(name, proto)
        pieces = {**silent, **structure, **words}
        self.control_ids = {t: i for t, i in self.control_ids.items() if i not in pieces}
        self.control_ids |= {p.content: i for i, p in {**silent, **structure}.items()}
        self.spaced_words = False
        self._words = AddedWords(words)
        self._silent = silent.keys()
        self._contents = {i: piece.content for i, piece in pieces.items()}
        shown = {**structure, **words}
        self._shown = {i: piece.content.replace("▁", " ") for i, piece in shown.items()}
        # Whether a space at the beginning of a text is SentencePiece's own.
        own = (
            i for i in range(self.n_words) if i not in pieces and not self.sp_model.is_control(i)
        )
        space = [i for i in own if self.sp_model.id_to_piece(i).startswith("▁")][:1]
        self._drops_space = self.sp_model.decode(space) != self._sp_continuation.decode(space)

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        ids: list[int] = []
        for part in self._words.split(s):
            if isinstance(part, int):
                ids.append(part)
            else:
                begins = not ids or (self.spaced_words and part[0] not in " ▁")
                ids += super()._to_ids(part, continued or not begins)
        return ids

    def _to_text(self, ids: list[int], continued: bool) -> str:
        text, begin = "", 0
        ids = [i for i in ids if i not in self._silent]
        drops = self._drops_space and not continued
        for end, i in enumerate(ids):
            if i in self._shown:
                part = ids[begin:end]
                text += super()._to_text(part, continued)
                # A piece before it that is nothing but a space is the one that gave it up.
                spaces = any(self.sp_model.id_to_piece(p).startswith("▁") for p in part)
                is_first = drops and not text and not spaces
                text += self._shown[i].removeprefix(" " if is_first else "")
                begin, continued, drops = end + 1, True, False
        return text + super()._to_text(ids[begin:], continued)

    def token_piece(self, t: int) -> str:
        """Return the vocabulary's entry for an id; of an added piece, its text."""
        self._check_id(t)
        return self._contents.get(t) or super().token_piece(t)


def extended(name: str, proto: bytes, description: Description) -> Tokenizer:
    """Return a SentencePiece model as the files next to it describe it.

    Pieces that they, or the chat template, make control pieces are such, whatever type they have
    in the model.

    Args:
        name: the model's name in errors.
        proto: its content.
        description: of the other files.

    Raises:
        ImportError: a package is missing.
        ValueError: the model is malformed, or there are no such pieces.
    """
    plain = Tokenizer(name, proto)
    ids = {plain.token_piece(i): i for i in range(plain.n_words)}
    found = {
        ids[text]: piece
        for piece in description.special.values()
        if (text := _written(piece.content)) in ids
    }
    found |= description.added
    pieces = {
        i: piece
        for i, piece in sorted(found.items())
        if ids.get(text := _written(piece.content)) != i
        or not (_is_reserved(plain, i) or (piece.special and is_letter(text)))
    }
    # The model finds its own user-defined pieces in every text.
    marks = {
        i: AddedPiece(description.as_mark(text))
        for text, i in ids.items()
        if (description.is_control(text) or description.is_structure(text))
        and i not in found
        and not _is_reserved(plain, i)
    }
    if not pieces and not marks:
        return plain
    model = need("sentencepiece.sentencepiece_model_pb2").ModelProto()
    model.ParseFromString(proto)
    own = model.SentencePiece.USER_DEFINED
    pieces |= {i: piece for i, piece in marks.items() if model.pieces[i].type == own}
    silent = {i: p for i, p in pieces.items() if description.is_control(p.content)}
    others = {i: piece for i, piece in pieces.items() if i not in silent}
    structure = {i: p for i, p in others.items() if description.is_structure(p.content)}
    words = {i: piece for i, piece in others.items() if i not in structure}
    for i, piece in pieces.items():
        # Pieces that texts never become anyhow stay: others are merged from them.
        if plain.control_ids.get(piece.content) != i:
            _set(model, ids, i, piece, i in words)
    return ExtendedTokenizer(name, model.SerializeToString(), silent, structure, words)


def _written(text: str) -> str:
    """Return a text as SentencePiece writes it."""
    return text.replace(" ", "▁")


def _is_reserved(tokenizer: Tokenizer, i: int) -> bool:
    """Return whether a model has a piece for another purpose than texts."""
    model = tokenizer.sp_model
    return bool(model.is_control(i) or model.is_unknown(i) or model.is_byte(i))


def _set(model: Any, ids: dict[str, int], i: int, piece: AddedPiece, is_word: bool) -> None:
    """Add a piece to a model, or change the piece of its id.

    Raises:
        ValueError: there is a gap before it, or another piece has its text.
    """
    if i > len(model.pieces):
        raise ValueError(
            f"the piece {printable(piece.content)} has the id {i}, but {len(model.pieces)} "
            "pieces stand before it: added_tokens.json or tokenizer_config.json lacks some"
        )
    text = _written(piece.content)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"the piece {printable(text)} holds half of a surrogate pair")
    if is_word and " " in piece.content and ids.get(text, i) != i:
        # The model has a word with this space, which remains another piece than the added one.
        text = next(name for n in count() if (name := f"<added {i} {n}>") not in ids)
    if ids.setdefault(text, i) != i:
        raise ValueError(f"the piece {printable(text)} has the ids {ids[text]} and {i}")
    entry = model.pieces[i] if i < len(model.pieces) else model.pieces.add(score=0.0)
    # Where a text has it as a part of a word, only a model that has it as an ordinary piece may
    # use it.
    if is_word and entry.piece == text and not (piece.single_word and entry.type != entry.NORMAL):
        return
    entry.piece, entry.type = text, entry.CONTROL
