"""Text to token ids and back, with a SentencePiece model."""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

# Appended to a serialised model it is merged into it, as protobuf's rules say: the field
# normalizer_spec (3) with its field add_dummy_prefix (3) set to false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A SentencePiece model and the ids of its control pieces.

    The infilling ids ``prefix_id``, ``middle_id``, ``suffix_id``, ``eot_id`` (Code Llama) and the
    turn's end ``step_id`` (Code Llama 70B-Instruct) are None where the model lacks the piece.
    Text never encodes to one of them: written out as text they become ordinary pieces.
    """

    def __init__(self, model_path: str | Path):
        """Load a model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no SentencePiece model.
        """
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: give the path of a tokenizer.model")
        proto = path.read_bytes()
        try:
            if not proto:
                raise RuntimeError("empty file")
            self.sp_model = SentencePieceProcessor(model_proto=proto)
            # Code Llama's infilling reads and writes text without the space that SentencePiece
            # puts in front of every text.
            self._sp_continuation = SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
            self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        # A piece that is no UTF-8 can't be made a str, not even in SentencePiece's complaint.
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model") from error

        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        needed = (self.bos_id, self.eos_id, self.sp_model.unk_id())
        if not all(0 <= i < self.n_words for i in needed):
            raise ValueError(f"{path} lacks one of the pieces <s>, </s> and <unk>")
        self.pad_id: int = self.sp_model.pad_id()
        self.prefix_id = self._control_id("▁<PRE>")
        self.middle_id = self._control_id("▁<MID>")
        self.suffix_id = self._control_id("▁<SUF>")
        self.eot_id = self._control_id("▁<EOT>")
        self.step_id = self._control_id("<step>")
        self._as_text = {
            control: self._spell(control)
            for control in (
                self.prefix_id,
                self.middle_id,
                self.suffix_id,
                self.eot_id,
                self.step_id,
            )
            if control is not None
        }

    def _control_id(self, piece: str) -> int | None:
        found: int = self.sp_model.piece_to_id(piece)
        # A piece that isn't there is answered with the id of the unknown one.
        return found if self.sp_model.id_to_piece(found) == piece else None

    def _spell(self, control: int) -> list[int]:
        """The ordinary pieces that read like a control piece: it is cut, so that it isn't met."""
        text = self.token_piece(control).replace("▁", " ")
        encode = self._sp_continuation.encode
        return [*encode(text[:2]), *encode(text[2:])]

    def _encode(self, model: SentencePieceProcessor, s: str) -> list[int]:
        if not isinstance(s, str):
            raise TypeError(f"the tokenizer encodes str, not {type(s).__name__}: {s!r}")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half of a surrogate pair at {error.start}, which is no "
                "character: decode it with the right encoding first"
            ) from error
        ids: list[int] = model.encode(s)
        if self._as_text.keys().isdisjoint(ids):
            return ids
        return [part for i in ids for part in self._as_text.get(i, (i,))]

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The token ids of a text.

        Args:
            s: the text.
            bos: whether to put the beginning-of-sequence id in front.
            eos: whether to put the end-of-sequence id behind.

        Raises:
            TypeError: ``s`` is not a ``str``.
            ValueError: ``s`` can't be written as UTF-8.
        """
        ids = self._encode(self.sp_model, s)
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def decode(self, t: Sequence[int]) -> str:
        """The text of token ids; control ids have none, incomplete characters become U+FFFD.

        Raises:
            ValueError: an id isn't in the vocabulary.
        """
        return self._decode(self.sp_model, t)

    def _decode(self, model: SentencePieceProcessor, t: Sequence[int]) -> str:
        if isinstance(t, str | bytes):
            raise TypeError(f"the tokenizer decodes token ids, not {type(t).__name__}: {t!r}")
        for i in t:
            self._check_id(i)
        text: str = model.decode(list(t))
        return text

    def _check_id(self, i: int) -> None:
        if not isinstance(i, int):
            raise TypeError(f"token ids are int, not {type(i).__name__}: {i!r}")
        if not 0 <= i < self.n_words:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.n_words}")

    def encode_infilling(self, s: str) -> list[int]:
        """``encode`` without the space that SentencePiece puts in front of a text."""
        return self._encode(self._sp_continuation, s)

    def decode_infilling(self, t: Sequence[int]) -> str:
        """``decode`` that keeps a space in front of the text."""
        return self._decode(self._sp_continuation, t)

    def token_piece(self, t: int) -> str:
        """The vocabulary's entry for an id, as it is written there (``▁`` for a space)."""
        self._check_id(t)
        piece: str = self.sp_model.id_to_piece(t)
        return piece
