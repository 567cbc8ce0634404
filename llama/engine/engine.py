"""Continuous batching: sequences take slots of the cache as they come, and free them as they end.

Each step is one pass through the network. It brings the next token of every sequence that is being
decoded, together with pieces of the prompts that wait to be read.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from llama import parallel
from llama.engine.prefix_cache import PrefixCache, common_prefix
from llama.engine.sequence import Alternatives, Event, FinishReason, Sequence
from llama.errors import NotFinite
from llama.layers.batch import Segment
from llama.model import Transformer
from llama.sampling import sample, token_logprobs
from llama.tokenizer import BaseTokenizer

# A prompt is prefilled in pieces, so that masks and scores stay small however long it is.
PREFILL_CHUNK = 512  # tokens of one sequence in a step
PREFILL_TOKENS = 2048  # tokens of all prompts in a step
_WORTH_WAITING = 64  # tokens of a prompt that is being read, which another one has too


@dataclass
class Counts:
    """Counts of the engine's work."""

    prompt_tokens: int = 0  # read
    reused_tokens: int = 0  # that the cache held
    generated_tokens: int = 0
    passes: int = 0


class Piece(NamedTuple):
    """A sequence's part of a step: tokens from a position on, some of which may be a draft."""

    sequence: Sequence
    start: int
    tokens: list[int]
    n_outputs: int  # how many of the last tokens' hidden states are needed


class Engine:
    """Runs sequences on a model, which nothing else may use in the meantime. For one thread.

    On several ranks each has an engine, and all get the same calls in the same order.

    Attributes:
        prefill_beside_decoding: tokens of prompts that a step reads while others are being
            decoded: few keep their streams smooth, many get a batch done sooner.
        max_decoded: tokens that a step decodes at most, drafts included; None for no limit.
        decode: a faster way to the logits of a step that decodes one token of each sequence.
    """

    def __init__(self, model: Transformer, tokenizer: BaseTokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_beside_decoding = PREFILL_TOKENS
        self.max_decoded: int | None = None
        self.decode: Callable[[torch.Tensor, List[Segment]], torch.Tensor] | None = None
        self.counts = Counts()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order in which they came
        self._prefixes = PrefixCache(model.params.max_batch_size)
        self._n_passes = model.n_passes  # any other pass changes the cache

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, sequences: List[Sequence]) -> None:
        """Queue sequences; each takes a slot of the cache when one is free, first come first.

        Raises:
            ValueError: a prompt is empty; none is queued then.
        """
        if not all(sequence.prompt for sequence in sequences):
            raise ValueError("a prompt has no tokens: begin it with the tokenizer's bos_id")
        for sequence in sequences:
            sequence.begin(self.tokenizer)
        self._waiting += sequences

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence, unless it has ended; its slot is free at once."""
        if sequence.finish_reason is None:
            self._finish(sequence, reason)

    def cancel_all(self) -> None:
        """Cancel all sequences."""
        for sequence in [*self._running, *self._waiting]:
            self.cancel(sequence)

    def forget(self) -> None:
        """Reuse nothing of what the cache holds."""
        self._prefixes.clear()

    def step(self) -> list[Event]:
        """Admit sequences to free slots, and do one pass.

        Returns:
            An event for each sequence that has new text, a new token or has ended.

        Raises:
            NotFinite: the network's output isn't. All running sequences have ended with "error",
                and the cache is empty.
        """
        if self.model.n_passes != self._n_passes:
            self._prefixes.clear()
        try:
            self._admit()
            pieces = self._schedule()
            if not pieces:
                return []
            outputs = self._forward(pieces)
        except BaseException as error:
            self._prefixes.clear()  # of copies and passes that were interrupted
            if isinstance(error, NotFinite):
                self.model.clear_cache()  # where a NaN would spread to later sequences
                for sequence in list(self._running):
                    self._finish(sequence, "error")
            raise
        events, decoded = [], []
        for piece, output in zip(pieces, outputs, strict=True):
            sequence, draft = piece.sequence, piece.tokens[1:]
            if sequence.is_prefilling:
                output, draft = self._read(piece, output), []
            if sequence.finish_reason is not None:
                events.append(Event(sequence))
            elif len(output):
                decoded.append((sequence, draft, output))
        return events + self._choose(decoded)

    def _admit(self) -> None:
        while self._prefixes.free and self._waiting and not self._waits(self._waiting[0]):
            sequence = self._waiting.popleft()
            # Tokens that are scored or pooled must pass through the network.
            whole = sequence.params.scores_prompt or sequence.is_read_only
            limit = 0 if whole else len(sequence.prompt) - 1
            sequence.slot, n_reused, copy = self._prefixes.take(sequence.prompt, limit)
            self._running.append(sequence)
            if copy is not None:
                self.model.copy_cache(copy[0], sequence.slot, copy[1])
            sequence.n_cached = sequence.n_reused = n_reused
            self.counts.reused_tokens += n_reused

    def _waits(self, sequence: Sequence) -> bool:
        """Return whether a prompt being read begins so much like this one that waiting pays."""
        if sequence.params.scores_prompt or sequence.is_read_only:
            return False
        prompt = sequence.prompt
        held = self._prefixes.longest(prompt)
        return any(
            common_prefix(prompt, other.prompt, len(prompt) - 1) > held + _WORTH_WAITING
            for other in self._running
            if other.is_prefilling
        )

    def _schedule(self) -> list[Piece]:
        """Return each decoding sequence's last token and draft, and some tokens of prompts."""
        n_decoding = sum(not sequence.is_prefilling for sequence in self._running)
        budget = self.prefill_beside_decoding if n_decoding else PREFILL_TOKENS
        max_draft = None
        if self.max_decoded is not None:
            max_draft = max(self.max_decoded // max(n_decoding, 1) - 1, 0)
        pieces = []
        for sequence in self._running:
            if not sequence.is_prefilling:
                start = len(sequence.prompt) + len(sequence.tokens) - 1
                tokens = [sequence.tokens[-1], *sequence.draft(max_draft)]
                pieces.append(Piece(sequence, start, tokens, len(tokens)))
            elif budget:
                start = sequence.n_cached
                tokens = sequence.prompt[start : start + min(budget, PREFILL_CHUNK)]
                budget -= len(tokens)
                n_outputs = int(start + len(tokens) == len(sequence.prompt))
                if sequence.params.scores_prompt or sequence.output == "mean":
                    n_outputs = len(tokens)
                pieces.append(Piece(sequence, start, tokens, n_outputs))
        return sorted(pieces, key=lambda piece: piece.sequence.slot or 0)

    @torch.inference_mode()
    def _forward(self, pieces: List[Piece]) -> tuple[torch.Tensor, ...]:
        """Return each piece's hidden states if they are to be pooled, its logits otherwise."""
        self.counts.passes += 1
        device = self.model.freqs_cis.device
        ids = [token for piece in pieces for token in piece.tokens]
        tokens = torch.tensor(ids, device=device)
        segments = []
        for sequence, start, piece_tokens, _ in pieces:
            assert sequence.slot is not None
            segments.append(Segment(sequence.slot, start, len(piece_tokens)))
            self._prefixes.write(sequence.slot, start, piece_tokens)
        self._n_passes = self.model.n_passes + 1
        if self.decode is not None and all(
            len(piece.tokens) == 1 and not piece.sequence.is_read_only for piece in pieces
        ):
            return checked(self.decode(tokens, segments)).split(1)
        counts = [piece.n_outputs for piece in pieces]
        select = None
        if sum(counts) < len(ids):
            ends = accumulate(len(piece.tokens) for piece in pieces)
            chosen = [i for end, n in zip(ends, counts, strict=True) for i in range(end - n, end)]
            select = torch.tensor(chosen, device=device, dtype=torch.long)
        hidden = self.model.hidden_states(tokens, segments, select)  # (sum(counts), dim)
        pooled = [piece.sequence.output in ("mean", "last") for piece in pieces]
        if not any(pooled):
            return checked(self.model.logits(hidden)).split(counts)
        return tuple(
            checked(part.float() if pools else self.model.logits(part))
            for part, pools in zip(hidden.split(counts), pooled, strict=True)
        )

    def _read(self, piece: Piece, output: torch.Tensor) -> torch.Tensor:
        """Note that a prompt's piece is in the cache; return the logits to draw from, if any."""
        sequence = piece.sequence
        self.counts.prompt_tokens += len(piece.tokens)
        sequence.n_cached += len(piece.tokens)
        if sequence.params.scores_prompt:
            self._score_prompt(piece, output)
        if sequence.output == "mean":
            part = output.sum(0) / len(sequence.prompt)
            sequence.pooled = part if sequence.pooled is None else sequence.pooled + part
        if sequence.is_prefilling:
            return output[:0]
        if sequence.output in ("last", "logits"):
            sequence.pooled = output[-1].clone()
        if sequence.is_read_only:
            self._finish(sequence, "stop")
        elif sequence.max_new_tokens == 0:  # only the prompt was requested
            self._finish(sequence, "length")
        return output[-1:]

    def _score_prompt(self, piece: Piece, logits: torch.Tensor) -> None:
        """Add the log-probabilities of the prompt's tokens that a piece predicts."""
        sequence, start, tokens, _ = piece
        if start == 0:
            sequence.prompt_logprobs.append(0.0)
            sequence.prompt_top_logprobs.append([])
        predicted = sequence.prompt[start + 1 : start + len(tokens) + 1]
        ids = torch.tensor(predicted, device=logits.device, dtype=torch.long)
        logits = logits[: len(predicted)]
        sequence.prompt_logprobs += token_logprobs(logits, ids).tolist()
        sequence.prompt_top_logprobs += self._top(logits, sequence)

    def _choose(self, rows: List[tuple[Sequence, list[int], torch.Tensor]]) -> list[Event]:
        """Give sequences their next tokens: (sequence, its draft, its logits)."""
        if not rows:
            return []
        logits = torch.cat([part for _, _, part in rows])
        owners = [sequence for sequence, _, part in rows for _ in range(len(part))]
        uniforms = torch.tensor(
            [sequence.uniform(i) for sequence, _, part in rows for i in range(len(part))],
            device=logits.device,
        )
        # A vocabulary may be padded beyond the tokenizer's pieces; those ids mean nothing.
        known = logits[:, : self.tokenizer.n_words]
        tokens = sample(known, [sequence.params for sequence in owners], uniforms)
        tokens = parallel.broadcast(tokens)  # ranks may round differently
        logprobs = [0.0] * len(owners)
        if any(sequence.params.logprobs for sequence in owners):
            logprobs = token_logprobs(logits, tokens).tolist()
        chosen = list(zip(tokens.tolist(), logprobs, strict=True))
        events, first = [], 0
        for sequence, draft, part in rows:
            events.append(self._append(sequence, draft, chosen[first : first + len(part)], part))
            first += len(part)
        return events

    def _append(
        self,
        sequence: Sequence,
        draft: list[int],
        chosen: list[tuple[int, float]],
        logits: torch.Tensor,
    ) -> Event:
        before = len(sequence.tokens)
        text = sequence.append(draft, chosen)
        n_new = max(len(sequence.tokens) - before, 0)
        self.counts.generated_tokens += n_new
        if sequence.params.top_logprobs:
            sequence.top_logprobs += self._top(logits[:n_new], sequence)
            del sequence.top_logprobs[len(sequence.tokens) :]
        if sequence.finish_reason is not None:
            self._leave(sequence)
        return Event(sequence, text)

    def _top(self, logits: torch.Tensor, sequence: Sequence) -> list[Alternatives]:
        """Return a sequence's most probable tokens at each row of logits."""
        if not sequence.params.top_logprobs:
            return [[] for _ in logits]
        logprobs = logits.log_softmax(-1)[:, : self.tokenizer.n_words]
        values, ids = logprobs.topk(min(sequence.params.top_logprobs, logprobs.shape[1]))
        return [
            list(zip(some_ids, some, strict=True))
            for some_ids, some in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish(reason)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence.slot is not None:
            self._running.remove(sequence)
            self._prefixes.release(sequence.slot)


def checked(output: torch.Tensor) -> torch.Tensor:
    """Return a network's output.

    Raises:
        NotFinite: it holds an infinity or a NaN.
    """
    if not output.isfinite().all():
        raise NotFinite
    return output
