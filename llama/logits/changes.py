"""Changes that the sequences of a pass make to their logits, before tokens are drawn."""

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from llama.logits.masks import Grammar, Masks, barriers
from llama.logits.penalties import Penalties, PenaltyRows
from llama.sampling import SamplingParams

_BAN = -100  # the bias from which on a token is never drawn
# Its logit: less than any other, and more than that of tokens which a grammar forbids. Where a
# grammar allows nothing but banned tokens, the grammar decides.
_BANNED = -1e30
_LARGEST = 1e9  # of a bias: an infinite one would make NaN of the others


class Text(Protocol):
    """The part of a sequence that matters here."""

    tokens: list[int]
    params: SamplingParams
    grammar: Grammar | None

    @property
    def input_ids(self) -> list[int]: ...  # virtual tokens, then the prompt
    @property
    def n_virtual(self) -> int: ...


class Part(Protocol):
    """A sequence's part of a pass, see ``llama.engine.runner.Piece``."""

    @property
    def sequence(self) -> Text: ...
    @property
    def slot(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def n_drawn(self) -> int: ...


class Change:
    """Changes of one pass; by default none.

    Attributes:
        whole, floats: the numbers that it needs on the device.
    """

    def __init__(self) -> None:
        self.whole: list[list[int]] = []
        self.floats: list[list[float]] = []

    def apply(
        self, logits: torch.Tensor, tokens: torch.Tensor, numbers: list[torch.Tensor]
    ) -> torch.Tensor:
        """Return changed logits.

        Args:
            logits: float32, shape (n_drawn, n_words), which stay as they are.
            tokens: of the pass, on the device.
            numbers: ``whole`` and ``floats``, on the device.

        Raises:
            ValueError: a ``logits_processor`` returns something else than it should.
        """
        return logits


class LogitChanges:
    """Changes of logits, pass after pass.

    Args:
        n_slots, length: of the cache.
        n_words: how many logits a row has.
    """

    def __init__(self, n_slots: int, length: int, n_words: int):
        self.n_words = n_words
        self._size = n_slots, length
        # Whose text each slot holds; one that has ended is free, and its adapter with it.
        self._owners: list[weakref.ref[Text] | None] = [None] * n_slots
        self._penalties: Penalties | None = None  # no memory until a sequence asks for some

    def of(self, parts: Sequence[Part], is_ahead: bool) -> Change:
        """Return what a pass changes; masks begin to be built.

        Args:
            is_ahead: whether only the device knows the tokens of the pass.
        """
        if not any(part.n_drawn and _asks(part.sequence) for part in parts):
            return Change()
        change = _Changes(self, is_ahead)
        row = first = 0
        for part in parts:
            if part.n_drawn:
                change.add(part, row, first)
            row += part.n_drawn
            first += len(part.tokens)
        change.start()
        return change

    def penalties(self, device: torch.device) -> Penalties:
        if self._penalties is None:
            self._penalties = Penalties(*self._size, device)
        return self._penalties

    def place(self, slot: int, position: int) -> int:
        """Return where ``Penalties`` has a token."""
        return slot * self._size[1] + position

    def take(self, slot: int, sequence: Text) -> bool:
        """Return whether a slot holds a sequence's text, which it does from now on."""
        held, self._owners[slot] = self._owners[slot], weakref.ref(sequence)
        return held is not None and held() is sequence


class _Changes(Change):
    def __init__(self, changes: LogitChanges, is_ahead: bool):
        super().__init__()
        self._changes = changes
        self._is_ahead = is_ahead
        self._biased: list[int] = []  # places: row * n_words + token
        self._biases: list[float] = []
        self._banned: list[int] = []
        self._penalised: list[list[int]] = [[], [], [], []]  # as in PenaltyRows
        self._factors: list[list[float]] = [[], [], []]
        self._written: list[list[int]] = [[], []]  # places in Penalties; tokens, or where they are
        self._asked: list[tuple[Grammar, list[int]]] = []
        self._masked: list[int] = []  # rows
        self._processed: list[tuple[int, Part, int]] = []  # rows, and the ends of their texts
        self._masks: Masks | None = None

    def add(self, part: Part, row: int, first: int) -> None:
        """Collect what a part changes.

        Args:
            row: the first of its rows of logits.
            first: the number of its first token in the pass.
        """
        sequence, params = part.sequence, part.sequence.params
        before = len(part.tokens) - part.n_drawn
        ends = range(before + 1, len(part.tokens) + 1)  # the tokens that each row's text has of it
        for i, end in enumerate(ends, row):
            base = i * self._changes.n_words
            for token, bias in params.logit_bias.items():
                if bias <= _BAN:
                    self._banned.append(base + token)
                else:
                    self._biased.append(base + token)
                    self._biases.append(float(min(bias, _LARGEST)))
            if part.start + end - len(sequence.input_ids) < params.min_tokens:
                self._banned += [
                    base + token
                    for token in params.stop_token_ids
                    if 0 <= token < self._changes.n_words
                ]
            if params.logits_processor is not None:
                self._processed.append((i, part, end))
        if _has_penalties(params):
            self._penalise(part, row, ends, first)
        if sequence.grammar is not None:
            self._masked += range(row, row + part.n_drawn)
            self._asked.append((sequence.grammar, part.tokens[before + 1 :]))

    def _penalise(self, part: Part, row: int, ends: range, first: int) -> None:
        sequence, params = part.sequence, part.sequence.params
        for i, end in enumerate(ends, row):
            numbers = (i, part.slot, part.start + end - 1, len(sequence.input_ids))
            for some, number in zip(self._penalised, numbers, strict=True):
                some.append(number)
        factors = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        for values, value in zip(self._factors, factors, strict=True):
            values += [float(value)] * len(ends)
        start = part.start
        tokens = [first] if self._is_ahead else part.tokens
        if not self._changes.take(part.slot, sequence):
            assert not self._is_ahead, "a text's first token is drawn by the pass before"
            start = 0
            tokens = [*[*sequence.input_ids, *sequence.tokens][: part.start], *tokens]
        begin = self._changes.place(part.slot, start)
        self._written[0] += range(begin, begin + len(tokens))
        self._written[1] += tokens

    def start(self) -> None:
        """Begin to build masks, and name what has to be sent."""
        if self._asked:
            self._masks = Masks(self._asked)
        masked = [self._masked, self._biased, self._banned]
        self.whole = [*masked, *self._penalised, *self._written]
        self.floats = [self._biases, *self._factors]

    def apply(
        self, logits: torch.Tensor, tokens: torch.Tensor, numbers: list[torch.Tensor]
    ) -> torch.Tensor:
        n_rows, n_words = logits.shape
        flat = logits.new_empty(n_rows * n_words + 1)  # with a place for what doesn't count
        changed = flat[:-1].view(n_rows, n_words)
        changed.copy_(logits)
        masked, biased, banned, *penalised, places, ids = numbers[: len(self.whole)]
        biases, *factors = numbers[len(self.whole) :]
        if self._biased:
            flat.index_add_(0, biased, biases)
        if self._penalised[0]:
            penalties = self._changes.penalties(logits.device)
            penalties.write(places, tokens.index_select(0, ids) if self._is_ahead else ids)
            longest = max(self._penalised[2]) + 1
            penalties.apply(flat, n_words, PenaltyRows(*penalised, *factors), longest)
        if self._banned:
            flat.index_fill_(0, banned, _BANNED)
        if self._masks is not None:
            masks = self._masks.to(logits.device)
            changed.index_add_(0, masked, barriers(masks, n_words))
        for row, part, end in self._processed:
            _process(changed[row : row + 1], part, end)
        return changed


def _asks(sequence: Text) -> bool:
    """Return whether a sequence may change its logits."""
    params = sequence.params
    return (
        sequence.grammar is not None
        or params.logits_processor is not None
        or bool(params.logit_bias)
        or len(sequence.tokens) < params.min_tokens
        or _has_penalties(params)
    )


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


def _process(logits: torch.Tensor, part: Part, end: int) -> None:
    """Replace a row of logits, (1, n_words), by what its sequence's processor makes of it."""
    sequence = part.sequence
    process = sequence.params.logits_processor
    assert process is not None
    ids = [*[*sequence.input_ids, *sequence.tokens][: part.start], *part.tokens[:end]]
    text = ids[sequence.n_virtual :]
    changed = process(torch.tensor([text], device=logits.device), logits)
    if not isinstance(changed, torch.Tensor) or changed.shape != logits.shape:
        found = tuple(changed.shape) if isinstance(changed, torch.Tensor) else type(changed)
        raise ValueError(
            f"logits_processor returned {found}: expected logits of the shape "
            f"{tuple(logits.shape)}, as it got"
        )
    if not changed.amax().isfinite():
        raise ValueError(
            f"logits_processor returned logits whose largest is {float(changed.amax())}: use -inf "
            "for tokens that are forbidden, and leave one at least"
        )
    logits.copy_(changed)
