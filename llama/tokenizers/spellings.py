"""Control pieces that a caller spells out in a text on purpose, and their spellings in one."""

from collections.abc import Sequence
from itertools import zip_longest

from llama.tokenizer import BaseTokenizer
from llama.tokenizers.added import AddedPiece, AddedWords, is_letter
from llama.tokenizers.control import with_marks


class Spellings:
    """Reads texts in which control pieces' spellings stand for the pieces, and writes such texts.

    Whoever writes a part of such a text writes control pieces with it. ``BaseTokenizer.encode``
    keeps them out; this is for callers who ask for them.

    Code Llama's pieces for infilling are spelled as in its prompts, ``<PRE> PREFIX <SUF>SUFFIX
    <MID>``: with the space before that ``▁`` stands for.
    """

    def __init__(self, tokenizer: BaseTokenizer):
        """Prepare to find a tokenizer's control pieces."""
        self._tokenizer = tokenizer
        controls = {i: p for p, i in tokenizer.control_ids.items() if not is_letter(p)}
        self._with_space = {i for i, piece in controls.items() if piece.startswith("▁")}
        self._words = AddedWords(
            {
                i: AddedPiece(
                    piece.removeprefix("▁"),
                    special=True,
                    lstrip=i in tokenizer.lstrip_ids,
                    rstrip=i in tokenizer.rstrip_ids,
                    single_word=i in tokenizer.single_word_ids,
                )
                for i, piece in controls.items()
            }
        )
        written = {i: f" {p[1:]}" if i in self._with_space else p for i, p in controls.items()}
        self._decode = with_marks(tokenizer.decode, tokenizer, written)

    def encode(self, text: str, bos: bool) -> list[int]:
        """Return the ids of a text with spelled control pieces.

        Args:
            text: the text.
            bos: whether to prepend the beginning-of-sequence id, unless the text begins with it.

        Raises:
            TypeError, ValueError: as in ``BaseTokenizer.encode``.
        """
        ids: list[int] = []
        parts = self._words.split(text)
        for part, following in zip_longest(parts, parts[1:]):
            if isinstance(part, int):
                ids.append(part)
                continue
            if following in self._with_space and part[-1] in " ▁":
                part = part[:-1]
            ids += self._between(part, ids[-1] if ids else None)
        begins = bos and ids[:1] != [self._tokenizer.bos_id]
        return [self._tokenizer.bos_id] * begins + ids

    def _between(self, text: str, before: int | None) -> list[int]:
        """Return the ids of a text behind a control piece, or at the beginning."""
        tokenizer = self._tokenizer
        if before is not None and before in (tokenizer.prefix_id, tokenizer.middle_id):
            # What follows is a text on its own, with the space that SentencePiece adds.
            text, continued = text.removeprefix(" "), False
        elif before is not None and before == tokenizer.suffix_id:
            continued = True
        else:
            continued = before is not None and not tokenizer.spaced
        if continued:
            return tokenizer.encode_infilling(text)
        return tokenizer.encode(text, bos=False, eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with control pieces written out.

        Raises:
            TypeError, ValueError: as in ``BaseTokenizer.decode``.
        """
        return self._decode(ids)
