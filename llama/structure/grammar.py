"""The grammar of one sequence: the tokens that may come next."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llama.structure.vocabulary import Vocabulary, pack, unpack

logger = logging.getLogger(__name__)


class TokenGrammar:
    """A grammar that holds a sequence's text as it is decoded.

    Where nothing can go on, as after an error in llguidance, only the end is allowed.

    Attributes:
        unenforced: what the form asks for and the grammar doesn't hold the text to.
        error: why the grammar was given up; None while it holds.
    """

    def __init__(
        self,
        matcher: Any,
        vocabulary: Vocabulary,
        stop_ids: Iterable[int],
        is_opening: bool,
        unenforced: tuple[str, ...] = (),
    ):
        """Begin a text.

        Args:
            matcher: an ``LLMatcher``, which is this grammar's own.
            stop_ids: tokens that end the sequence, which are allowed where the text may end.
            is_opening: whether decoding drops the space before the first piece.
            unenforced: see above.
        """
        self.unenforced = unenforced
        self.error: str | None = None
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stop_ids = frozenset(stop_ids)
        self._is_opening = is_opening and vocabulary.drops_spaces
        self._has_ended = False
        stops = torch.zeros_like(vocabulary.text)  # (ceil(n_words / 32),)
        for i in self._stop_ids:
            if 0 <= i < vocabulary.n_words:
                stops[i // 32] |= pack(torch.arange(32) == i % 32)[0]
        self._text = vocabulary.text & ~stops
        self._stops = stops
        self._end = stops if stops.any() else torch.full_like(stops, -1)

    def copy(self) -> "TokenGrammar":
        """Return this grammar for another sequence, at the same place of the text."""
        copied = object.__new__(TokenGrammar)
        copied.__dict__ |= {**self.__dict__, "_matcher": self._matcher.deep_copy()}
        return copied

    @property
    def is_finished(self) -> bool:
        """True once nothing but the end may follow."""
        return self._has_ended or self.error is not None or self._matcher.is_stopped()

    def masks(self, draft: Sequence[int]) -> torch.Tensor:
        """Return the tokens that are allowed next, and after each token of a draft.

        Rows after a token that isn't allowed, or after the end, allow the end only.

        Returns:
            int32 bit masks, (1 + len(draft), ceil(n_words / 32)): bit i % 32 of word i // 32 for
            the token i.
        """
        rows = self._end.repeat(1 + len(draft), 1)
        if self.is_finished:
            return rows
        ids, openings = self._matched(draft)
        n_consumed = 0
        for i in range(self.accepted(draft) + 1):
            if i and (matched := ids[i - 1]) is not None:
                if not self._matcher.consume_token(matched):
                    break
                n_consumed += 1
            if not self._fill(rows[i], openings[i]):
                break
        self._matcher.rollback(n_consumed)
        self._check()
        return rows

    def accepted(self, draft: Sequence[int]) -> int:
        """Return how many tokens of a draft the grammar allows, without an end among them."""
        if self.is_finished:
            return 0
        stop = next((i for i, token in enumerate(draft) if token in self._stop_ids), len(draft))
        ids, _ = self._matched(draft[:stop])
        known = [i for i in ids if i is not None]
        n_valid: int = self._matcher.validate_tokens(known) if known else 0
        self._check()
        return n_valid + (len(ids) - len(known))

    def push(self, token: int) -> None:
        """Take a token that was drawn; one that isn't allowed ends the grammar with an error."""
        if token in self._stop_ids:
            self._has_ended = True
        elif not self.is_finished:
            (matched,), (_, self._is_opening) = self._matched([token])
            if matched is not None:
                self._matcher.consume_token(matched)
                self._check()

    def _matched(self, tokens: Sequence[int]) -> tuple[list[int | None], list[bool]]:
        """Return the pieces that tokens are to the grammar; None for a space that is dropped.

        And whether the text opens before each of the tokens, and after the last: at its beginning,
        and after a mark, where decoding begins again.
        """
        vocabulary, opens = self._vocabulary, [self._is_opening]
        ids: list[int | None] = []
        for token in tokens:
            is_known = opens[-1] and 0 <= token < vocabulary.n_words
            is_blank = is_known and bool(vocabulary.blank[token])
            ids.append(None if is_blank else vocabulary.opened(token) if is_known else token)
            opens.append(token in vocabulary.reopening)
        return ids, opens

    def _fill(self, row: torch.Tensor, is_opening: bool) -> bool:
        """Write the tokens that are allowed next; return False if the matcher gave up."""
        vocabulary = self._vocabulary
        words = torch.zeros((len(vocabulary.pieces) + 31) // 32, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), 4 * len(words))
        if self._matcher.is_error():
            return False
        may_end = int(words[vocabulary.end // 32]) >> vocabulary.end % 32 & 1
        allowed = words[: len(row)]
        if is_opening:
            allowed = pack(vocabulary.may_open(unpack(words)))
        allowed = allowed & self._text
        if may_end:
            allowed |= self._stops
        if allowed.any():
            row.copy_(allowed)
        elif not may_end:
            self._fail("the vocabulary can't spell what the grammar wants")
            return False
        return True

    def _check(self) -> None:
        if self.error is None and self._matcher.is_error():
            self._fail(self._matcher.get_error())

    def _fail(self, error: str) -> None:
        if self.error is None:
            self.error = error.partition("\n")[0]
            logger.warning("a grammar was given up, and its answer ends: %s", self.error)
