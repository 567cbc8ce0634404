"""Text to token ids and back."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

# Appended to a serialised model it is merged into it, as protobuf's rules say: the field
# normalizer_spec (3) with its field add_dummy_prefix (3) set to false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

# Breaks up what reads like a control piece in a message's text: a character that Unicode reserves
# for such internal use and that no text holds.
_MARK = "\ufdd0"


class BaseTokenizer:
    """What all tokenizers have in common: ids of control pieces, and that text never becomes one.

    Attributes:
        n_words: the size of the vocabulary.
        bos_id, eos_id, pad_id: begin and end of a sequence, padding; -1 where there is none.
        add_bos: whether a text on its own begins with ``bos_id``.
        stop_ids: the ids that end what a model writes; ``eos_id`` is one.
        control_ids: the control pieces' spelling and id.
        prefix_id, middle_id, suffix_id, eot_id: Code Llama's infilling pieces, or None.
        step_id: the end of a turn of Code Llama 70B-Instruct, or None.
        spaced: whether, in a prompt written out, each text after a control piece begins as a text
            on its own does (with SentencePiece's space), as Meta's prompts do.
    """

    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int
    add_bos: bool = True
    spaced: bool = True
    stop_ids: frozenset[int]
    control_ids: dict[str, int]

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        """The ids of a text; one that is ``continued`` has other text before it."""
        raise NotImplementedError

    def _to_text(self, ids: list[int], continued: bool) -> str:
        """The text of ids, none of which is a control piece's."""
        raise NotImplementedError

    def token_piece(self, t: int) -> str:
        """The vocabulary's entry for an id, as it is written there."""
        raise NotImplementedError

    @cached_property
    def prefix_id(self) -> int | None:
        return self.control_ids.get("▁<PRE>")

    @cached_property
    def middle_id(self) -> int | None:
        return self.control_ids.get("▁<MID>")

    @cached_property
    def suffix_id(self) -> int | None:
        return self.control_ids.get("▁<SUF>")

    @cached_property
    def eot_id(self) -> int | None:
        return self.control_ids.get("▁<EOT>")

    @cached_property
    def step_id(self) -> int | None:
        return self.control_ids.get("<step>")

    @cached_property
    def _as_text(self) -> dict[int, list[int]]:
        """For each control id the ordinary pieces that read like it: cut, so that it isn't met."""
        spelled = {}
        for piece, control in self.control_ids.items():
            text = piece.replace("▁", " ")
            spelled[control] = [*self._to_ids(text[:2], True), *self._to_ids(text[2:], True)]
        return spelled

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        longest_first = sorted((c for c in self.control_ids if len(c) > 1), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

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
        """The token ids of a text; what reads like a control piece in it stays text.

        Args:
            s: the text.
            bos: whether to put the beginning-of-sequence id in front.
            eos: whether to put the end-of-sequence id behind.

        Raises:
            TypeError: ``s`` is not a ``str``.
            ValueError: ``s`` can't be written as UTF-8.
        """
        ids = self._encode(s, continued=False)
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def encode_infilling(self, s: str) -> list[int]:
        """``encode`` without the space that SentencePiece puts in front of a text."""
        return self._encode(s, continued=True)

    def protect(self, text: str) -> str:
        """A message's text, fit to be put into a prompt for ``encode_rendered``."""
        text = text.replace(_MARK, "")
        while self._controls.search(text):  # marked once, what overlaps it may stand out
            text = self._controls.sub(lambda found: found[0][0] + _MARK + found[0][1:], text)
        return text

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a prompt written out: control pieces become their ids, all else is text.

        Only what went through ``protect`` may come from a user.
        """
        ids = []
        for part in self._controls.split(text):
            if part in self.control_ids:
                ids.append(self.control_ids[part])
            elif part:
                continued = bool(ids) and not self.spaced
                ids += self._encode(part.replace(_MARK, ""), continued)
        return ids

    def decode(self, t: Sequence[int]) -> str:
        """The text of token ids; control ids have none, incomplete characters become U+FFFD.

        Raises:
            ValueError: an id isn't in the vocabulary.
        """
        return self._decode(t, continued=False)

    def decode_infilling(self, t: Sequence[int]) -> str:
        """``decode`` that keeps a space in front of the text."""
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
            proto: its contents, where they don't come from a file; the path then is a name.

        Raises:
            FileNotFoundError: there is no such file.
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
            # Code Llama's infilling reads and writes text without the space that SentencePiece
            # puts in front of every text.
            self._sp_continuation = SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
            pieces = self.sp_model.id_to_piece(list(range(self.sp_model.vocab_size())))
        # A piece that is no UTF-8 can't be made a str, not even in SentencePiece's complaint.
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
        """The vocabulary's entry for an id, as it is written there (``▁`` for a space)."""
        self._check_id(t)
        piece: str = self.sp_model.id_to_piece(t)
        return piece
