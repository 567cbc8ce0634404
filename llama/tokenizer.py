"""Text to token ids and back."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

# Appended to a serialised model with a byte that is 0 or 1, it is merged into the model by
# protobuf's rules: the field normalizer_spec (3) with its field add_dummy_prefix (3).
DUMMY_PREFIX = b"\x1a\x02\x18"


def _control_id(piece: str) -> "cached_property[int | None]":
    return cached_property(lambda tokenizer: tokenizer.control_ids.get(piece))


class BaseTokenizer:
    """The base of all tokenizers: control pieces have ids, and text never becomes one of them.

    Attributes:
        n_words: the size of the vocabulary.
        bos_id: the beginning of a sequence; -1 for none.
        eos_id: its end; -1 for none.
        pad_id: padding; -1 for none.
        add_bos: whether a text on its own begins with ``bos_id``.
        stop_ids: the ids that end a generated text; ``eos_id`` is one.
        control_ids: the control pieces' ids by their spelling.
        prefix_id: Code Llama's infilling piece ``▁<PRE>``, or None.
        middle_id: ``▁<MID>``.
        suffix_id: ``▁<SUF>``.
        eot_id: ``▁<EOT>``.
        step_id: the end of a turn of Code Llama 70B-Instruct, or None.
        spaced: whether each text after a control piece of a rendered prompt begins like a text on
            its own, with SentencePiece's space, as in Meta's prompts.
        lstrip_ids: the control pieces that take away the white space before them in a prompt.
        rstrip_ids: those that take away the white space behind them.
        single_word_ids: those that are one only as a word on its own.
    """

    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int
    add_bos: bool = True
    spaced: bool = True
    stop_ids: frozenset[int]
    control_ids: dict[str, int]
    lstrip_ids: frozenset[int] = frozenset()
    rstrip_ids: frozenset[int] = frozenset()
    single_word_ids: frozenset[int] = frozenset()

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        """Return the ids of a text; one that is ``continued`` has other text before it."""
        raise NotImplementedError

    def _to_text(self, ids: list[int], continued: bool) -> str:
        """Return the text of ids; one that is ``continued`` keeps a space at its beginning."""
        raise NotImplementedError

    def token_piece(self, t: int) -> str:
        """Return the vocabulary's entry for an id, as it is written there.

        Raises:
            ValueError: the id isn't in the vocabulary.
        """
        raise NotImplementedError

    prefix_id = _control_id("▁<PRE>")
    middle_id = _control_id("▁<MID>")
    suffix_id = _control_id("▁<SUF>")
    eot_id = _control_id("▁<EOT>")
    step_id = _control_id("<step>")

    @cached_property
    def _as_text(self) -> dict[int, list[int]]:
        """The ordinary pieces that spell each control piece, by its id.

        The spelling is encoded in two parts, neither of which is the control piece.
        """
        spelled = {}
        for piece, control in self.control_ids.items():
            text = piece.replace("▁", " ")
            cut = min(2, len(text) - 1)
            spelled[control] = [*self._to_ids(text[:cut], True), *self._to_ids(text[cut:], True)]
        return spelled

    def _encode(self, s: str, continued: bool) -> list[int]:
        if not isinstance(s, str):
            raise TypeError(f"the tokenizer encodes str, not {type(s).__name__}: {s!r}")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half of a surrogate pair at {error.start}, which is no "
                "character: decode it with the right encoding first"
            ) from error
        ids = self._to_ids(s, continued)
        if self._as_text.keys().isdisjoint(ids):
            return ids
        return [part for i in ids for part in self._as_text.get(i, (i,))]

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Return the token ids of a text; a control piece's spelling in it stays text.

        Args:
            s: the text.
            bos: whether to prepend the beginning-of-sequence id.
            eos: whether to append the end-of-sequence id.

        Raises:
            TypeError: ``s`` is not a ``str``.
            ValueError: ``s`` can't be written as UTF-8.
        """
        ids = self._encode(s, continued=False)
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def encode_infilling(self, s: str) -> list[int]:
        """Encode a text without the space that SentencePiece adds before it."""
        return self._encode(s, continued=True)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Return the ids of a prompt: control ids as they are, and texts between, which stay text.

        Raises:
            TypeError, ValueError: as in ``encode``.
        """
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._encode(part, continued=bool(ids) and not self.spaced)
        return ids

    def decode(self, t: Sequence[int]) -> str:
        """Return the text of token ids; control ids have none, partial characters become U+FFFD.

        Raises:
            TypeError: ``t`` is a string, or holds something else than integers.
            ValueError: an id isn't in the vocabulary.
        """
        return self._decode(t, continued=False)

    def decode_infilling(self, t: Sequence[int]) -> str:
        """Decode token ids and keep a space at the beginning of the text."""
        return self._decode(t, continued=True)

    def _decode(self, t: Sequence[int], continued: bool) -> str:
        if isinstance(t, str | bytes):
            raise TypeError(f"the tokenizer decodes token ids, not {type(t).__name__}: {t!r}")
        for i in t:
            self._check_id(i)
        return self._to_text(list(t), continued)

    def _check_id(self, i: int) -> None:
        if not isinstance(i, int):
            raise TypeError(f"token ids are int, not {type(i).__name__}: {i!r}")
        if not 0 <= i < self.n_words:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.n_words}")


class Tokenizer(BaseTokenizer):
    """A SentencePiece model."""

    def __init__(self, model_path: str | Path, proto: bytes | None = None):
        """Load a model.

        Args:
            model_path: a ``tokenizer.model``.
            proto: the model's content, if it doesn't come from a file; the path then is its name
                in errors.

        Raises:
            FileNotFoundError: ``model_path`` doesn't exist.
            ValueError: the file is no SentencePiece model.
        """
        path = Path(model_path)
        if proto is None:
            if not path.is_file():
                raise FileNotFoundError(
                    f"no tokenizer at {path}: give the path of a tokenizer.model"
                )
            proto = path.read_bytes()
        try:
            if not proto:
                raise RuntimeError("empty file")
            self.sp_model = SentencePieceProcessor(model_proto=proto)
            # Code Llama's infilling encodes and decodes text without the space that SentencePiece
            # adds before every text.
            self._sp_continuation = SentencePieceProcessor(model_proto=proto + DUMMY_PREFIX + b"\0")
            pieces = self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        # A piece that is no UTF-8 can't become a str, not even in SentencePiece's own error.
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model") from error

        self.n_words = self.sp_model.vocab_size()
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        needed = (self.bos_id, self.eos_id, self.sp_model.unk_id())
        if not all(0 <= i < self.n_words for i in needed):
            raise ValueError(f"{path} lacks one of the pieces <s>, </s> and <unk>")
        self.pad_id = self.sp_model.pad_id()
        self.stop_ids = frozenset({self.eos_id})
        # Code Llama's own pieces aren't marked as control pieces in all of its models.
        published = {"▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<step>"}
        self.control_ids = {
            piece: i
            for i, piece in enumerate(pieces)
            if piece and (self.sp_model.is_control(i) or piece in published)
        }

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        model = self._sp_continuation if continued else self.sp_model
        ids: list[int] = model.encode(s)
        return ids

    def _to_text(self, ids: list[int], continued: bool) -> str:
        model = self._sp_continuation if continued else self.sp_model
        text: str = model.decode(ids)
        return text

    def token_piece(self, t: int) -> str:
        """Return the vocabulary's entry for an id, as it is written there (``▁`` for a space)."""
        self._check_id(t)
        piece: str = self.sp_model.id_to_piece(t)
        return piece
